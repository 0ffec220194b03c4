"""Embeddings: a matrix of parameters multiplied by one-hot inputs, of which only the index is kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .base import Term, once, split_points
from .matrix import weigh_outputs
from .view import ParameterView


class OneHotTerm(Term):
    """Row (i, c) of the Jacobian has Σ_t over positions with index v of g_ict, in row v of the embedding.

    :param weight: The embedding, (V, d).
    :param indices: (B, n, T), integers from 0 to V - 1.
    :param gradients: g, (B, n, C, T, d).
    """

    tensors: tuple[str, ...] = ("indices", "gradients")
    of_each_output = ("gradients",)

    def __init__(self, weight: ParameterView, indices: Tensor, gradients: Tensor):
        self.weight = weight
        self.indices = indices
        self.gradients = gradients

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return (self.weight,)

    def check(self, n: int, outputs: int) -> None:
        positions = self.indices.shape[2]
        self._expect(
            indices=(self.indices.shape[1:], (n, positions)),
            gradients=(self.gradients.shape[1:], (n, outputs, positions, self.weight.shape[1])),
        )

    def jvp(self, tangents: Tensor) -> Tensor:
        table = self.weight.read(tangents)  # (B or 1, r, V, d)
        batch, *shape = self.indices.shape
        picked = torch.stack(
            [table[b % table.shape[0]][:, self.indices[b].flatten()].unflatten(1, shape) for b in range(batch)]
        )  # (B, r, n, T, d)
        return torch.einsum("brntd,bnctd->brnc", picked, self.gradients)

    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        values = weigh_outputs(cotangents, self.gradients).flatten(2, 3)  # (B, r, n·T, d)
        self.weight.add_to(out, self._scatter(values, self.indices.flatten(1)))

    def _scatter(self, values: Tensor, indices: Tensor) -> Tensor:
        """Sums (N, k, m, d) by index (N, m) into (N, k, V, d')."""
        table = values.new_zeros(*values.shape[:2], self.weight.shape[0], values.shape[-1])
        return table.scatter_add(2, indices[:, None, :, None].expand_as(values), values)

    def gradient_rows(self, points: slice, features: slice = slice(None)) -> Tensor:
        """(B, m, C, V, d), for some of the d features."""
        g = self.gradients[:, points, ..., features]
        rows = self._scatter(g.flatten(0, 1), self.indices[:, points].flatten(0, 1))
        return rows.unflatten(0, g.shape[:2])

    def add_rows(self, out: Tensor) -> None:
        self.weight.add_to(out, self.gradient_rows(slice(None)))

    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        assert isinstance(other, OneHotTerm)
        batch, n, outputs, positions, _ = self.gradients.shape
        pieces = []
        for points in split_points(n, batch * outputs * positions**2, variances.device):
            equal = self.indices[:, points, None, :, None] == other.indices[:, points, None, None, :]
            g = self.gradients[:, points] @ other.gradients[:, points].mT
            pieces.append((g * equal).sum((-1, -2)))
        return torch.cat(pieces, dim=1) * variances[:, self.weight.group, None, None]

    @property
    def num_products(self) -> int:
        positions, d = self.gradients.shape[-2:]
        return positions if positions**2 * (d + 1) <= self.weight.shape[0] * d or positions == 1 else 0

    def pairs(self) -> Iterator[tuple[int, int]]:
        for t in range(self.num_products):
            for s in range(self.num_products):
                yield t, s

    def factors(self, points: slice, variances: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        g = self.gradients[:, points]
        return [
            (self._input_factor(k, points, variances), g[:, :, :, k].transpose(1, 2).flatten(1, 2))
            for k in range(self.num_products)
        ]

    def _input_factor(self, k: int, points: slice, variances: Tensor | None) -> Tensor:
        """The indices, (B, m, 1); on the left with the variance beside them, (B, m, 2)."""
        indices = once(self.indices)[:, points, k, None]
        if variances is None:
            return indices
        scale = variances[:, None, None, self.weight.group].expand(
            max(len(variances), len(indices)), indices.shape[1], 1
        )
        return torch.cat([indices.to(scale.dtype).expand_as(scale), scale], dim=-1)

    def input_product(self, left: Tensor, right: Tensor) -> Tensor:
        return (left[..., :1] == right.mT) * left[..., 1:]

    def columns(self, max_columns: int, variances: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(1, max_columns // self.weight.shape[0])
        for start in range(0, self.weight.shape[1], step):
            rows = self.gradient_rows(slice(None), slice(start, start + step)).flatten(3).flatten(1, 2)
            yield rows, variances[:, self.weight.group, None]

    def gram_cost(self) -> float:
        outputs, positions, d = self.gradients.shape[2:]
        if not self.num_products:
            return 2.0 * outputs**2 * self.weight.numel()
        return 2.0 * positions**2 * (4 + outputs**2 * (d + 8))

    def product_cost(self) -> float:
        outputs, positions, d = self.gradients.shape[2:]
        return 4.0 * positions * d * (1 + outputs)

    def merge(self, others: Sequence[Term]) -> OneHotTerm:
        """Other uses of the same embedding are more positions."""
        new = copy.copy(self)
        for name, dim in (("indices", 2), ("gradients", 3)):
            setattr(new, name, torch.cat([getattr(term, name) for term in (self, *others)], dim=dim))
        return new
