"""A parameter that is used in unlike ways, such as an embedding that is also the decoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ... import memory
from .base import Term
from .view import ParameterView


class CombinedTerm(Term):
    """The sum of several uses, with the cross terms between them: Gram matrices by per-point gradients.

    :param uses: Terms that have parameters in common.
    """

    def __init__(self, uses: Sequence[Term]):
        self.uses = list(uses)

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return tuple(dict.fromkeys(view for term in self.uses for view in term.views))

    @property
    def gradients(self) -> Tensor:  # type: ignore[override]
        return self.uses[0].gradients

    def key(self) -> Hashable:
        return ("combined", tuple(term.key() for term in self.uses))

    def jvp(self, tangents: Tensor) -> Tensor:
        total = self.uses[0].jvp(tangents)
        for term in self.uses[1:]:
            total = total + term.jvp(tangents)
        return total

    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        for term in self.uses:
            term.vjp(cotangents, out)

    def add_rows(self, out: Tensor) -> None:
        for term in self.uses:
            term.add_rows(out)

    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        assert isinstance(other, CombinedTerm)
        scale = self._scale(variances)
        pieces = []
        for points in self._slices():
            left = self._rows(points)
            right = left if other is self else other._rows(points)
            pieces.append((left * right * scale[:, None, None]).sum(-1))
        return torch.cat(pieces, dim=1)

    def columns(self, max_columns: int, variances: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some columns of J at a time, at all the points.

        A use cannot compute a few of its columns alone, only whole rows. Where whole rows at all the points fit in
        memory they are formed once and cut. Where they do not, they are formed some points at a time, once for each
        block of columns, and only the block is kept: time instead of memory.
        """
        scale, slices = self._scale(variances), list(self._slices())
        if len(slices) == 1:
            rows = self._rows(slice(None)).flatten(1, 2)
            yield from zip(rows.split(max_columns, dim=-1), scale.split(max_columns, dim=-1), strict=True)
            return
        for part in torch.arange(scale.shape[-1], device="cpu").split(max_columns):
            columns = slice(int(part[0]), int(part[-1]) + 1)
            block = self.gradients.new_empty(*self.gradients.shape[:3], len(part))
            for points in slices:
                block[:, points] = self._rows(points)[..., columns]
            yield block.flatten(1, 2), scale[:, columns]

    def _slices(self) -> Iterator[slice]:
        """Slices of points whose whole rows take a sixteenth of the memory budget."""
        batch, n, outputs = self.gradients.shape[:3]
        row_bytes = batch * outputs * self._compact()[1] * self.gradients.element_size()
        size = max(1, memory.WHOLE_ROWS.bytes(self.gradients.device) // row_bytes)
        for start in range(0, n, size):
            yield slice(start, min(n, start + size))

    def _rows(self, points: slice) -> Tensor:
        """The rows of J at some points without the columns of other parameters, (B, m, C, p)."""
        shifts, size = self._compact()
        some = self.map(lambda tensor: tensor[:, points]).relocate(shifts)
        rows = some.gradients.new_zeros(*some.gradients.shape[:3], size)
        some.add_rows(rows)
        return rows

    def _scale(self, variances: Tensor) -> Tensor:
        """The prior variance of each of these columns, (L, p)."""
        shifts, size = self._compact()
        scale = variances.new_zeros(variances.shape[0], size)
        for view in self.views:
            target = view.shift(shifts[view.name]).read(scale)
            target.copy_(variances[:, view.group].reshape(-1, *[1] * view.ndim).expand_as(target))
        return scale

    def _compact(self) -> tuple[dict[str, int], int]:
        """How far to move each parameter for the parameters of this term to follow one another."""
        shifts: dict[str, int] = {}
        size = 0
        for name in dict.fromkeys(view.name for view in self.views):
            views = [view for view in self.views if view.name == name]
            start, end = min(view.offset for view in views), max(view.end for view in views)
            shifts[name] = size - start
            size += end - start
        return shifts, size

    def gram_cost(self) -> float:
        return 2.0 * self.gradients.shape[2] ** 2 * self._compact()[1]

    def product_cost(self) -> float:
        return sum(term.product_cost() for term in self.uses)

    def map(self, function: Callable[[Tensor], Tensor]) -> CombinedTerm:
        return CombinedTerm([term.map(function) for term in self.uses])

    def by_output(self, batches: Tensor, outputs: Tensor) -> CombinedTerm:
        return CombinedTerm([term.by_output(batches, outputs) for term in self.uses])

    def concatenate(self, others: Sequence[CombinedTerm]) -> CombinedTerm:
        return CombinedTerm([term.concatenate([other.uses[i] for other in others]) for i, term in enumerate(self.uses)])

    def relocate(self, shifts: Mapping[str, int]) -> CombinedTerm:
        return CombinedTerm([term.relocate(shifts) for term in self.uses])

    @property
    def nbytes(self) -> int:
        return sum(term.nbytes for term in self.uses)


def merge_terms(terms: Sequence[Term]) -> list[Term]:
    """Terms without cross terms between them: the uses of a parameter that several terms share become one term.

    Uses of one kind become more positions of one use. Unlike ones (an embedding that is also a decoder) are combined.
    """
    names = [view.name for term in terms for view in term.views]
    if len(set(names)) == len(names):
        return list(terms)
    merged: list[Term] = []
    for cluster in _clusters(terms):
        first, *others = cluster
        alike = all(term.key() == first.key() for term in others)
        joined = first.merge(others) if others and alike else None
        if joined is None:
            joined = CombinedTerm(cluster) if others else first
        merged.append(joined)
    return merged


def _clusters(terms: Sequence[Term]) -> list[list[Term]]:
    clusters: list[list[Term]] = []
    for term in terms:
        touching = [cluster for cluster in clusters if any(_meet(term, member) for member in cluster)]
        joined = [member for cluster in touching for member in cluster] + [term]
        clusters = [cluster for cluster in clusters if cluster not in touching] + [joined]
    return clusters


def _meet(term: Term, other: Term) -> bool:
    return any(view.meets(view2) for view in term.views for view2 in other.views)
