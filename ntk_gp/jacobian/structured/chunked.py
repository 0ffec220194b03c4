"""Jacobians whose factors do not fit in the memory budget: captured again, chunk by chunk, for each operation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ... import memory
from ...network import NetworkFunction
from ..base import Jacobian
from .blocks import Block, add_products
from .held import StructuredJacobian
from .plan import Plan

# Blocks of a Gram matrix captured chunk by chunk have so many chunks' points on the left, which are captured once.
_HEIGHT = 2


class ChunkedJacobian(Jacobian):
    """J(X) whose factors do not fit in the memory budget: captured again, some points at a time, for every operation.

    :param size: How many points' factors may be held at once.
    :param capture: The Jacobian at some of the points, (B, m, d), with its factors.
    :param linearize: The same, or a chunked one where there are too many points for that.
    :param find_plan: What is known about the function by now: what captures and products cost.
    """

    def __init__(
        self,
        function: NetworkFunction,
        x: Tensor,
        size: int,
        *,
        capture: Callable[[Tensor], StructuredJacobian],
        linearize: Callable[[Tensor], Jacobian],
        find_plan: Callable[[Tensor], Plan],
    ):
        super().__init__(function, x)
        self.size = size
        self._capture = capture
        self._linearize = linearize
        self._find_plan = find_plan

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def plan(self) -> Plan:
        """What is known about the function."""
        return self._find_plan(self.x)

    def __getitem__(self, points: Tensor | slice) -> Jacobian:
        return self._linearize(self.x[:, points])

    def _chunks(self, size: int | None = None, start: int = 0) -> Iterator[tuple[slice, StructuredJacobian]]:
        """Slices of rows, from a point on, and the Jacobian there."""
        size, outputs = size or self.size, self.function.num_outputs
        for i in range(start, self.num_points, size):
            x = self.x[:, i : i + size]
            yield slice(i * outputs, (i + x.shape[1]) * outputs), self._capture(x)

    def chunks(self) -> Iterator[StructuredJacobian]:
        """The Jacobian at some of the points after the other."""
        return (chunk for _, chunk in self._chunks())

    def _vectors(self, count: int) -> Iterator[slice]:
        """Slices of as many vectors: products of few of them with one chunk take little memory."""
        size = self.vectors_per_block()
        for i in range(0, count, size):
            yield slice(i, min(count, i + size))

    def jvp(self, tangents: Tensor) -> Tensor:
        batch, r = max(self.x.shape[0], tangents.shape[0]), tangents.shape[1]
        out = tangents.new_empty(batch, r, self.num_rows)
        for rows, chunk in self._chunks():
            for vectors in self._vectors(r):
                out[:, vectors, rows] = chunk.jvp(tangents[:, vectors])
        return out

    def vjp(self, cotangents: Tensor) -> Tensor:
        batch, r = max(self.x.shape[0], cotangents.shape[0]), cotangents.shape[1]
        out = cotangents.new_zeros(batch, r, self.function.num_parameters)
        for rows, chunk in self._chunks():
            for vectors in self._vectors(r):
                out[:, vectors] += chunk.vjp(cotangents[:, vectors, rows])
        return out

    def rows(self) -> Tensor:
        return torch.cat([chunk.rows() for _, chunk in self._chunks()], dim=1)

    def diagonal(self, variances: Tensor) -> Tensor:
        return torch.cat([chunk.diagonal(variances) for _, chunk in self._chunks()], dim=-1)

    def cross_diagonal(self, other: Jacobian, variances: Tensor) -> Tensor:
        if not isinstance(other, ChunkedJacobian):
            return super().cross_diagonal(other, variances)
        half = max(1, min(self.size, other.size) // 2)
        pairs = zip(self._chunks(half), other._chunks(half), strict=True)
        return torch.cat([left.cross_diagonal(right, variances) for (_, left), (_, right) in pairs], dim=-1)

    @torch.no_grad()
    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        if not isinstance(other, (StructuredJacobian, ChunkedJacobian)):
            return other.gram(self, variances).mT
        out = variances.new_empty(self._results(other, variances), self.num_rows, other.num_rows)
        for rows, columns, block in self._blocks(other, variances):
            out[:, rows, columns] = block
            if other is self and rows != columns:
                out[:, columns, rows] = block.mT
        return out

    def kernel_matmul(self, other: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (rhs.requires_grad or variances.requires_grad)
        if needs_gradient or not isinstance(other, (StructuredJacobian, ChunkedJacobian)):
            return super().kernel_matmul(other, rhs, variances)
        r = rhs.shape[-1]
        passes = math.ceil(r / self.vectors_per_block(other))
        if self._columns_cost(other, r, passes) <= self.gram_cost(other):
            return super().kernel_matmul(other, rhs, variances)
        with torch.no_grad():
            return self._blockwise_matmul(other, rhs, variances)

    def _blockwise_matmul(self, other: StructuredJacobian | ChunkedJacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        out = rhs.new_zeros(self._results(other, rhs, variances), self.num_rows, rhs.shape[-1])
        return add_products(out, self._blocks(other, variances), rhs, symmetric=other is self)

    def _blocks(self, other: StructuredJacobian | ChunkedJacobian, variances: Tensor) -> Iterator[Block]:
        """Slices of rows and columns, and the block of the Gram matrix there; of the upper triangle if it is symmetric.

        The factors of both sides are held, and one block.
        """
        height, width = self._block_points(self._results(other, variances))
        for rows, left in self._chunks(height):
            if other is self:
                yield from _triangle(left, rows.start, width, variances)
                others = self._chunks(width, start=rows.stop // self.function.num_outputs)
            else:
                others = _parts(other, width)
            for columns, right in others:
                yield rows, columns, left.gram(right, variances)
            del left  # before the next is captured

    def _block_points(self, results: int = 1) -> tuple[int, int]:
        """The points on the left and on the right of a block of the Gram matrix: it takes an eighth of the budget."""
        pair_bytes = results * self.function.num_outputs**2 * self.x.element_size()
        pairs = memory.GRAM_BLOCK.bytes(self.x.device) // pair_bytes
        width = max(1, min(self.size, math.isqrt(pairs)))
        return max(1, min(_HEIGHT * self.size, pairs // width)), width

    def gram_cost(self, other: Jacobian) -> float:
        """With the captures: every block of rows meets every block of columns."""
        plan, (height, width) = self.plan, self._block_points()
        pairs = self.x.shape[0] * self.num_points * other.num_points * (0.5 if other is self else 1.0)
        captured = self.x.shape[0] * self.num_points + pairs / height
        formed = self.x.shape[0] * self.num_points + pairs * (1 / height + 1 / width)
        return pairs * plan.gram_flops + captured * plan.capture_flops + formed * plan.gradient_flops

    def product_cost(self, other: Jacobian) -> float:
        return min(self._columns_cost(other, 1, 1), self.gram_cost(other))

    def _columns_cost(self, other: Jacobian, r: int, passes: int) -> float:
        """About how many flops r products Jᵀ v and J u take, the points being captured `passes` times for each."""
        points = self.x.shape[0] * (self.num_points + other.num_points)
        return points * (r * self.plan.product_flops + passes * self.plan.capture_flops)

    def report(self) -> list[dict]:
        """As :meth:`StructuredJacobian.report`, for all points."""
        _, chunk = next(self._chunks())
        scale = self.num_points / chunk.num_points
        return [{**entry, "bytes": int(scale * entry["bytes"])} for entry in chunk.report()]


def _triangle(jacobian: StructuredJacobian, start: int, size: int, variances: Tensor) -> Iterator[Block]:
    """Blocks of the upper triangle of a Gram matrix, which is itself a block whose first row is `start`."""
    for columns, part in _parts(jacobian, size):
        here = slice(start + columns.start, start + columns.stop)
        yield here, here, part.gram(part, variances)
        if columns.start:
            above = jacobian[slice(0, columns.start // jacobian.function.num_outputs)]
            yield slice(start, here.start), here, above.gram(part, variances)


def _parts(jacobian: StructuredJacobian | ChunkedJacobian, size: int) -> Iterator[tuple[slice, StructuredJacobian]]:
    """Slices of rows, and the Jacobian there."""
    if isinstance(jacobian, ChunkedJacobian):
        yield from jacobian._chunks(size)
        return
    outputs = jacobian.function.num_outputs
    for i in range(0, jacobian.num_points, size):
        part = jacobian[slice(i, i + size)]
        yield slice(i * outputs, i * outputs + part.num_rows), part
