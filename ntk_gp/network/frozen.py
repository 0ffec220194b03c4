"""A frozen copy of the user's module, its parameters chosen and grouped."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import settings
from .._compat import CHILDREN, buffers_in, children_in
from .checks import check_finite, check_inputs, check_tensor
from .fingerprint import Fingerprint
from .function import NO_MODE, Findings, NetworkFunction
from .inputs import InputDtype, InputShape
from .last_layer import Presumed, last_layer_of
from .parameter_sets import LAST_LAYER, GroupBy, ParameterSets, last_registered, within
from .probe import probe
from .returned import Output
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
    patterns_of,
    select,
    unregistered_tensors,
    unwrap,
)
from .specification import check_output_argument, specify
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
        whose name matches a shell pattern or one of several (`"head.*"`), sets by name among them (`"last_layer"`,
        `"norm"`, `"bias"`), or those for which a predicate `f(name, parameter)` is true.
    :param input_shape: The shape of one input as the network wants it, e.g. `(3, 32, 32)`: flat inputs of width
        d = 3·32·32 are reshaped to it. Of a network with several arguments, the shape of each by its name, e.g.
        `{"ids": (128,), "mask": (128,)}`, side by side in one row (:func:`~ntk_gp.pack`).
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, of all arguments or by name.
    :param output: Index of the one output to take, a list of some, `"all"` for all C of them, `"batch"` for each of
        them by itself, or None where the network has just one. Where it returns more than a tensor, a name, a function,
        or a tuple of steps to the tensor and one of these.
    :param group_by: Maps a parameter's name to the label of its group (for a prior variance per group); or a mapping of
        patterns and names of sets to labels, of which the first that matches decides, `"other"` being what none does.
        One group by default.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        group_by: GroupBy = None,
    ):
        super().__init__()
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "input_shape": input_shape,
            "input_dtype": input_dtype,
            "output": output,
            "group_by": group_by,
        }
        check_output_argument(output)  # before anything is copied
        network = source = unwrap(network)
        named: dict[str, nn.Parameter] = dict(named_tensors(network.named_parameters(remove_duplicate=False)))
        if not named:
            raise ValueError(
                f"{type(network).__name__} has no parameters, so there is nothing to linearise it in. "
                "Pass the trained torch.nn.Module itself."
            )
        for name, parameter in named.items():
            check_parameter(name, parameter)
        sets = ParameterSets(network, named, last_registered(network))
        selected = select(named, parameters, sets)
        attributes = unregistered_tensors(network)
        network = copy_in_eval_mode(network)
        canonical = canonical_names(network)
        check_same_parameters(named, canonical)
        self.specification = specify(
            network,
            canonical,
            [name for name in named if name in selected],
            sets,
            input_shape=input_shape,
            input_dtype=input_dtype,
            output=output,
            group_by=group_by,
            attributes=attributes,
        )
        self.inputs, self.outputs = self.specification.inputs, self.specification.outputs
        self._presumed = _presumed(parameters, group_by, sets, named, selected)
        self.tensors = buffer_tree(network, set(canonical.values()))
        self._aliases = canonical
        # In a list, so that its mode and dtype are never changed from outside.
        self._skeleton = [make_skeleton(network)]
        self._functions: dict[tuple, NetworkFunction] = {}
        self._checked: set[tuple] = set()
        self._exact_findings: dict[tuple, Findings] = {}
        self._places: _Places | None = None
        self._fingerprint = Fingerprint()
        self.compared: tuple[int, int, bool] | None = None  # with which other one last, see :mod:`.same`
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
    def parameter_names(self) -> tuple[str, ...]:
        """The selected parameters. Which those of the `"last_layer"` are is sure after the first call."""
        return self.specification.parameter_names

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups of parameters."""
        return self.specification.group_names

    def fix_parameters(self) -> None:
        """Has a last layer that turns out to be another one than presumed refused: something depends on which it is."""
        if self._presumed is not None:
            self._presumed = dataclasses.replace(self._presumed, is_fixed=True)

    @property
    def output(self) -> Output:
        """The option `output` as it was given."""
        return self._options["output"]

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
        x = self.carried(x)
        check_finite(x)
        function = self._tried(x, state)
        self.inputs.check(x)
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
        """Inputs of `input_shape`, (*batch, n, *input_shape), as the rows (*batch, n, d) that GPyTorch wants; integers
        in the dtype of the network.

        Others are returned as they are: rows already, or of a width that :meth:`check` refuses.
        """
        check_tensor(x)
        return self.inputs.flattened(self.carried(x))

    def carried(self, x: Tensor) -> Tensor:
        """Integers in the dtype of the network, where that holds them and the network wants such; others as they are.

        :raises TypeError: Where it wants none.
        :raises ValueError: Where they are too large.
        """
        return x if x.is_floating_point() else self.inputs.carried(x, self.dtype)

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
            self.inputs.check(given)
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
            if not x.numel() and function.is_tried:  # at inputs there are; zeros in place of none may be no inputs
                return
            rows = normal_tensor(x.detach()).reshape(x.shape[:-1].numel(), x.shape[-1])
            function = self._with_last_layer(function, rows)
            trial = Trial(function, rows, partial(self._converted, x.device, state))
            self._functions[rows.dtype, rows.device] = trial.function
            if trial.exact_findings is not None:
                self._exact_findings[rows.shape[1], rows.device, state] = trial.exact_findings
            self._checked.add(kind)

    def _with_last_layer(self, function: NetworkFunction, rows: Tensor) -> NetworkFunction:
        """The function in the parameters of the layer that is called last, which is looked for at these rows."""
        presumed = self._presumed
        if presumed is None or presumed.is_settled:
            return function
        names = {name: self._aliases[name] for name in presumed.names}
        row = rows[:1] if len(rows) else rows.new_zeros(1, rows.shape[1])
        layer = last_layer_of(function, row, names)
        if layer != presumed.layer and presumed.is_fixed:
            presumed.refuse(layer)
        self._presumed = dataclasses.replace(presumed, layer=layer, is_settled=True)
        if layer == presumed.layer:
            return function
        chosen = {self._aliases[name] for name in (*presumed.others, *within(layer, presumed.names))}
        parameter_names = tuple(dict.fromkeys(owner for owner in names.values() if owner in chosen))
        labels = (self.specification.group_labels[0],) * len(parameter_names)
        self.specification = dataclasses.replace(
            self.specification, parameter_names=parameter_names, group_labels=labels
        )
        self._functions = {}
        return self.function(rows.dtype, rows.device, function.state)

    def _converted(
        self, device: torch.device, state: int, dtype: torch.dtype, inner_dtype: torch.dtype | None = None
    ) -> NetworkFunction:
        return self._convert(dtype, device, inner_dtype, state)

    def check_width(self, x: Tensor) -> None:
        """Raises where inputs are no rows of floating-point numbers of the width that `input_shape` needs."""
        if not x.is_floating_point():
            raise TypeError(
                f"Expected inputs of a floating-point dtype, got {x.dtype}. Cast them, e.g. with x.float(); a network "
                "that wants integers has them with input_dtype=torch.long."
            )
        self.inputs.check_width(x)

    def __getstate__(self) -> dict:
        made_again: dict[str, Any] = {"_functions": {}, "_checked": set(), "_exact_findings": {}}
        nothing = dict.fromkeys(("_places", "_lock", "compared"))
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


def _presumed(
    parameters: ParameterSelection,
    group_by: GroupBy,
    sets: ParameterSets,
    named: Mapping[str, nn.Parameter],
    selected: set[str],
) -> Presumed | None:
    """What is taken for the last layer, where that was asked for."""
    patterns = patterns_of(parameters)
    grouped = isinstance(group_by, Mapping) and LAST_LAYER in group_by
    if sets.last_layer is None or not (grouped or LAST_LAYER in patterns):
        return None
    others = {name for pattern in patterns if pattern != LAST_LAYER for name in sets.matching(pattern)}
    is_fixed = group_by is not None  # groups have variances, in the order of the parameters
    return Presumed(sets.last_layer, tuple(named), frozenset(others & selected), is_fixed)


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
