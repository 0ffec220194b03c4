r"""A matrix that is scaled by numbers which depend on the matrix itself, as normalised weights are.

With :math:`\theta_i = s_i(w)\, w_i` the block for w is :math:`J = M + F R`: M is that of a matrix which multiplies an
input, F the derivatives with respect to the few numbers s, and R, the derivatives of s, is the same at all inputs. So

.. math:: J J'^T = M M'^T + D F'^T + F D'^T + F R R^T F'^T, \qquad D = M R^T,

which is a plain layer's Gram matrix and one more product of features.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from .base import Term
from .combined import CombinedTerm
from .derivatives import DenseDerivative, LocalDerivative
from .matrix import MatrixTerm
from .pulled import SharedTerm, output_major, times
from .view import ParameterView


class CorrectedTerm(CombinedTerm):
    """The sum M + F R of two uses of a parameter.

    :param matrix: M, perhaps with a bias.
    :param shared: F, with R among its derivatives; those by other parameters, which scale the matrix too, are added.
    :param products: D, (B, n, C, q), or None where it is `shared.ratios` times F.
    """

    def __init__(self, matrix: MatrixTerm, shared: SharedTerm, products: Tensor | None = None):
        super().__init__([matrix, shared])
        self.matrix, self.shared = matrix, shared
        derivative = _derivative_by(matrix, shared)
        assert derivative is not None
        self._derivative = derivative
        self._ratio = shared.ratios.get(matrix.weight.name)
        if self._ratio is None and products is None:
            products = self._multiplied()
        self.products = products

    @classmethod
    def of(cls, terms: Sequence[Term]) -> CorrectedTerm | None:
        """That of a matrix and what it is scaled by, in either order; None where there are no such two."""
        matrices = [term for term in terms if isinstance(term, MatrixTerm)]
        scales = [term for term in terms if isinstance(term, SharedTerm)]
        if not len(terms) == 2 == len(matrices) + len(scales) == 2 * len(matrices):
            return None
        matrix, shared = matrices[0], scales[0]
        derivative = _derivative_by(matrix, shared)
        if derivative is None:
            return None
        rows, columns = derivative.matrix.shape
        if isinstance(derivative, LocalDerivative):
            fits = matrix.weight.has_rows(rows, columns)
        else:
            fits = 2 * rows < columns or matrix.weight.name in shared.ratios
        return cls(matrix, shared) if fits else None

    def _multiplied(self) -> Tensor:
        """D."""
        matrix = self._derivative.matrix
        if isinstance(self._derivative, LocalDerivative):
            return self.matrix.row_products(matrix)
        tangents = matrix.new_zeros(1, len(matrix), self.matrix.weight.end)
        self._derivative.view.add_to(tangents, matrix)
        return self.matrix.with_bias(None).jvp(tangents).movedim(1, -1)

    def key(self) -> Hashable:
        return ("corrected", *super().key())  # type: ignore[misc]

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return (*self.shared.views, *self.matrix.views[1:])

    @property
    def _is_factored(self) -> bool:
        return self.matrix.num_products > 0

    @property
    def num_products(self) -> int:
        return self.matrix.num_products + 1 if self._is_factored else 0

    def pairs(self) -> Iterator[tuple[int, int]]:
        yield from self.matrix.pairs()
        yield self.matrix.num_products, self.matrix.num_products

    def factors(self, points: slice, variances: Tensor | None = None) -> list[tuple[Tensor | None, Tensor]]:
        features = self._correction(points) if variances is None else self._weighted(points, variances)
        return [*self.matrix.factors(points, variances), (None, output_major(features))]

    def _correction(self, points: slice) -> Tensor:
        features = self.shared.features[:, points]
        return features if self.products is None else torch.cat([features, self.products[:, points]], dim=-1)

    def _weighted(self, points: slice, variances: Tensor) -> Tensor:
        """What multiplies the correction on the other side."""
        variance = variances[:, self.matrix.weight.group]
        covariance = self.shared.covariance(variances)
        features = self.shared.features[:, points]
        if self.products is None:
            assert self._ratio is not None
            twice = 2 * variance[:, None] * self._ratio
            return times(features, covariance + (twice if covariance.dim() == 2 else torch.diag_embed(twice)))
        variance = variance[:, None, None, None]
        left = times(features, covariance) + variance * self.products[:, points]
        return torch.cat([left, (variance * features).expand_as(left)], dim=-1)

    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        assert isinstance(other, CorrectedTerm)
        everywhere = slice(None)
        correction = (self._weighted(everywhere, variances) * other._correction(everywhere)).sum(-1)
        return self.matrix.cross_diagonal(other.matrix, variances) + correction

    def gram_cost(self) -> float:
        if not self._is_factored:
            return super().gram_cost()
        width = self.shared.features.shape[-1] * (1 if self.products is None else 2)
        return self.matrix.gram_cost() + 2.0 * self.shared.features.shape[2] ** 2 * width

    def map(self, function: Callable[[Tensor], Tensor]) -> CorrectedTerm:
        products = None if self.products is None else function(self.products)
        return CorrectedTerm(self.matrix.map(function), self.shared.map(function), products)  # type: ignore[arg-type]

    def by_output(self, batches: Tensor, outputs: Tensor) -> CorrectedTerm:
        products = None if self.products is None else self.products[batches, :, outputs].unsqueeze(2)
        matrix, shared = (use.by_output(batches, outputs) for use in (self.matrix, self.shared))
        return CorrectedTerm(matrix, shared, products)  # type: ignore[arg-type]

    def concatenate(self, others: Sequence[CorrectedTerm]) -> CorrectedTerm:  # type: ignore[override]
        products = None
        if self.products is not None:
            products = torch.cat([term.products for term in (self, *others) if term.products is not None], dim=1)
        matrix = self.matrix.concatenate([other.matrix for other in others])
        return CorrectedTerm(matrix, self.shared.concatenate([other.shared for other in others]), products)  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.products is None else self.products.nbytes)


def _derivative_by(matrix: MatrixTerm, shared: SharedTerm) -> LocalDerivative | DenseDerivative | None:
    """Of what scales the matrix, by the parameter that the matrix is; None where it is not all of a parameter."""
    weight = matrix.weight
    for each in shared.derivatives:
        if (each.view.name, each.view.offset, each.view.numel()) == (weight.name, weight.offset, weight.numel()):
            return each
    return None
