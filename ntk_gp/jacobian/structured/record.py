"""Recording a network's uses of its parameters: what each was multiplied with, and the gradients at its result.

One forward pass runs under a mode that sees every function call. A call with a selected parameter in it, for which
there is a rule, is made with that parameter *detached*: one backward pass for each output then gives the gradients at
every use's result. Whatever still depends on a parameter afterwards is a use that no rule has seen, and shows in the
graph that autograd has recorded: that parameter is left to autodiff.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..._compat import is_view, version_of
from ...network import LEAF, NetworkFunction, nodes_below
from ...replacements.recorded import RECORDED_AS
from ..maps import Computed, is_own
from ..rules import find
from ..rules.registry import RegisteredDecomposition, RegisteredRule
from ..terms import ParameterView
from .tracked import Tracker

# How a network gets hold of its graph; `grad_fn` is a property.
_HOOKS = (Tensor.register_hook, Tensor.grad_fn.__get__)  # type: ignore[union-attr]
# Below this many elements at all the uses together, outputs are differentiated side by side instead of one by one.
_BATCHED_ELEMENTS = 1 << 20


@dataclass
class RecordedUse:
    """One call of a function with a parameter among its arguments, and what is needed to differentiate it later.

    :param function: The function, as the network called it.
    :param rule: Says what its derivatives are.
    :param arguments: By name; a parameter is replaced by a view, which says where it is in the vector of all of them.
    :param shape: Of the result.
    :param edge: Where the result is in autograd's graph: what flows back through there is its gradient.
    :param versions: Of the arguments that are tensors, to tell whether they were changed in place since.
    :param computed: What the network has computed from parameters, by the names that views may have.
    """

    function: Callable
    rule: RegisteredRule
    arguments: dict[str, Any]
    shape: torch.Size
    edge: GradientEdge
    versions: list[tuple[Tensor, int]]
    computed: Mapping[str, Computed] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> list[ParameterView]:
        return [value for value in self.arguments.values() if isinstance(value, ParameterView)]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of these parameters, and of those that tensors in their place were computed from."""
        names = [view.name for view in self.parameters]
        leaves = [self.computed[name].leaves if name in self.computed else (name,) for name in names]
        return tuple(dict.fromkeys(name for each in leaves for name in each))

    @property
    def is_own(self) -> bool:
        """Whether the rule, and the maps by which computed tensors were made, came with the package."""
        pending, seen = [view.name for view in self.parameters], set()
        while pending:
            name = pending.pop()
            if name in seen or name not in self.computed:
                continue
            seen.add(name)
            if not is_own(self.computed[name].function):
                return False
            pending += self.computed[name].sources
        return self.rule.is_own

    def label(self, name: str) -> str:
        """What serves a parameter of these, for reports."""
        is_plain = any(view.name == name for view in self.parameters)
        return self.rule.name if is_plain else f"{self.rule.name} (computed)"

    @property
    def signature(self) -> tuple:
        """What must be the same in every recording for what was found out about one to hold for the others."""
        shapes = tuple((name, len(v.shape)) for name, v in self.tensors.items())
        return (self.rule.name, tuple(self.parameters), len(self.shape), shapes)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that may depend on the points."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def is_stale(self) -> bool:
        """Whether an argument was changed in place after the call."""
        return any(version_of(tensor) != version for tensor, version in self.versions)


@dataclass
class Recording:
    """All uses in one forward pass.

    :param output: f, (n, C).
    :param nodes: Of autograd's graph, all that f was computed by.
    :param unseen: The parameters that the output depends on in other ways too, in the order of the names asked for.
    :param shapes: Of what was computed from parameters alone, as :class:`.tracked.Tracker` has them.
    :param is_rounded: Whether a part of it was computed in another dtype.
    :param is_foreign: Whether a decomposition that is not this package's own took part.
    :param is_hooked: Whether the network looked at its graph, as it does to change what flows back.
    """

    uses: list[RecordedUse]
    output: Tensor
    nodes: list[Any]
    unseen: tuple[str, ...]
    shapes: tuple[tuple[torch.Size, ...] | None, ...] = ()
    is_rounded: bool = False
    is_foreign: bool = False
    is_hooked: bool = False

    @property
    def signature(self) -> tuple:
        return (tuple(use.signature for use in self.uses), self.unseen, self.shapes)

    def combined(self, cotangents: Tensor) -> list[Tensor]:
        """At every use, (*shape), the gradients of the sum of all outputs with these weights (n, C)."""
        edges = [use.edge for use in self.uses]
        found = torch.autograd.grad(self.output, edges, cotangents, retain_graph=True, allow_unused=True)
        return [self.output.new_zeros(use.shape) if g is None else g for g, use in zip(found, self.uses, strict=True)]

    def gradients(self) -> list[Tensor]:
        """g at every use: (C, *shape). Rows are independent, so that one pass for each output serves all points."""
        if not self.uses:
            return []
        n, outputs = self.output.shape
        identity = torch.eye(outputs, dtype=self.output.dtype, device=self.output.device)
        if not self.output.requires_grad:
            return [self.output.new_zeros(outputs, *use.shape) for use in self.uses]

        def pull(row: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.combined(row.expand(n, outputs)))

        if outputs > 1 and sum(use.shape.numel() for use in self.uses) <= _BATCHED_ELEMENTS:
            try:
                return list(torch.vmap(pull)(identity))
            except RuntimeError:  # an operator that vmap cannot differentiate
                pass
        columns = zip(*map(pull, identity), strict=True)
        return [torch.stack(column) if outputs > 1 else column[0].unsqueeze(0) for column in columns]


def record(
    function: NetworkFunction, x: Tensor, names: Sequence[str], spread: frozenset[int] | None = frozenset()
) -> Recording:
    """Runs the network at x (n, d), recording the uses of these parameters.

    :param spread: As in :class:`.tracked.Tracker`.
    """
    recording = _record(function, x, names, spread, copy=False)
    if any(use.is_stale() for use in recording.uses):
        recording = _record(function, x, names, spread, copy=True)
    return recording


def _record(
    function: NetworkFunction, x: Tensor, names: Sequence[str], spread: frozenset[int] | None, copy: bool
) -> Recording:
    leaves = {name: function.parameters[name].detach().contiguous().requires_grad_() for name in names}
    recorder = _Recorder(function, leaves, spread, copy)
    with torch.enable_grad():
        output = function({**function.parameters, **leaves}, x, recorder)
    nodes = list(nodes_below(output))
    reached = {id(node.variable) for node in nodes if node.name() == LEAF}
    unseen = tuple(name for name, leaf in leaves.items() if id(leaf) in reached)
    is_rounded = any(node.name() == "ToCopyBackward0" for node in nodes)
    return Recording(
        recorder.uses,
        output,
        nodes,
        unseen,
        tuple(recorder.tracker.shapes),
        is_rounded,
        recorder.is_foreign,
        recorder.is_hooked,
    )


@dataclass(frozen=True)
class _Known:
    """What becomes of the calls of a function.

    :param recorded_as: What is called in its place.
    :param rule: What takes note of those with a parameter among their arguments.
    :param decomposition: What such calls are replaced by, if they can be.
    """

    recorded_as: Callable
    rule: RegisteredRule | None = None
    decomposition: RegisteredDecomposition | None = None


class _Recorder(TorchFunctionMode):
    def __init__(
        self, function: NetworkFunction, leaves: Mapping[str, Tensor], spread: frozenset[int] | None, copy: bool
    ):
        super().__init__()
        self.uses: list[RecordedUse] = []
        self.copy = copy
        self.is_foreign = self.is_hooked = False
        starts = [0]
        for size in function.sizes:
            starts.append(starts[-1] + size)
        places = dict(zip(function.parameters, zip(function.group_indices, starts, strict=False), strict=True))
        constants = (*function.constants.values(), *function.parameters.values())
        whole = {name: (_whole(name, *places[name], leaf), leaf) for name, leaf in leaves.items()}
        self.tracker = Tracker(constants, whole, spread)
        self._known: dict[Callable, _Known] = {}  # by function, each looked up once in a recording

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.is_hooked |= function in _HOOKS
        if not torch.is_grad_enabled():
            return self._call(function, args, kwargs, self.tracker.knows(function, args, kwargs))
        known = self._look_up(function)
        rule, decomposition = known.rule, known.decomposition
        if decomposition is not None and any(map(self.tracker.view, (*args, *kwargs.values()))):
            with self:
                result = decomposition.replacement(*args, **kwargs)
            if result is not NotImplemented:
                self.is_foreign |= not decomposition.is_own
                return result
        if self.tracker.knows(function, args, kwargs):
            return self._call(function, args, kwargs, True)
        bound = None if rule is None else rule.bind(args, kwargs)
        if rule is None or bound is None:
            return known.recorded_as(*args, **kwargs)
        found = {name: self.tracker.view(bound.get(name)) for name in rule.parameters}
        views = {name: view for name, view in found.items() if view is not None}
        result = self._use(function, known.recorded_as, rule, bound, views) if views else None
        return known.recorded_as(*args, **kwargs) if result is None else result

    def _call(self, function: Callable, args: tuple, kwargs: dict[str, Any], is_known: bool) -> Any:
        """Makes a call that is no use of a parameter: either it has none, or nothing else."""
        result = function(*args, **kwargs)
        if is_known:
            self.tracker.add(function, args, kwargs, result)
        return result

    def _look_up(self, function: Callable) -> _Known:
        try:
            known = self._known.get(function)
        except TypeError:  # a callable that cannot be hashed, so nothing is registered for it
            return _Known(function)
        if known is None:
            known = self._known[function] = _Known(RECORDED_AS.get(function, function), *find(function))
        return known

    def _use(
        self,
        function: Callable,
        recorded_as: Callable,
        rule: RegisteredRule,
        bound: dict[str, Any],
        views: dict[str, ParameterView],
    ) -> Tensor | None:
        """Makes the call and notes it down.

        The parameters are cut off from autograd's graph in it, so that what flows back to a parameter came by a way
        that no rule saw. What is noted is where the *result* is in the graph. A result that has no place of its own
        there (it is an argument changed in place, or a view; or it was made of constants only, now that the parameters
        are) gets one by adding zero to it, and what flows back to that zero is the gradient.

        :param bound: The arguments by name.
        :param views: Those of them that are parameters.
        :return: The result, for the network to go on with; None where it is not one tensor of floating-point numbers,
            and the call has to be made again without being recorded.
        """
        for name in views:
            bound[name] = bound[name].detach()
        kept = {name: _kept(value, self.copy) for name, value in bound.items()}
        result = rule.call(recorded_as, bound)
        if not isinstance(result, Tensor) or not result.is_floating_point():
            return None
        in_place = any(result is value for value in bound.values())
        if in_place or is_view(result) or not result.requires_grad:
            perturbation = result.new_zeros(()).expand(result.shape).requires_grad_()
            edge = get_gradient_edge(perturbation)
            result = result.add_(perturbation) if in_place else result + perturbation
        else:
            edge = get_gradient_edge(result)
        arguments = {**kept, **views}
        versions = [(value, version_of(value)) for value in arguments.values() if isinstance(value, Tensor)]
        self.uses.append(RecordedUse(function, rule, arguments, result.shape, edge, versions, self.tracker.computed))
        return result


def _whole(name: str, group: int, start: int, leaf: Tensor) -> ParameterView:
    """All of a parameter, which begins there in the vector of all of them."""
    return ParameterView(name, group, start, tuple(leaf.shape), tuple(leaf.stride()))


def _kept(value: Any, copy: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if copy else value.detach()
