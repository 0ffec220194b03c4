"""A frozen copy of the user's module, its parameters chosen and grouped."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .function import ALL_OUTPUTS, MIXES_ROWS, NetworkFunction, check_finite, normal_tensor
from .sharing import share_snapshot
from .snapshot import (
    ParameterSelection,
    buffer_tree,
    canonical_names,
    check_parameter,
    convert_skeleton,
    make_skeleton,
    named_tensors,
    select,
    unwrap,
)

_serial_numbers = itertools.count(1)


class FrozenNetwork(nn.Module):
    r"""A snapshot of a network at its present weights :math:`w_0`, in eval mode, that owns its tensors as buffers.

    Nothing is shared with the network it came from: neither sees a change made to the other. There are no
    `nn.Parameter` s in it, so optimisers leave it alone; `.to()`, `state_dict`, `load_state_dict`, pickle and deepcopy
    work as for any module, and the state's keys are the network's own names below `tensors.`.

    It computes in the dtype and on the device of the inputs, whatever its buffers have: converted tensors are made once
    per dtype and device and kept.

    :param network: The trained network. Called with one tensor; its output's first dimension is the inputs'.
    :param parameters: Which parameters take part in the linearisation: those with `requires_grad=True` (default), those
        whose name matches a shell pattern or one of several (`"head.*"`), or those for which a predicate
        `f(name, parameter)` is true.
    :param input_shape: The shape of one input as the network wants it, e.g. `(3, 32, 32)`. Flat inputs of width
        d = 3·32·32 are reshaped to it.
    :param output: Index of the one output to take, `"all"` for all C of them, or None where the network has just one.
    :param group_by: Maps a parameter's name to the label of its group (for a prior variance per group). One group by
        default.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        input_shape: tuple[int, ...] | None = None,
        output: int | str | None = None,
        group_by: Callable[[str], str] | None = None,
    ):
        super().__init__()
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "input_shape": input_shape,
            "output": output,
            "group_by": group_by,
        }
        _check_output_argument(output)
        self.input_shape = None if input_shape is None else tuple(int(size) for size in input_shape)
        self.output = output
        network = source = unwrap(network)
        named: dict[str, nn.Parameter] = dict(named_tensors(network.named_parameters(remove_duplicate=False)))
        if not named:
            raise ValueError(
                f"{type(network).__name__} has no parameters, so there is nothing to linearise it in. "
                "Pass the trained torch.nn.Module itself."
            )
        for name, parameter in named.items():
            check_parameter(name, parameter)
        canonical = canonical_names(network)
        selected = select(named, parameters)
        self.parameter_names = tuple(dict.fromkeys(canonical[name] for name in named if name in selected))
        labels = [group_by(name) if group_by is not None else "all" for name in self.parameter_names]
        self.group_names = tuple(dict.fromkeys(labels))
        self.group_indices = tuple(self.group_names.index(label) for label in labels)
        self.tensors = buffer_tree(network, set(canonical.values()))
        share_snapshot(source, self.tensors)
        self._aliases = canonical
        # In a list, so that its mode and dtype are never changed from outside.
        self._skeleton = [make_skeleton(network)]
        self._functions: dict = {}
        self._checked: set = set()
        self._places: list[dict[str, Tensor | None]] | None = None
        self._seen: list[tuple[weakref.ref, int]] = []
        self._serial = 0

    def renewed(self, network: nn.Module) -> FrozenNetwork:
        """A snapshot of another network, or of this one's new weights, with the same options."""
        return FrozenNetwork(network, **self._options)

    @property
    def num_groups(self) -> int:
        """G, the number of parameter groups."""
        return len(self.group_names)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters as they are kept, single precision at least."""
        return torch.promote_types(self.get_buffer(f"tensors.{self.parameter_names[0]}").dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the parameters as they are kept."""
        return self.get_buffer(f"tensors.{self.parameter_names[0]}").device

    def fingerprint(self) -> int:
        """A number that no other state of a snapshot has: new after `.to`, `load_state_dict`, in-place edits."""
        if self._places is None:  # walking over modules each time would take longer than small networks do
            self._places = [module._buffers for module in self.tensors.modules()]
        tensors = [tensor for place in self._places for tensor in place.values() if tensor is not None]
        unchanged = len(tensors) == len(self._seen) and all(
            reference() is tensor and version == tensor._version
            for tensor, (reference, version) in zip(tensors, self._seen, strict=True)
        )
        if not unchanged:
            self._seen = [(weakref.ref(tensor), tensor._version) for tensor in tensors]
            self._serial = next(_serial_numbers)
        return self._serial

    def function(self, dtype: torch.dtype, device: torch.device) -> NetworkFunction:
        """The network as a pure function of its parameters in this dtype and on this device, made once and kept."""
        fingerprint = self.fingerprint()
        key = (dtype, device)
        if key not in self._functions or self._functions[key][0] != fingerprint:
            self._functions[key] = (fingerprint, self._convert(dtype, device))
        return self._functions[key][1]

    def _convert(self, dtype: torch.dtype, device: torch.device) -> NetworkFunction:
        with torch.inference_mode(False), torch.no_grad():
            tensors = {
                name.removeprefix("tensors."): buffer.to(device, dtype if buffer.is_floating_point() else None)
                for name, buffer in self.named_buffers()
            }
            # A network may write to its buffers when it is called: those writes must not reach the snapshot.
            for name in tensors.keys() - set(self.parameter_names):
                tensors[name] = tensors[name].clone()
        return NetworkFunction(self, convert_skeleton(self._skeleton[0], dtype, device), tensors)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) at the frozen weights: (*batch, n, d) to (*batch, n), or (*batch, n, C) with `output="all"`."""
        check_finite(x)
        self.check(x)
        function = self.function(x.dtype, x.device)
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] == 0:
            out = flat.new_zeros(0, function.num_outputs)
        else:
            with function.tracing():
                chunks = normal_tensor(flat).split(function.points_per_pass())
                pieces = [function(function.parameters, chunk) for chunk in chunks]
            out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        shape = x.shape[:-1] if self.output != ALL_OUTPUTS else (*x.shape[:-1], function.num_outputs)
        return out.reshape(shape)

    def num_outputs(self, x: Tensor) -> int:
        """C, the number of outputs that take part, at inputs of this width, dtype and device."""
        if self.output != ALL_OUTPUTS:
            return 1
        self.check(x)
        return self.function(x.dtype, x.device).num_outputs

    def check(self, x: Tensor) -> None:
        """Raises where the network cannot be linearised at inputs like `x`.

        The width, dtype and outputs are looked at once per width, dtype and device; that no row's output depends on the
        other rows, once there are two rows to try it with.
        """
        several = x.shape[:-1].numel() > 1
        key = (x.shape[-1], x.dtype, x.device, several, self.fingerprint())
        if key in self._checked:
            return
        self._check_width(x)
        check_finite(x)
        function = self.function(x.dtype, x.device)
        with torch.inference_mode(False), _preserved_random_state(x.device):
            rows = normal_tensor(x.detach()).reshape(-1, x.shape[-1])[:4].clone()
            if rows.shape[0] == 0:
                rows = x.new_zeros(1, x.shape[-1])
            function.probe(rows)
            if several:
                self._check_rows_are_independent(rows)
        self._checked.add(key)

    def _check_width(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"Expected inputs of a floating-point dtype, got {x.dtype}. Cast them, e.g. with x.float(); a network "
                "that wants integers can cast them back in its forward."
            )
        if self.input_shape is not None and x.shape[-1] != math.prod(self.input_shape):
            raise ValueError(
                f"Got inputs of width {x.shape[-1]} (shape {tuple(x.shape)}), but input_shape={self.input_shape} needs "
                f"{math.prod(self.input_shape)} features. Flatten each input to one row, or change input_shape."
            )

    def _check_rows_are_independent(self, rows: Tensor) -> None:
        try:  # in float64, where a true dependence stands out from rounding
            function, rows64 = self._convert(torch.float64, rows.device), rows.double()
            together, again, apart = _evaluate_together_and_apart(function, rows64)
        except (RuntimeError, TypeError):  # a dtype fixed inside the network, or a device without float64
            together, again, apart = _evaluate_together_and_apart(self.function(rows.dtype, rows.device), rows)
        tolerance = 1e-5 * max(float(together.abs().max()), 1e-30)
        if not torch.allclose(together, again, rtol=0.0, atol=tolerance):
            raise ValueError(
                "The network gives different outputs for the same inputs, so it has no Jacobian. It is already in eval "
                "mode: look for random numbers in its forward, such as torch.nn.functional.dropout without "
                "training=self.training."
            )
        if not torch.allclose(together, apart, rtol=0.0, atol=tolerance):
            raise ValueError(MIXES_ROWS)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_functions": {}, "_checked": set(), "_places": None, "_seen": [], "_serial": 0}

    def __deepcopy__(self, memo: dict) -> FrozenNetwork:
        """Shares the tensors, which are never written to: `.to()` and `load_state_dict` put new ones in their place.

        GPyTorch deep-copies kernels to index their batches, and models to add fantasies.
        """
        new = copy.copy(self)
        memo[id(self)] = new
        known = {"_functions": dict(self._functions), "_checked": set(self._checked), "_seen": list(self._seen)}
        new.__dict__.update(known, _modules=dict(self._modules), _places=None, _serial=self._serial)
        new.tensors = self.tensors.shared_copy()
        return new


def _check_output_argument(output: int | str | None) -> None:
    if output is None or output == ALL_OUTPUTS or (isinstance(output, int) and not isinstance(output, bool)):
        return
    raise TypeError(f"output must be an index, '{ALL_OUTPUTS}' or None, got {output!r}.")


def _evaluate_together_and_apart(function: NetworkFunction, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs for all rows, for all once more, and for the first by itself and then the rest."""
    with function.tracing(), torch.no_grad():
        together, again = function(function.parameters, rows), function(function.parameters, rows)
        try:
            apart = torch.cat([function(function.parameters, rows[:1]), function(function.parameters, rows[1:])])
        except Exception as error:
            raise ValueError(f"{MIXES_ROWS} (A row by itself raised: {error})") from error
    return together, again, apart


@contextmanager
def _preserved_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
