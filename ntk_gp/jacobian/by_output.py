"""The Jacobians of a network's outputs one by one, as batches, from one capture for all of them.

Rows [x, c] ask for output c (:mod:`ntk_gp.network.by_output`). A batch of such inputs usually has the same x in each of
C batches, and one c: one forward pass at x and C backward passes serve all, and what a layer was multiplied with is the
same for all outputs. Where each batch has inputs of its own, the function that picks the output is as good as any
other: one forward and one backward pass at all the points of all batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..network import FunctionByOutput, NetworkByOutput, NetworkFunction, normal_tensor
from .base import Jacobian, JacobianEngine
from .linearization import Linearization
from .structured import ChunkedJacobian, StructuredEngine, StructuredJacobian


class LinearizationByOutput(Linearization):
    """That of a network of one output for each row, (*batch, n, d + 1). What it keeps, it keeps with the base's.

    :param base: That of the network with all of its outputs.
    """

    network: NetworkByOutput  # type: ignore[assignment]

    def __init__(self, base: Linearization):
        self.base = base
        is_structured = isinstance(base.engine, StructuredEngine)
        network: Any = NetworkByOutput(base.network)
        super().__init__(network, "structured" if is_structured else "autodiff")
        if isinstance(base.engine, StructuredEngine) and isinstance(self.engine, StructuredEngine):
            self.engine = SharingEngine(base.engine, self.engine)

    def clear(self) -> None:
        """Goes back to what the base keeps."""
        self._cache, self._grams, self._solvers = self.base._cache, self.base._grams, self.base._solvers

    def keep(
        self, kind: str, tensors: tuple[Tensor, ...], compute: Callable[..., Any], network_state: int | None = None
    ) -> Any:
        return super().keep(f"{kind} by output", tensors, compute, network_state)

    def __deepcopy__(self, memo: dict) -> LinearizationByOutput:
        new = super().__deepcopy__(memo)
        assert isinstance(new, LinearizationByOutput)
        new.base = copy.deepcopy(self.base, memo)
        return new


class SharingEngine(JacobianEngine):
    """Captures all outputs together where batches have the same inputs, and else what each row asks for.

    :param together: Of the network with all of its outputs.
    :param separately: Of the network of one output for each row.
    """

    def __init__(self, together: StructuredEngine, separately: StructuredEngine):
        super().__init__(separately.network)
        self.together = together
        self.separately = separately

    def linearize(self, x: Tensor, function: NetworkFunction | None = None) -> Jacobian:
        """The Jacobian at rows (B, n, d + 1), (B, n, P). It is not differentiable with respect to them."""
        function = self.network.at(x) if function is None else function
        assert isinstance(function, FunctionByOutput)
        x = normal_tensor(x.detach())
        plan = _Sharing.of(x)
        all_outputs = None if plan is None else self.together.network.at(plan.points(x))
        if plan is None or all_outputs is None or not plan.pays(all_outputs.num_outputs):
            return self.separately.linearize(x, function)
        return self._by_output(self.together.linearize(plan.points(x), all_outputs), x, function, plan)

    def _by_output(self, jacobian: Jacobian, x: Tensor, function: FunctionByOutput, plan: _Sharing) -> Jacobian:
        if isinstance(jacobian, ChunkedJacobian):
            return self._chunked(jacobian, x, function, plan)
        assert isinstance(jacobian, StructuredJacobian)
        return self._held(jacobian, x, function, plan)

    def _held(
        self, jacobian: StructuredJacobian, x: Tensor, function: FunctionByOutput, plan: _Sharing
    ) -> StructuredJacobian:
        terms = []
        while jacobian.terms:  # nobody else's: only one term at a time exists twice
            terms.append(jacobian.terms.pop(0).by_output(plan.batches, plan.outputs))
        rest = None
        if jacobian.rest is not None:
            others = function.restrict(jacobian.rest.function.parameters)
            rest = self.separately.residual.linearize_function(others, x)
        return StructuredJacobian(function, x, terms, rest, jacobian.labels)

    def _chunked(
        self, jacobian: ChunkedJacobian, x: Tensor, function: FunctionByOutput, plan: _Sharing
    ) -> ChunkedJacobian:
        def capture(points: Tensor) -> StructuredJacobian:
            held = self.together.capture(jacobian.function, plan.points(points))
            return self._held(held, points, function, plan)

        return ChunkedJacobian(
            function,
            x,
            jacobian.size,
            capture=capture,
            linearize=partial(self.linearize, function=function),
            find_plan=lambda points: self.together.plan(jacobian.function, plan.points(points)),
        )


@dataclass
class _Sharing:
    """Which batches of rows [x, c] have the same x.

    :param first: Of each set of inputs, the first batch that has it, (u,).
    :param batches: Of each batch, which of these it has, (B,).
    :param outputs: Of each batch, c, (B,).
    """

    first: Tensor
    batches: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Sharing | None:
        """Of rows (B, n, d + 1); None where some batch has more than one c, or there is nothing to share."""
        numbers = x[..., -1]
        if len(x) < 2 or not x.shape[1] or not bool((numbers == numbers[:, :1]).all()):
            return None
        points = x[..., :-1]
        if torch.equal(points, points[:1].expand_as(points)):
            first, batches = [0], [0] * len(x)
        else:
            first, batches = _distinct(points)
        first_of_each, kinds = (torch.tensor(found, device=x.device) for found in (first, batches))
        return cls(first_of_each, kinds, numbers[:, 0].long())

    def points(self, x: Tensor) -> Tensor:
        """The inputs without those that are there already, (u, n, d)."""
        return x[self.first, :, :-1]

    def pays(self, outputs: int) -> bool:
        """Whether a forward and C backward passes at these are fewer than two passes for every batch."""
        return len(self.first) * (1 + outputs) <= 2 * len(self.batches)


def _distinct(points: Tensor) -> tuple[list[int], list[int]]:
    """The first of each kind of batch of (B, n, d), and of each batch its kind. Candidates are found by their ends."""
    ends = points[:, [0, -1]].cpu().numpy()
    first: list[int] = []
    batches = []
    by_ends: dict[bytes, list[int]] = {}
    for b in range(len(points)):
        alike = by_ends.setdefault(ends[b].tobytes(), [])
        kind = next((k for k in alike if torch.equal(points[first[k]], points[b])), None)
        if kind is None:
            kind = len(first)
            first.append(b)
            alike.append(kind)
        batches.append(kind)
    return first, batches
