"""Parameters whose per-point gradients are kept as they are: biases, scales, raw parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from ...replacements.onednn import matmul
from .base import Term, inner
from .view import ParameterView


class FeatureTerm(Term):
    """Jacobian columns stored densely.

    :param views: The parameters, one after the other in the columns.
    :param features: (B, n, C, p), p the number of elements of all of them.
    """

    tensors: tuple[str, ...] = ("features",)
    of_each_output = tensors

    def __init__(self, views: Sequence[ParameterView], features: Tensor):
        self._views = tuple(views)
        self.features = features

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return self._views

    @property
    def gradients(self) -> Tensor:  # type: ignore[override]
        return self.features

    @property
    def sizes(self) -> list[int]:
        return [math.prod(view.shape) for view in self._views]

    def is_whole(self, num_parameters: int) -> bool:
        """Whether the columns are all P parameters, in their order."""
        end = 0
        for view in self._views:
            if view.offset != end or not view.is_contiguous:
                return False
            end += view.numel()
        return end == num_parameters

    def read(self, tangents: Tensor) -> Tensor:
        """(..., P) to (..., p)."""
        lead = tangents.shape[:-1]
        return torch.cat([view.read(tangents).reshape(*lead, view.numel()) for view in self._views], dim=-1)

    def check(self, n: int, outputs: int) -> None:
        self._expect(features=(self.features.shape[1:], (n, outputs, sum(self.sizes))))

    def add_to(self, flat: Tensor, columns: Tensor) -> None:
        for view, part in zip(self._views, columns.split(self.sizes, dim=-1), strict=True):
            view.add_to(flat, part)

    def column_variances(self, variances: Tensor) -> Tensor:
        """(L, G) to (L, p)."""
        parts = [variances[:, view.group, None].expand(-1, math.prod(view.shape)) for view in self._views]
        return torch.cat(parts, dim=-1)

    def jvp(self, tangents: Tensor) -> Tensor:
        columns = matmul(self.features.flatten(1, 2), self.read(tangents).mT)  # (B, n·C, r)
        return columns.mT.unflatten(-1, self.features.shape[1:3])

    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        self.add_to(out, matmul(cotangents.flatten(2), self.features.flatten(1, 2)))

    def add_rows(self, out: Tensor) -> None:
        self.add_to(out, self.features)

    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        assert isinstance(other, FeatureTerm)
        groups = {view.group for view in self._views}
        if len(groups) == 1:
            return inner(self.features, other.features) * variances[:, groups.pop(), None, None]
        return inner(self.features * self.column_variances(variances)[:, None, None], other.features)

    def columns(self, max_columns: int, variances: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        flat, scale = self.features.flatten(1, 2), self.column_variances(variances)
        yield from zip(flat.split(max_columns, dim=-1), scale.split(max_columns, dim=-1), strict=True)

    def block(self, points: slice, variances: Tensor | None = None) -> Tensor:
        """All columns at some points, output-major: (B, C·m, p)."""
        block = self.features[:, points].transpose(1, 2).flatten(1, 2)
        return block if variances is None else block * self.column_variances(variances).unsqueeze(-2)

    def gram_cost(self) -> float:
        return 2.0 * self.features.shape[2] ** 2 * self.features.shape[3]

    def gradient_cost(self) -> float:
        return 0.0

    def product_cost(self) -> float:
        return 2.0 * self.features.shape[2] * self.features.shape[3]

    def merge(self, others: Sequence[Term]) -> FeatureTerm:
        """Other uses of the same parameters add to the gradients."""
        return FeatureTerm(self._views, reduce(torch.add, [term.gradients for term in (self, *others)]))

    def relocate(self, shifts: Mapping[str, int]) -> FeatureTerm:
        return FeatureTerm([view.shift(shifts[view.name]) for view in self._views], self.features)

    @staticmethod
    def join(terms: Sequence[FeatureTerm]) -> FeatureTerm:
        """Different parameters' columns beside one another."""
        if len(terms) == 1:
            return terms[0]
        views = [view for term in terms for view in term.views]
        return FeatureTerm(views, torch.cat([term.features for term in terms], dim=-1))
