"""A parameter that is used in unlike ways, such as an embedding that is also the decoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import Tensor

from .base import Term
from .by_rows import RowsTerm
from .view import ParameterView


class CombinedTerm(RowsTerm):
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

    @property
    def shared_nbytes(self) -> int:
        return sum(term.shared_nbytes for term in self.uses)
