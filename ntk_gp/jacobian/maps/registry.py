"""What a map is, and the table of maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..rules.registry import changed
from ..terms import FeatureTerm, MatrixTerm, ParameterView, Term
from .computed import Computed, Operand


class UnsupportedMap(Exception):
    """Raised by a map for a call, or a term, that it has no formula for: whole rows are pulled back then."""


class ScaleTerm(FeatureTerm):
    """Features of numbers s that a matrix was scaled by: inner products of per-point gradients with the matrix.

    :param scale: s, (q,).
    :param features: F, (B, n, C, q).
    :param matrix: The matrix before it was scaled.
    :param multiples: The inner products of the block for the matrix with its rows are these times F.
    """

    def __init__(self, scale: ParameterView, features: Tensor, matrix: Operand, multiples: Tensor):
        super().__init__([scale], features)
        self.matrix = matrix
        self.multiples = multiples


@dataclass
class Pull:
    """A use of a computed tensor θ as a matrix, as a map sees it.

    :param term: The block for θ: a matrix, (H, d_out, d_in), without a bias.
    :param computed: θ.
    :param squared: Everything is squared, to tell the size of what is summed.
    """

    term: MatrixTerm
    computed: Computed
    squared: bool = False

    def value(self, operand: Operand | float) -> Tensor:
        """The numbers of an operand, or their squares."""
        value = operand.value if isinstance(operand, Operand) else self._number(operand)
        return value.square() if self.squared else value

    def _number(self, value: float) -> Tensor:
        return torch.as_tensor(value, dtype=self.computed.value.dtype, device=self.computed.value.device)

    def to(self, operand: Operand | Any, term: MatrixTerm | None = None) -> list[Term]:
        """The terms of an operand that has the elements of θ in the same order, for the terms of θ or for other ones.

        :param term: A block whose view is θ's own.
        """
        if not isinstance(operand, Operand) or operand.view is None:
            return []
        if operand.view.numel() != self.computed.size:
            raise UnsupportedMap("an operand is broadcast")
        term = self.term if term is None else term
        return [self.placed(term, term.weight, operand.view)]

    @staticmethod
    def placed(term: MatrixTerm, view: ParameterView, place: ParameterView) -> Term:
        """A block whose view is one of a tensor that is itself at some place."""
        moved = view.within(place)
        if moved is None:
            raise UnsupportedMap("an operand's elements are not evenly spaced")
        return term.moved(moved)

    def scale(self, operand: Operand | float, shape: Sequence[int]) -> str | None:
        """How a tensor scales θ: `"number"`, `"rows"`, or None where it does neither, as it is for θ's own shape.

        :param shape: Of θ.
        """
        if not isinstance(operand, Operand) or operand.value.numel() == 1:
            return "number"
        lead = len(shape) - operand.value.dim()
        has_rows = lead == 0 and operand.value.shape[0] == shape[0] == operand.value.numel()
        return "rows" if has_rows and self.term.weight.has_rows(shape[0], self.computed.size // shape[0]) else None


Map = Callable[..., list[Term]]

_MAPS: dict[Any, Map] = {}
_OWN: dict[Any, Map] = {}


def register_map(function: Callable, map: Map) -> None:
    """Teaches the structured engine how to pull the use of a matrix back through a function of parameters.

    :param function: The function that computes the matrix, e.g. `torch.add`.
    :param map: `map(pull, *args, **kwargs)` with the function's own arguments after a :class:`Pull`, and an
        :class:`Operand` in place of each tensor; it returns the terms of the operands. It may raise
        :class:`UnsupportedMap`.

    As with :func:`ntk_gp.register_rule`, kernels that exist use it from their next evaluation on, and at every capture
    Jᵀv is compared with autograd's, over all the inputs captured.
    """
    _MAPS[function] = map
    changed()


def mark_as_own() -> None:
    """Called once, when the package has registered all of its own."""
    _OWN.update(_MAPS)


def is_own(function: Any) -> bool:
    """Whether the map of a function, if there is one, came with the package, whose tests it has passed."""
    return find_map(function) is None or find_map(function) is _OWN.get(function)


def find_map(function: Any) -> Map | None:
    """What is registered for a function."""
    try:
        return _MAPS.get(function)
    except TypeError:  # a callable that cannot be hashed
        return None
