"""Recording a network's uses of its parameters: what each was multiplied with, and the gradients at its result.

One forward pass runs under a mode that sees every function call. A call with a selected parameter in it, for which
there is a rule, is made with that parameter *detached*: one backward pass for each output then gives the gradients at
every use's result. Whatever still depends on a parameter afterwards is a use that no rule has seen, and shows in the
graph that autograd has recorded: that parameter is left to autodiff.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ...network import NetworkFunction
from ..layers import replacement
from ..rules import UnsupportedUse, Use, find_decomposition, find_rule
from ..rules.registry import RegisteredRule
from ..terms import ParameterView, Term
from .recorded_layers import RECORDED_AS

# Below this many elements at all the uses together, outputs are differentiated side by side instead of one by one.
_BATCHED_ELEMENTS = 1 << 20


@dataclass
class RecordedUse:
    """One call: its rule, its arguments (parameters replaced by views), its result's shape, and where the result is in
    autograd's graph."""

    rule: RegisteredRule
    arguments: dict[str, Any]
    shape: torch.Size
    edge: GradientEdge
    versions: list[tuple[Tensor, int]]

    @property
    def parameters(self) -> list[ParameterView]:
        return [value for value in self.arguments.values() if isinstance(value, ParameterView)]

    @property
    def signature(self) -> tuple:
        """What must be the same in every recording for what was found out about one to hold for the others."""
        shapes = tuple((name, len(v.shape)) for name, v in self.tensors().items())
        return (self.rule.name, tuple(self.parameters), len(self.shape), shapes)

    def tensors(self) -> dict[str, Tensor]:
        """The arguments that may depend on the points."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def is_stale(self) -> bool:
        """Whether an argument was changed in place after the call."""
        return any(tensor._version != version for tensor, version in self.versions)


@dataclass
class Recording:
    """All uses in one forward pass.

    :param output: f, (n, C).
    :param unseen: The parameters that the output depends on in other ways too.
    """

    uses: list[RecordedUse]
    output: Tensor
    unseen: frozenset[str]

    @property
    def signature(self) -> tuple:
        return (tuple(use.signature for use in self.uses), self.unseen)

    def gradients(self) -> list[Tensor]:
        """g at every use: (C, *shape). Rows are independent, so that one pass for each output serves all points."""
        if not self.uses:
            return []
        n, outputs = self.output.shape
        edges = [use.edge for use in self.uses]
        identity = torch.eye(outputs, dtype=self.output.dtype, device=self.output.device)
        if not self.output.requires_grad:
            return [self.output.new_zeros(outputs, *use.shape) for use in self.uses]

        def pull(row: Tensor) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(
                self.output, edges, row.expand(n, outputs), retain_graph=True, allow_unused=True
            )
            return tuple(
                self.output.new_zeros(use.shape) if g is None else g for g, use in zip(found, self.uses, strict=True)
            )

        if outputs > 1 and sum(use.shape.numel() for use in self.uses) <= _BATCHED_ELEMENTS:
            try:
                return list(torch.vmap(pull)(identity))
            except RuntimeError:  # an operator that vmap cannot differentiate
                pass
        columns = zip(*map(pull, identity), strict=True)
        return [torch.stack(column) if outputs > 1 else column[0].unsqueeze(0) for column in columns]


def record(function: NetworkFunction, x: Tensor, names: Sequence[str]) -> Recording:
    """Runs the network at x (n, d), recording the uses of these parameters."""
    recording = _record(function, x, names, copy=False)
    if any(use.is_stale() for use in recording.uses):
        recording = _record(function, x, names, copy=True)
    return recording


def _record(function: NetworkFunction, x: Tensor, names: Sequence[str], copy: bool) -> Recording:
    leaves = {name: function.parameters[name].detach().contiguous().requires_grad_() for name in names}
    recorder = _Recorder(function, leaves, copy)
    with torch.enable_grad(), recorder:
        output = function({**function.parameters, **leaves}, x)
    reached = _leaves_below(output)
    unseen = frozenset(name for name, leaf in leaves.items() if id(leaf) in reached)
    return Recording(recorder.uses, output, unseen)


class _Recorder(TorchFunctionMode):
    def __init__(self, function: NetworkFunction, leaves: Mapping[str, Tensor], copy: bool):
        super().__init__()
        self.uses: list[RecordedUse] = []
        self.copy = copy
        starts = [0]
        for size in function.sizes:
            starts.append(starts[-1] + size)
        places = dict(zip(function.parameters, zip(function.group_indices, starts, strict=False), strict=True))
        self.leaves = {id(leaf): (name, *places[name], leaf) for name, leaf in leaves.items()}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        decomposition = find_decomposition(function)
        if decomposition is not None and any(self.view(value) is not None for value in (*args, *kwargs.values())):
            with self:
                result = decomposition(*args, **kwargs)
            if result is not NotImplemented:
                return result
        rule = find_rule(function)
        bound = None if rule is None else rule.bind(args, kwargs)
        if rule is None or bound is None:
            return _call(function, *args, **kwargs)
        found = {name: self.view(bound.arguments.get(name)) for name in rule.parameters}
        views = {name: view for name, view in found.items() if view is not None}
        if not views:
            return _call(function, *args, **kwargs)
        return self._use(function, rule, bound, views)

    def _use(self, function: Callable, rule: RegisteredRule, bound: Any, views: dict[str, ParameterView]) -> Any:
        for name in views:
            bound.arguments[name] = bound.arguments[name].detach()
        kept = {name: _kept(value, self.copy) for name, value in bound.arguments.items()}
        result = _call(function, *bound.args, **bound.kwargs)
        in_place = any(result is value for value in bound.arguments.values())
        if in_place or result._is_view() or not result.requires_grad:  # the graph has no place for it alone yet
            perturbation = result.new_zeros(()).expand(result.shape).requires_grad_()
            edge = get_gradient_edge(perturbation)
            result = result.add_(perturbation) if in_place else result + perturbation
        else:
            edge = get_gradient_edge(result)
        arguments = {**kept, **views}
        versions = [(value, value._version) for value in arguments.values() if isinstance(value, Tensor)]
        self.uses.append(RecordedUse(rule, arguments, result.shape, edge, versions))
        return result

    def view(self, value: Any) -> ParameterView | None:
        """The parameter, or the part of one, that a tensor is; None if it is anything else."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        leaf = value if value._base is None else value._base
        if id(leaf) not in self.leaves:
            return None
        name, group, start, parameter = self.leaves[id(leaf)]
        if value.dtype != parameter.dtype or value.is_conj() or value.is_neg() or not _is_plain_view(value):
            return None
        offset = start + int(value.storage_offset()) - int(parameter.storage_offset())
        view = ParameterView(name, group, offset, tuple(value.shape), tuple(value.stride()))
        return None if view.overlaps_itself else view


def _call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return replacement(function, RECORDED_AS)(*args, **kwargs)


def _kept(value: Any, copy: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if copy else value.detach()


def _is_plain_view(value: Tensor) -> bool:
    """Whether autograd takes the tensor for a view of its base, not for the result of a custom function."""
    node = value.grad_fn
    while node is not None:
        if isinstance(node, torch.autograd.function.BackwardCFunction) or len(node.next_functions) > 1:
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return True


def _leaves_below(output: Tensor) -> set[int]:
    """The ids of all the leaves that a tensor was computed from."""
    leaves: set[int] = set()
    seen: set[Any] = set()
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        pending.extend(child for child, _ in node.next_functions)
    return leaves


Place = tuple[int, bool]  # the dimension that runs over the points, and whether it runs over positions too


@dataclass
class Layout:
    """Where the points are in every use: found by recording at two numbers of points and seeing which sizes follow.

    :param results: The place of the points in each use's result.
    :param arguments: Their place in each use's tensor arguments, None where an argument does not depend on them.
    """

    results: list[Place | None]
    arguments: list[dict[str, Place | None]]

    @classmethod
    def compare(cls, first: Recording, second: Recording) -> Layout:
        n, m = first.output.shape[0], second.output.shape[0]
        results, arguments = [], []
        for use, other in zip(first.uses, second.uses, strict=True):
            results.append(_place(use.shape, other.shape, n, m))
            others = other.tensors()
            arguments.append({k: _place(v.shape, others[k].shape, n, m) for k, v in use.tensors().items()})
        return cls(results, arguments)


def _place(shape: torch.Size, other: torch.Size, n: int, m: int) -> Place | None:
    changed = [dim for dim, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
    if len(changed) != 1 or shape[changed[0]] * m != other[changed[0]] * n:
        return None
    return changed[0], shape[changed[0]] != n


def use_terms(
    use: RecordedUse, gradients: Tensor, n: int, place: Place | None, layout: Mapping[str, Place | None]
) -> list[Term]:
    """The terms of one use at n points, (1, n, …) each. Raises UnsupportedUse where its rule has no formula."""
    if place is None:
        raise UnsupportedUse("the result does not depend on the points one by one")
    arguments = dict(use.arguments)
    for name, value in use.tensors().items():
        if use.rule.elementwise:
            arguments[name] = points_first(value.expand(use.shape), place, n)
        elif layout[name] is not None:
            arguments[name] = points_first(value, layout[name], n)
    dim, split = place
    g = points_first(gradients, (dim + 1, split), n)
    g = g.movedim(1 + split, 1)  # (n, C, positions from the split, …)
    bound = use.rule.signature.bind_partial()
    bound.arguments.update(arguments)
    return list(use.rule.rule(Use(g, dim, len(use.shape), split), *bound.args, **bound.kwargs))


def points_first(tensor: Tensor, place: Place | None, n: int) -> Tensor:
    """A tensor at n points, (n, …)."""
    assert place is not None
    dim, split = place
    tensor = tensor.movedim(dim, 0)
    return tensor.unflatten(0, (n, -1)) if split else tensor


def parameter_names(uses: Sequence[RecordedUse]) -> Iterator[str]:
    for use in uses:
        for view in use.parameters:
            yield view.name
