"""Uses of tensors that were computed from parameters: blocks for the tensor, and its derivative by the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from .base import Term
from .by_rows import RowsTerm
from .derivatives import DenseDerivative, Derivative, LocalDerivative
from .features import FeatureTerm
from .matrix import MatrixTerm
from .view import ParameterView


class PulledTerm(RowsTerm):
    r"""J_θ H: a use of a tensor θ, and the derivatives of θ.

    Products with vectors cost what they cost for θ and one with H for each; Gram matrices need rows.

    :param inner: J_θ, a term whose parameters are θ's own q numbers.
    :param derivatives: H by parameters that are not one another's.
    """

    def __init__(self, inner: Term, derivatives: Sequence[Derivative]):
        self.inner = inner
        self.derivatives = tuple(derivatives)

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return tuple(view for derivative in self.derivatives for view in derivative.views)

    @property
    def gradients(self) -> Tensor:  # type: ignore[override]
        return self.inner.gradients

    def key(self) -> Hashable:
        return (type(self).__name__, self.inner.key(), tuple(each.key() for each in self.derivatives))

    def check(self, n: int, outputs: int) -> None:
        self.inner.check(n, outputs)

    def jvp(self, tangents: Tensor) -> Tensor:
        return self.inner.jvp(reduce(torch.add, [each.push(tangents) for each in self.derivatives]))

    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        vectors = cotangents.new_zeros(*cotangents.shape[:2], self.derivatives[0].size)
        self.inner.vjp(cotangents, vectors)
        self._pull(vectors, out)

    def add_rows(self, out: Tensor) -> None:
        rows = out.new_zeros(*out.shape[:3], self.derivatives[0].size)
        self.inner.add_rows(rows)
        self._pull(rows, out)

    def _pull(self, vectors: Tensor, out: Tensor) -> None:
        for each in self.derivatives:
            each.pull(vectors, out)

    def product_cost(self) -> float:
        return self.inner.product_cost()

    def map(self, function: Callable[[Tensor], Tensor]) -> PulledTerm:
        new = copy.copy(self)
        new.inner = self.inner.map(function)
        return new

    def by_output(self, batches: Tensor, outputs: Tensor) -> PulledTerm:
        new = copy.copy(self)
        new.inner = self.inner.by_output(batches, outputs)
        return new

    def concatenate(self, others: Sequence[PulledTerm]) -> PulledTerm:
        new = copy.copy(self)
        new.inner = self.inner.concatenate([other.inner for other in others])
        return new

    def merge(self, others: Sequence[Term]) -> Term | None:
        inner = self.inner.merge([other.inner for other in others if isinstance(other, PulledTerm)])
        if inner is None:
            return None
        new = copy.copy(self)
        new.inner = inner
        return new

    def relocate(self, shifts: Mapping[str, int]) -> PulledTerm:
        new = copy.copy(self)
        new.derivatives = tuple(each.relocate(shifts) for each in self.derivatives)
        return new

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    @property
    def shared_nbytes(self) -> int:
        return sum(each.nbytes for each in self.derivatives)


class ElementwiseTerm(PulledTerm):
    """Of a matrix that is an elementwise function of one parameter: columns of J_θ, each times its number.

    :param inner: The matrix, without a bias.
    :param derivatives: The one, an elementwise function's.
    """

    inner: MatrixTerm

    def columns(self, max_columns: int, variances: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        (derivative,) = self.derivatives
        assert isinstance(derivative, LocalDerivative)
        factors = self.inner.weight.read(derivative.matrix.flatten()).flatten()  # in the order of the columns
        scale = variances[:, derivative.view.group, None]
        start = 0
        for rows, _ in self.inner.columns(max_columns, variances.new_ones(1, 1)):
            end = start + rows.shape[-1]
            yield rows * factors[start:end], scale.expand(-1, rows.shape[-1])
            start = end


class SharedTerm(PulledTerm):
    r"""F H, with the features F of a few numbers θ: Gram matrices F (H Σ Hᵀ) F'ᵀ need these alone.

    :param inner: F, features of all of θ.
    :param derivatives: Local and dense ones.
    :param ratios: Where there is a matrix term M by the parameter with the derivatives R, see :class:`CorrectedTerm`,
        and ⟨M_i, R_i⟩ is a multiple of F_i whatever the inputs: that multiple, (q,).
    """

    inner: FeatureTerm
    derivatives: tuple[LocalDerivative | DenseDerivative, ...]

    def __init__(
        self,
        inner: FeatureTerm,
        derivatives: Sequence[LocalDerivative | DenseDerivative],
        ratios: Mapping[str, Tensor] | None = None,
    ):
        super().__init__(inner, derivatives)
        self.ratios = dict(ratios or {})

    @property
    def features(self) -> Tensor:
        """(B, n, C, q)."""
        return self.inner.features

    def key(self) -> Hashable:
        """θ has no part in it: two tensors of the same derivatives may be one."""
        return ("shared", tuple(each.key() for each in self.derivatives), tuple(self.ratios))

    def covariance(self, variances: Tensor) -> Tensor:
        """H Σ Hᵀ for variances (L, G): (L, q), its diagonal where it has nothing else, or (L, q, q)."""
        diagonal = [each for each in self.derivatives if isinstance(each, LocalDerivative)]
        others = [each for each in self.derivatives if isinstance(each, DenseDerivative)]
        total = variances.new_zeros(len(variances), self.features.shape[-1])
        for each in diagonal:
            total = total + variances[:, each.view.group, None] * each.covariance
        if not others:
            return total
        matrix = torch.diag_embed(total)
        for other in others:
            matrix = matrix + variances[:, other.view.group, None, None] * other.covariance
        return matrix

    def weighted(self, points: slice, variances: Tensor) -> Tensor:
        """F (H Σ Hᵀ) at some points: (B or L, m, C, q)."""
        return times(self.features[:, points], self.covariance(variances))

    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        assert isinstance(other, SharedTerm)
        return (self.weighted(slice(None), variances) * other.features).sum(-1)

    @property
    def num_products(self) -> int:
        return 1

    def pairs(self) -> Iterator[tuple[int, int]]:
        yield 0, 0

    def factors(self, points: slice, variances: Tensor | None = None) -> list[tuple[Tensor | None, Tensor]]:
        columns = self.features[:, points] if variances is None else self.weighted(points, variances)
        return [(None, output_major(columns))]

    def gram_cost(self) -> float:
        return self.inner.gram_cost()

    def merge(self, others: Sequence[Term]) -> SharedTerm | None:
        """Other uses of tensors with the same derivatives add to the features."""
        terms = [other for other in others if isinstance(other, SharedTerm)]
        for term in terms:
            pairs = zip(self.derivatives, term.derivatives, strict=True)
            if not all(torch.equal(mine.matrix, its.matrix) for mine, its in pairs):
                return None
            if not all(torch.equal(self.ratios[name], term.ratios[name]) for name in self.ratios):
                return None
        return SharedTerm(self.inner.merge([term.inner for term in terms]), self.derivatives, self.ratios)


def times(features: Tensor, matrix: Tensor) -> Tensor:
    """Features (B, m, C, q) times matrices (L, q, q), or diagonal ones (L, q)."""
    return features * matrix[:, None, None] if matrix.dim() == 2 else features @ matrix.unsqueeze(1)


def output_major(features: Tensor) -> Tensor:
    """(B, m, C, q) to (B, C·m, q)."""
    return features.transpose(1, 2).flatten(1, 2)
