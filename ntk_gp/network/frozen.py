"""A frozen copy of the user's module, its parameters chosen and grouped."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import settings
from .._compat import CHILDREN, buffers_in, children_in
from .checks import check_finite, check_inputs, check_tensor
from .chosen_outputs import Outputs, OutputSelection
from .equality import same_module
from .fingerprint import Fingerprint
from .function import NO_MODE, Findings, NetworkFunction
from .probe import probe
from .rows import check_values
from .sharing import share_snapshot
from .skeleton import Skeletons
from .snapshot import (
    ParameterSelection,
    buffer_tree,
    canonical_names,
    check_parameter,
    check_same_parameters,
    convert_skeleton,
    copy_in_eval_mode,
    make_skeleton,
    named_tensors,
    select,
    unregistered_tensors,
    unwrap,
)
from .specification import specify
from .tensors import convert_each, normal_tensor
from .trial import FEW, Trial

_random_state = threading.RLock()


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
    :param output: Index of the one output to take, a list of some, `"all"` for all C of them, `"batch"` for each of
        them by itself, or None where the network has just one (:mod:`.chosen_outputs`).
    :param group_by: Maps a parameter's name to the label of its group (for a prior variance per group). One group by
        default.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        input_shape: tuple[int, ...] | None = None,
        output: OutputSelection = None,
        group_by: Callable[[str], str] | None = None,
    ):
        super().__init__()
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "input_shape": input_shape,
            "output": output,
            "group_by": group_by,
        }
        Outputs.of(output)  # raises, before anything is copied
        network = source = unwrap(network)
        named: dict[str, nn.Parameter] = dict(named_tensors(network.named_parameters(remove_duplicate=False)))
        if not named:
            raise ValueError(
                f"{type(network).__name__} has no parameters, so there is nothing to linearise it in. "
                "Pass the trained torch.nn.Module itself."
            )
        for name, parameter in named.items():
            check_parameter(name, parameter)
        selected = select(named, parameters)
        attributes = unregistered_tensors(network)
        network = copy_in_eval_mode(network)
        canonical = canonical_names(network)
        check_same_parameters(named, canonical)
        self.specification = specify(
            network,
            canonical,
            [name for name in named if name in selected],
            input_shape=input_shape,
            output=output,
            group_by=group_by,
            attributes=attributes,
        )
        self.parameter_names, self.group_names = self.specification.parameter_names, self.specification.group_names
        self.input_shape, self.outputs = self.specification.input_shape, self.specification.outputs
        self.tensors = buffer_tree(network, set(canonical.values()))
        self._aliases = canonical
        # In a list, so that its mode and dtype are never changed from outside.
        self._skeleton = [make_skeleton(network)]
        self._functions: dict[tuple, NetworkFunction] = {}
        self._checked: set[tuple] = set()
        self._exact_findings: dict[tuple, Findings] = {}
        self._places: _Places | None = None
        self._fingerprint = Fingerprint()
        self._lock = threading.RLock()  # held while functions are made and tried
        share_snapshot(source, self.tensors)

    def renewed(self, network: nn.Module) -> FrozenNetwork:
        """A snapshot of another network, or of this one's new weights, with the same options."""
        return FrozenNetwork(network, **self._options)

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with, beside the network."""
        return dict(self._options)

    def forget_trials(self) -> None:
        """Has the network tried again at the next inputs: what others have tried it at says nothing of those."""
        with self._lock:
            self._checked, self._exact_findings = set(), {}
            plain = {kind: function for kind, function in self._functions.items() if function.inner_dtype is None}
            self._functions = plain

    def take_options(self, other: FrozenNetwork) -> None:
        """Those of another snapshot, which is the same as this one, for :meth:`renewed`."""
        self._options = other.options

    @property
    def output(self) -> int | str | list[int] | None:
        """The option `output` as it was given."""
        return self.outputs.option

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

    def fingerprint(self, thorough: bool = False) -> int:
        """A number that no other state of a snapshot has: new after `.to`, `load_state_dict`, in-place edits.

        :param thorough: Look for edits that leave no trace, too, by checksums of every byte. What users
            call does so once.
        """
        places = self._places
        if places is None:  # walking over modules each time would take longer than small networks do
            places = self._places = _Places([buffers_in(module) for module in self.tensors.modules()])
        tensors = [tensor for place in places.dictionaries for tensor in place.values() if tensor is not None]
        return self._fingerprint.number(tensors, thorough)

    def function(self, dtype: torch.dtype, device: torch.device, state: int | None = None) -> NetworkFunction:
        """The network as a pure function of its parameters in this dtype and on this device, made once and kept.

        :param state: The present fingerprint, where the caller has just asked for it.
        """
        state = self.fingerprint() if state is None else state
        key = (dtype, device)
        known = self._functions.get(key)
        if known is None or known.state != state:
            with self._lock:
                known = self._functions.get(key)
                if known is None or known.state != state:
                    known = self._functions[key] = self._convert(dtype, device, state=state)
        return known

    def _convert(
        self,
        dtype: torch.dtype,
        device: torch.device,
        inner_dtype: torch.dtype | None = None,
        state: int | None = None,
    ) -> NetworkFunction:
        """The same, made anew; where the network computes in a precision of its own, say in which."""
        with torch.inference_mode(False), torch.no_grad():
            buffers = {name.removeprefix("tensors."): buffer for name, buffer in self.named_buffers()}
            tensors = convert_each(buffers, dtype, device)
            # Calls must not reach the snapshot.
            for name in tensors.keys() - set(self.parameter_names):
                tensors[name] = tensors[name].clone()
            skeleton = convert_skeleton(self._skeleton[0], inner_dtype or dtype, device)
        return NetworkFunction(self.specification, Skeletons(skeleton, self._aliases), tensors, inner_dtype, state)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) at the frozen weights: (*batch, n, d) to (*batch, n); or (*batch, n, C) with `output="all"` or a list,
        and (*batch, C, n) with `output="batch"`."""
        x = self.outputs.unrepeated(x)
        return self.outputs.shaped(self.values(x, self.fingerprint(thorough=True)), x.shape[:-1])

    def values(self, x: Tensor, state: int, mode: AbstractContextManager[object] = NO_MODE) -> Tensor:
        """The same for all points as one list, (*batch, n, d) to (N, C), for callers that have looked for edits of the
        snapshot themselves.

        :param state: What they found: the present fingerprint.
        :param mode: A context for what the network itself calls, and for nothing else.
        """
        check_finite(x)
        function = self._tried(x, state)
        function.check_input_gradients(x)
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] == 0:
            return flat.new_zeros(0, function.num_outputs)
        with function.tracing():
            chunks = normal_tensor(flat).split(function.points_per_pass())
            steps = settings.progress(chunks, "Network")
            pieces = [function(function.parameters, chunk, mode) for chunk in steps]
            if not function.has_checked(len(flat)):
                check_values(function, chunks[0], pieces[0], len(flat))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def flattened(self, x: Tensor) -> Tensor:
        """Inputs of `input_shape`, (*batch, n, *input_shape), as the rows (*batch, n, d) that GPyTorch wants.

        Others are returned as they are: rows already, or of a width that :meth:`check` refuses.
        """
        check_tensor(x)
        shape = self.input_shape or ()
        is_shaped = len(shape) > 1 and x.dim() > len(shape) and tuple(x.shape[-len(shape) :]) == shape
        return x.flatten(-len(shape)) if is_shaped and x.shape[-1] != math.prod(shape) else x

    def num_outputs(self, x: Tensor) -> int:
        """C, the number of outputs that take part, at inputs of this width, dtype and device."""
        known = self.outputs.known_count
        return self.at(x).num_outputs if known is None else known

    def check(self, x: Tensor) -> None:
        """Raises where the network cannot be linearised at inputs like `x`, see :meth:`at`."""
        self.at(x)

    def bind(self, x: Tensor, *others: Tensor) -> NetworkFunction:
        """What serves inputs that a user has just given: they are looked at, and the snapshot for any edit of it.

        It travels on with them: whoever has it need not ask again what it says (dtype, device, C, the state of the
        network).

        :raises TypeError: If they are no tensors, or no floating-point numbers.
        :raises ValueError: If some are NaN or infinite, or not of one dtype and on one device, and where :meth:`at`
            does.
        """
        different = (x, *(other for other in others if other is not x))
        check_inputs(*different)
        state = self.fingerprint(thorough=True)
        for given in different:
            function = self.at(given, state)
        return function

    def at(self, x: Tensor, state: int | None = None) -> NetworkFunction:
        """The network as a function for inputs like `x`, tried there; raises where it cannot be linearised.

        The width, dtype and outputs are looked at once per width, dtype and device. That no row's output depends on the
        other rows is tried with up to 16 different rows, again with more where there were fewer before, and by one pass
        through the network once for each larger number of rows.

        :param state: The present fingerprint, where the caller has just asked for it.
        """
        function = self._tried(x, self.fingerprint() if state is None else state)
        rows = x.shape[:-1].numel()
        if rows > FEW and not function.has_checked(rows):
            flat = normal_tensor(x.detach()).reshape(rows, -1)[: function.points_per_pass()]
            with function.tracing(), torch.no_grad(), preserved_random_state(x.device):
                check_values(function, flat, function(function.parameters, flat), rows)
        return function

    def exact(self, rows: Tensor) -> NetworkFunction:
        """The function in float64, tried at these rows (m, d); not kept if it has not been wanted by inputs of float64.

        :raises Exception: Where network or device have no such precision, or the network cannot be linearised in it.
        """
        state = self.fingerprint()
        known = self._functions.get((torch.float64, rows.device))
        if known is not None and known.state == state and known.inner_dtype is None and known.is_tried:
            return known
        function = self._convert(torch.float64, rows.device, state=state)
        findings = self._exact_findings.get((rows.shape[1], rows.device, state))
        if findings is not None:
            function.learn(findings)
            return function
        with self._lock, preserved_random_state(rows.device):
            probe(function, rows.double())
        return function

    def _tried(self, x: Tensor, state: int) -> NetworkFunction:
        """The function in this state, tried at a few rows."""
        kind = _kind(x, state)
        if kind not in self._checked:
            self._try(x, kind, state)
        return self.function(x.dtype, x.device, state)

    def _try(self, x: Tensor, kind: tuple, state: int) -> None:
        self.check_width(x)
        check_finite(x)
        with self._lock, torch.inference_mode(False), preserved_random_state(x.device):
            if kind in self._checked:  # by another thread, meanwhile
                return
            function = self.function(x.dtype, x.device, state)
            rows = normal_tensor(x.detach()).reshape(x.shape[:-1].numel(), x.shape[-1])
            trial = Trial(function, rows, partial(self._converted, x.device, state))
            self._functions[rows.dtype, rows.device] = trial.function
            if trial.exact_findings is not None:
                self._exact_findings[rows.shape[1], rows.device, state] = trial.exact_findings
            self._checked.add(kind)

    def _converted(
        self, device: torch.device, state: int, dtype: torch.dtype, inner_dtype: torch.dtype | None = None
    ) -> NetworkFunction:
        return self._convert(dtype, device, inner_dtype, state)

    def check_width(self, x: Tensor) -> None:
        """Raises where inputs are no rows of floating-point numbers of the width that `input_shape` needs."""
        if not x.is_floating_point():
            raise TypeError(
                f"Expected inputs of a floating-point dtype, got {x.dtype}. Cast them, e.g. with x.float(); a network "
                "that wants integers can cast them back in its forward."
            )
        if self.input_shape is not None and x.shape[-1] != math.prod(self.input_shape):
            raise ValueError(
                f"Got inputs of width {x.shape[-1]} (shape {tuple(x.shape)}), but input_shape={self.input_shape} needs "
                f"{math.prod(self.input_shape)} features. Flatten each input to one row, e.g. x.flatten(1) for the "
                "whole model (GPyTorch takes all but the last two dimensions for batches), or change input_shape."
            )

    def __getstate__(self) -> dict:
        made_again: dict[str, Any] = {"_functions": {}, "_checked": set(), "_exact_findings": {}}
        nothing = dict.fromkeys(("_places", "_lock"))
        return {**self.__dict__, **made_again, **nothing, "_fingerprint": Fingerprint()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> FrozenNetwork:
        """Shares the tensors, which are never written to: `.to()` and `load_state_dict` put new ones in their place.

        GPyTorch deep-copies kernels to index their batches, and models to add fantasies.
        """
        new = copy.copy(self)
        memo[id(self)] = new
        with self._lock:
            known = {
                "_functions": dict(self._functions),
                "_checked": set(self._checked),
                "_exact_findings": dict(self._exact_findings),
            }
        new.__dict__.update(
            {**known, CHILDREN: dict(children_in(self))},
            _places=None,
            _fingerprint=self._fingerprint.copy(),
            _lock=threading.RLock(),
        )
        new.tensors = self.tensors.shared_copy()
        return new


def is_same_snapshot(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    """Whether two are of the same function, with the same parameters chosen, and share every tensor.

    Snapshots of one module share what is equal (:mod:`.sharing`), so that the objects say it.
    """
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    same_tensors = ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    return (
        same_tensors
        and one.specification == other.specification
        and one._aliases == other._aliases
        and same_module(one._skeleton[0], other._skeleton[0])
    )


class _Places:
    """The dictionaries that hold a tree's tensors. No list: `torch.export` would put copies into a module's lists."""

    def __init__(self, dictionaries: list[dict[str, Tensor | None]]):
        self.dictionaries = dictionaries


def _kind(x: Tensor, state: int) -> tuple:
    """What a network need be tried at only once: inputs of one width, dtype and device, about as many of them."""
    count = min(x.shape[:-1].numel(), FEW)
    return x.shape[-1], x.dtype, x.device, count.bit_length(), state


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with _random_state, torch.random.fork_rng(devices=devices):  # two threads would restore each other's
        yield
