"""Function space: the Cholesky factor of K + D, N×N."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import memory
from ..jacobian.base import Jacobian
from ..jacobian.memory import empty
from ..jacobian.products import TransposedJacobianProduct
from .base import Solver
from .cholesky import cholesky, cholesky_solve, invert_in_place, numbers_held, positive_factor
from .orthogonal import FunctionSpaceBasis
from .rounding import (
    accuracy,
    digits_lost,
    needs_orthogonalisation,
    not_positive_definite,
    rounding_error,
    warn_of_rounding,
)
from .system import System

# The part of a posterior variance that factorising in float32 may change, by the dtype of the inputs (none, where it is
# not listed): less than the 5e-3 promised. That is by a bound; real changes, of either sign, are hundreds of times
# smaller.
LOST_TO_SINGLE_PRECISION = {torch.float32: 4e-3}

# A variance is the prior one less what the data explain. The relative error that this difference may have, by a bound,
# before the variance is computed without one; about a hundredth of it is usual.
CANCELLED = {torch.float64: 1e-6, torch.float32: 1e-3}


class FunctionSpaceSolver(Solver):
    """Exact, by the Cholesky factor L of A = K + D: N²·Σ(d_in + d_out) + N³/3 flops, 8 N² bytes, and half as many again
    while it is made.

    K = Φ Φᵀ squares the condition number of the whitened features Φ = J Σ^{1/2}. Where that costs digits, the posterior
    comes from what least squares leave: with φ(x) the features of a test point and α = A⁻¹ k(X, x), the covariance is
    the inner product of the vectors (φ(x) − Φᵀα, D^{1/2} α) of two test points. That is smallest where α is exact, so
    that an error in α counts by its square; it costs N·P for each test point. Where that is not enough, or K + D is not
    even positive definite in float64, Φᵀ above D^{1/2} is orthogonalised (:mod:`ntk_gp.solvers.orthogonal`):
    4 (N + P)·N² flops.

    :param system: K + D.
    :param factor: L, where it is known already.
    """

    name = "function_space"

    @classmethod
    def cost(cls, system: System) -> float:
        """The Gram matrix and its factor; over ranks, of all together, each of which factorises."""
        jacobian = system.jacobian
        return jacobian.gram_cost(jacobian) + jacobian.shards.ranks * system.batch * system.num_rows**3 / 3

    @classmethod
    def nbytes_needed(cls, system: System) -> float:
        """K + D and its factor."""
        return 8 * system.batch * numbers_held(system.num_rows, system.x.device)

    def __init__(self, system: System, factor: Tensor | None = None):
        super().__init__(system)
        known = _factorised(system) if factor is None else factor
        self.basis: FunctionSpaceBasis | None = None
        if known is None or needs_orthogonalisation(system, known):
            known = self._orthogonalised(known)
        self.cholesky = known
        self._rounding = (torch.finfo(known.dtype).eps * digits_lost(known)) ** 0.5  # relative, of whitened_cross
        self.is_refined = self.basis is None and rounding_error(known) > accuracy(system)

    def _orthogonalised(self, factor: Tensor | None) -> Tensor:
        """L without K + D, where there is memory for it."""
        if FunctionSpaceBasis.fits(self.system):
            self.basis = FunctionSpaceBasis(self.system)
            return self.basis.factor
        if factor is None:
            raise not_positive_definite(self.system)
        warn_of_rounding(factor)
        return factor

    def extended(self, system: System) -> FunctionSpaceSolver | None:
        """Adds m rows to the factor: N² m flops in place of N³/3."""
        if self.basis is not None or not system.fits(2.0 * system.batch * system.num_rows**2):
            return None
        added = system.rows_after(self.system)
        old, new = self.system.num_rows, system.num_rows
        whitened = self.whitened_cross(added.jacobian)
        schur = positive_factor(added.dense() - whitened.mT @ whitened)
        if schur is None:
            return None
        factor = torch.zeros(system.batch, new, new, dtype=torch.float64, device=system.x.device)
        factor[:, :old, :old] = self.cholesky
        factor[:, old:, :old] = whitened.mT
        factor[:, old:, old:] = schur
        return FunctionSpaceSolver(system, factor)

    def solve(self, rhs: Tensor) -> Tensor:
        return cholesky_solve(self.cholesky, rhs)

    def mean_weights(self, residual: Tensor) -> Tensor:
        alpha = self.solve(residual.mT)
        if self.basis is not None:
            return self.basis.mean_weights(residual, alpha.mT)
        weights = self.system.features(alpha).mT
        if not self.is_refined:
            return weights
        remainder = residual - self.system.jacobian.jvp(weights) - self.system.noise.unsqueeze(-2) * alpha.mT
        return weights + super().mean_weights(remainder)

    def logdet(self) -> Tensor:
        return 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        system = self.system
        inverse = invert_in_place(empty(self.cholesky.shape, like=self.cholesky).copy_(self.cholesky))
        groups = torch.eye(system.variances.shape[1], dtype=torch.float64, device=system.x.device)
        grams = (system.linearization.gram(system.jacobian, system.jacobian, one[None]) for one in groups)
        by_group = [_inner_product(inverse, gram) for gram in grams]
        return torch.stack(by_group, dim=-1), inverse.diagonal(dim1=-2, dim2=-1)

    @property
    def nbytes(self) -> int:
        return self.cholesky.nbytes if self.basis is None else self.basis.nbytes

    def whitened_size(self) -> int:
        return self.system.num_rows + 2 * self._is_projected * self.system.num_parameters

    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        """L⁻¹ K(X, x)."""
        return torch.linalg.solve_triangular(self.cholesky, self.system.cross(jacobian), upper=False)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        if self._is_projected:
            return self._refined_covariance(jacobian1, jacobian2)
        prior = jacobian1.gram(jacobian2, self.system.variances)
        whitened1 = self.whitened_cross(jacobian1)
        whitened2 = whitened1 if jacobian2 is jacobian1 else self.whitened_cross(jacobian2)
        for jacobian, whitened in ((jacobian1, whitened1), (jacobian2, whitened2)):
            if self._cancels(jacobian.diagonal(self.system.variances), whitened).any():
                return self._refined_covariance(jacobian1, jacobian2)
        return prior - self._explained(whitened1, whitened2)

    def variance(self, jacobian: Jacobian) -> Tensor:
        if self._is_projected:
            return self._remainder_at(jacobian).square().sum(-1)
        prior = jacobian.diagonal(self.system.variances)
        whitened = self.whitened_cross(jacobian)
        # What rounding leaves below zero is zero as far as float64 can tell.
        variance = (prior - self._explained_variance(whitened)).clamp_min(0.0)
        outputs = jacobian.function.num_outputs
        points = self._cancels(prior, whitened).any(0).reshape(-1, outputs).any(-1).nonzero().squeeze(-1)
        if len(points) == 0:
            return variance
        pieces = [
            self._remainder_at(jacobian[some]).square().sum(-1)
            for some in points.split(self._projected_points(outputs))
        ]
        rows = (points.unsqueeze(-1) * outputs + torch.arange(outputs, device=points.device)).reshape(-1)
        remainder = torch.cat(pieces, dim=-1)
        return variance.expand(max(len(remainder), len(variance)), -1).index_copy(-1, rows, remainder)

    def _explained(self, whitened1: Tensor, whitened2: Tensor) -> Tensor:
        """What the data explain of the prior covariance, (B, M₁, M₂)."""
        return whitened1.mT @ whitened2

    def _explained_variance(self, whitened: Tensor) -> Tensor:
        """The diagonal of that, (B, M)."""
        return whitened.square().sum(-2)

    @property
    def _is_projected(self) -> bool:
        """Whether every covariance comes from what least squares leave."""
        return self.is_refined or self.basis is not None

    def _cancels(self, prior: Tensor, whitened: Tensor) -> Tensor:
        """Where the variance is so small a part of the prior one that their difference may have lost its digits."""
        rounding = self._rounding / CANCELLED.get(self.system.dtype, CANCELLED[torch.float32])
        return prior.detach() - self._explained_variance(whitened.detach()) < rounding * prior.detach()

    def _projected_points(self, outputs: int) -> int:
        """How many test points may be projected at once: an eighth of the memory budget for what they leave."""
        budget = memory.TEST_POINTS.bytes(self.system.x.device)
        height = 2 * self.system.num_parameters + self.system.num_rows
        return max(1, budget // (8 * self.system.batch * outputs * height))

    def _refined_covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        """Block by block of as many test points as the memory budget has room for twice."""
        outputs, same = jacobian1.function.num_outputs, jacobian2 is jacobian1
        size = max(1, self._projected_points(outputs) // 2)
        batch = max(self.system.batch, len(jacobian1.x), len(jacobian2.x))
        out = self.system.x.new_empty(batch, jacobian1.num_rows, jacobian2.num_rows)
        for i in range(0, jacobian1.num_points, size):
            remainder = self._remainder_at(jacobian1[slice(i, i + size)])
            rows = slice(i * outputs, i * outputs + remainder.shape[1])
            for j in range(i if same else 0, jacobian2.num_points, size):
                right = remainder if same and i == j else self._remainder_at(jacobian2[slice(j, j + size)])
                columns = slice(j * outputs, j * outputs + right.shape[1])
                out[:, rows, columns] = block = remainder @ right.mT
                if same and i != j:
                    out[:, columns, rows] = block.mT
        return out

    def _remainder_at(self, jacobian: Jacobian) -> Tensor:
        """φ(x) − Φᵀα and D^{1/2} α beside it, (B, M, P + N): what least squares leave of each row's features."""
        if self.basis is not None:
            return self.basis.left_at(jacobian)
        system = self.system
        alpha = self.solve(system.cross(jacobian)).mT
        explained = TransposedJacobianProduct.apply(alpha, system.jacobian)
        features = (jacobian.rows() - explained) * system.root_variances.unsqueeze(-2)
        return torch.cat([features, system.noise.sqrt().unsqueeze(-2) * alpha], dim=-1)


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of all entries, (B,), of (B, N, N) and (B or 1, N, N)."""
    return torch.einsum("bij,bij->b", left, right.expand_as(left))


def _factorised(system: System) -> Tensor | None:
    """L, unless K + D is not positive definite to float64's digits."""
    matrix = system.dense()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
    factor, info = cholesky(matrix, system.noise, LOST_TO_SINGLE_PRECISION.get(system.dtype, 0.0))
    del matrix
    if not info.any():
        return factor
    system.check_finite(diagonal)
    return None
