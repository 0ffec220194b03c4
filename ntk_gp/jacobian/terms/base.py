r"""The interface of a term: the block of the Jacobian that belongs to some parameters, kept as factors.

Notation: B batches of n points, C outputs, r vectors, P parameters in G groups; a use of a parameter has T positions
(sequence elements, pixels). Variances are (L, G) with L = 1 or B: prior variances, one for each group.

A Gram matrix is the sum over terms. A term takes part in it in one of two ways, whichever costs it less:

* *factored*: as products of two Gram matrices, :math:`K = \sum_k (A_k A_k'^T) \circ (G_k G_k'^T)`, tile by tile;
* by *columns*: its per-point gradients, some columns at a time.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ... import memory
from ...replacements.onednn import matmul
from .view import ParameterView

Self = TypeVar("Self", bound="Term")


# Elements of one intermediate result: it stays in a core's cache, and the calls are still long enough to be efficient.
_CACHE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


class Term(ABC):
    """A block of Jacobian columns whose cross terms with every other block's parameters vanish.

    `tensors` names the attributes that are per point, (B, n, …); everything else is shared by the points.
    """

    tensors: tuple[str, ...] = ()
    of_each_output: tuple[str, ...] = ()  # those of them that are (B, n, C, …)
    gradients: Tensor  # (B, n, C, …)

    @property
    @abstractmethod
    def views(self) -> tuple[ParameterView, ...]:
        """The parameters, or parts of them."""

    def key(self) -> Hashable:
        """Equal for the same block of two Jacobians."""
        return (type(self).__name__, self.views)

    def check(self, n: int, outputs: int) -> None:
        """Raises ValueError where the shapes are not those of a term at n points: rules may be wrong."""
        self._expect(gradients=(self.gradients.shape[1:3], (n, outputs)))

    def _expect(self, **sizes: tuple[Sequence[int], Sequence[int]]) -> None:
        """Raises ValueError where sizes, given by the names of what has them, are not those that are expected."""
        for name, (actual, expected) in sizes.items():
            if tuple(actual) != tuple(expected):
                raise ValueError(
                    f"{type(self).__name__}: {name} have sizes {tuple(actual)}, expected {tuple(expected)}"
                )

    @abstractmethod
    def jvp(self, tangents: Tensor) -> Tensor:
        """J u: (B or 1, r, P) to (B, r, n, C)."""

    @abstractmethod
    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        """Adds Jᵀ v, for `cotangents` (B, r, n, C), to `out` (B, r, P)."""

    @abstractmethod
    def add_rows(self, out: Tensor) -> None:
        """Adds the rows of J to `out` (B, n, C, P)."""

    @abstractmethod
    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        """The inner products of each row with the same row of `other`: (B or L, n, C)."""

    # Gram, factored

    @property
    def num_products(self) -> int:
        """How many factor pairs k there are; 0 where the term takes part by columns."""
        return 0

    def factors(self, points: slice, variances: Tensor | None = None) -> list[tuple[Tensor | None, Tensor]]:
        """All pairs (A_k, G_k) at some points: A_k, (B, m, d), and G_k output-major, (B, C·m, d').

        Without an A_k, the pair is G_k G_k'ᵀ alone.

        :param variances: Prior variances, (L, G), that the columns of A_k are multiplied by.
        """
        raise NotImplementedError

    def input_product(self, left: Tensor, right: Tensor) -> Tensor:
        """The Gram matrix of two input factors: (B, m, m')."""
        return matmul(left, right.mT)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Which A_k meet which A_l'."""
        raise NotImplementedError

    # Gram, by columns

    @abstractmethod
    def columns(self, max_columns: int, variances: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Per-point gradients, (B, n·C, at most about max_columns), and the prior variance of each column, (L, …)."""

    # Costs

    @abstractmethod
    def gram_cost(self) -> float:
        """About how many flops one pair of points costs in a Gram matrix (all C² entries of it)."""

    def gradient_cost(self) -> float:
        """About how many flops it takes to form one point's gradients, of all C outputs."""
        return self.gradients.shape[2] * self.product_cost()

    @abstractmethod
    def product_cost(self) -> float:
        """About how many flops one point costs in J u, or in Jᵀ v, for one vector."""

    def compact(self) -> Term:
        """The same block in the form that products are quickest with: this term, or another one in its place."""
        return self

    # Points

    def map(self: Self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same term with every per-point tensor replaced."""
        new = copy.copy(self)
        for name in self.tensors:
            setattr(new, name, function(getattr(self, name)))
        return new

    def in_batches(self: Self, batch: int, n: int) -> Self:
        """Of a term at B·n points, (1, B·n, …), the points in batches, (B, n, …)."""
        return self.map(lambda tensor: tensor.squeeze(0).unflatten(0, (batch, n)))

    def by_output(self: Self, batches: Tensor, outputs: Tensor) -> Self:
        """The rows of one output in each batch: the b-th is of batch `batches[b]` here and of output `outputs[b]`.

        What all outputs have in common is not copied where all are of one batch.
        """
        new = copy.copy(self)
        for name in self.tensors:
            tensor = getattr(self, name)
            if name in self.of_each_output:
                picked = tensor[batches, :, outputs].unsqueeze(2)
            else:
                picked = tensor.expand(len(batches), *tensor.shape[1:]) if len(tensor) == 1 else tensor[batches]
            setattr(new, name, picked)
        return new

    def concatenate(self: Self, others: Sequence[Self]) -> Self:
        """The points of several terms after one another."""
        new = copy.copy(self)
        for name in self.tensors:
            setattr(new, name, torch.cat([getattr(term, name) for term in (self, *others)], dim=1))
        return new

    def relocate(self: Self, shifts: Mapping[str, int]) -> Self:
        """The same term in a parameter vector where each parameter has moved by so many elements."""
        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, ParameterView):
                setattr(new, name, value.shift(shifts[value.name]))
        return new

    def merge(self, others: Sequence[Term]) -> Term | None:
        """This term and others of the same key (uses of the same parameters) as one, or None where they cannot be."""
        return None

    @property
    def shared_nbytes(self) -> int:
        """What is held beside :attr:`nbytes`, whatever the number of points."""
        return 0

    @property
    def nbytes(self) -> int:
        return sum(once(getattr(self, name)).nbytes for name in self.tensors)


def once(tensor: Tensor) -> Tensor:
    """Of (B, …) that is the same for all batches, and known to be, the first, (1, …)."""
    return tensor[:1] if tensor.shape[0] > 1 and tensor.stride(0) == 0 else tensor


def cached_elements(device: torch.device) -> int:
    """How many elements an intermediate result should have at most."""
    return min(_CACHE_ELEMENTS.get(device.type, 1 << 26), memory.INTERMEDIATE.bytes(device) // 8)


def split_points(n: int, elements_per_point: int, device: torch.device) -> Iterator[slice]:
    """Slices of points whose intermediate results fit in cache."""
    size = max(1, cached_elements(device) // max(1, elements_per_point))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def inner(left: Tensor, right: Tensor) -> Tensor:
    """⟨left, right⟩ over the last dimension; of a tensor with itself in one sweep, without an intermediate result.

    Norms are plain sums, which are less exact than pairwise ones where a dimension is long: sum several in two steps.
    """
    return torch.linalg.vector_norm(left, dim=-1).square_() if left is right else (left * right).sum(-1)
