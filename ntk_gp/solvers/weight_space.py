"""Weight space: Bayesian linear regression on the Jacobian's P features."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..distributed.shards import block_columns
from ..jacobian.base import Jacobian
from ..jacobian.memory import mirror_upper_triangle
from . import orthogonal
from .base import Solver
from .cholesky import cholesky_solve, positive_factor
from .function_space import FunctionSpaceSolver
from .rounding import (
    accuracy,
    needs_orthogonalisation,
    not_positive_definite,
    rounding_error,
    warn_of_rounding,
)
from .system import System

# The Gram matrix of the features is accumulated in this many block columns, lower triangle only.
_BLOCK_COLUMNS = 4
# Products with fewer columns than this are slower than what they save.
_NARROWEST = 128
# Weights lose more digits than variances do, and are cheaper to refine.
MEAN_FACTOR = 30
# What JᵀJ is kept as.
_MOMENT = "feature moment"


class WeightSpaceSolver(Solver):
    r"""Exact, by the Cholesky factor M of :math:`\Lambda = I + \Phi^\top D^{-1} \Phi` with the whitened features
    :math:`\Phi = J \Sigma^{1/2}`: N·P² + P³/3 flops, 8 P² bytes, and never N×P numbers at once.

    The posterior covariance is :math:`\Phi_* \Lambda^{-1} \Phi_*^\top`, a square: no difference of large numbers in it.

    Λ squares the condition number of Φ. Where that costs digits, the features are brought to nearly orthonormal ones by
    M and factorised once more, which costs twice as much again (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya,
    "Roundoff error analysis of the CholeskyQR2 algorithm", ETNA 2015).

    Where there are fewer digits still, the features are orthogonalised (:mod:`ntk_gp.solvers.orthogonal`).

    :param system: K + D.
    :param precision: Λ, where it is known already.
    """

    name = "weight_space"
    is_replicated = True

    @classmethod
    def cost(cls, system: System) -> float:
        """Five eighths of the products of features, which are symmetric, and the factor; over ranks, of all together,
        each of which factorises."""
        parameters, ranks = system.num_parameters, system.jacobian.shards.ranks
        return system.batch * (1.25 * system.num_rows * parameters**2 + ranks * parameters**3 / 3)

    @classmethod
    def nbytes_needed(cls, system: System) -> float:
        """Λ and its factor, and JᵀJ where that is kept."""
        return 8 * (3.0 if _keeps_moment(system) else 2.0) * system.batch * system.num_parameters**2

    def __init__(self, system: System, precision: Tensor | None = None):
        super().__init__(system)
        if precision is None:
            precision = feature_moment(system)
            precision.diagonal(dim1=-2, dim2=-1).add_(1.0)
        self.is_orthogonalised = self._mean_is_refined = False
        factor = positive_factor(precision)
        del precision
        if needs_orthogonalisation(system, factor) and orthogonal.weight_space_fits(system):
            self.is_orthogonalised = True
            self.cholesky = orthogonal.weight_space_factor(system)[0]
            return
        if factor is None:
            raise not_positive_definite(system)
        self.cholesky = factor
        error, allowed = rounding_error(self.cholesky), accuracy(system)
        self._mean_is_refined = error > allowed / MEAN_FACTOR
        if error > allowed:
            self._refine()

    def _refine(self) -> None:
        """M becomes M C, with C Cᵀ = M⁻¹ Λ M⁻ᵀ from the features themselves."""
        system, factor = self.system, self.cholesky
        if not system.fits(4.0 * factor.numel()):
            warn_of_rounding(factor)
            return
        inverse = torch.linalg.solve_triangular(
            factor, torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor), upper=False
        )
        near_identity = inverse @ inverse.mT  # the prior's part
        del inverse
        near_identity += feature_moment(system, factor)
        correction = positive_factor(near_identity)
        if correction is None:
            warn_of_rounding(factor)
            return
        self.cholesky = factor @ correction

    def extended(self, system: System) -> WeightSpaceSolver | None:
        """Adds m rows to the precision: a rank-m update, and a new factor."""
        if self.is_orthogonalised or not system.fits(2.0 * system.batch * system.num_parameters**2):
            return None
        precision = feature_moment(system.rows_after(self.system), keep=False) + self.cholesky @ self.cholesky.mT
        return WeightSpaceSolver(system, precision)

    def _whiten(self, rows: Tensor) -> Tensor:
        return rows * self.system.root_variances.unsqueeze(-2)

    def _project(self, rhs: Tensor) -> Tensor:
        """Λ⁻¹ Φᵀ D⁻¹ rhs, (B, P, r): least squares, by the normal equations as long as they have the digits."""
        if self.is_orthogonalised:
            factor, rotated = orthogonal.weight_space_factor(self.system, rhs)
            return torch.linalg.solve_triangular(factor.mT, rotated, upper=True)
        weights = self._precision_solve(self._moment(rhs))
        if not self._mean_is_refined:
            return weights
        # From what the weights leave, with their own rounding in it: the error then is of second order.
        remainder = rhs - self.system.jacobian.jvp((self.system.root_variances.unsqueeze(-1) * weights).mT).mT
        return weights + self._precision_solve(self._moment(remainder) - weights)

    def _precision_solve(self, rhs: Tensor) -> Tensor:
        """Λ⁻¹ rhs, (B, P, r)."""
        return cholesky_solve(self.cholesky, rhs)

    def _moment(self, rhs: Tensor) -> Tensor:
        """Φᵀ D⁻¹ rhs."""
        weighted = rhs / self.system.noise.unsqueeze(-1)
        return self.system.root_variances.unsqueeze(-1) * self.system.jacobian.vjp(weighted.mT).mT

    def solve(self, rhs: Tensor) -> Tensor:
        if self.is_orthogonalised and self.system.num_rows <= self.system.num_parameters:
            # Where the weights explain all of it, what they leave has no digits.
            return FunctionSpaceSolver(self.system).solve(rhs)
        solution = self._solve_once(rhs)
        return solution + self._solve_once(rhs - self.system.matmul(solution))

    def _solve_once(self, rhs: Tensor) -> Tensor:
        weights = self.system.root_variances.unsqueeze(-1) * self._project(rhs)
        return (rhs - self.system.jacobian.jvp(weights.mT).mT) / self.system.noise.unsqueeze(-1)

    def mean_weights(self, residual: Tensor) -> Tensor:
        return self.system.root_variances.unsqueeze(-2) * self._project(residual.mT).mT

    def logdet(self) -> Tensor:
        log_root = self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 2 * log_root + self.system.noise.expand(self.system.batch, -1).log().sum(-1)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        r"""By :math:`\Phi^\top A^{-1} \Phi = I - \Lambda^{-1}` and
        :math:`A^{-1} = D^{-1} - D^{-1} \Phi \Lambda^{-1} \Phi^\top D^{-1}`."""
        system, function = self.system, self.system.jacobian.function
        if not (system.variances > 0).all():  # a group without weight is not in Φ
            return FunctionSpaceSolver(system).logdet_derivatives()
        shrinkage = 1 - torch.cholesky_inverse(self.cholesky).diagonal(dim1=-2, dim2=-1)
        by_group = function.sum_by_group(shrinkage / system.parameter_variances)
        own = system.jacobian.own
        size = own.points_per_block()
        leverages = [self.variance(own[slice(i, i + size)]) for i in range(0, own.num_points, size)]
        leverage = system.jacobian.shards.gathered(torch.cat(leverages, dim=-1), -1)
        return by_group, (1 - leverage / system.noise) / system.noise

    @property
    def nbytes(self) -> int:
        return self.cholesky.nbytes

    def whitened_size(self) -> int:
        return self.system.num_parameters

    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        """M⁻¹ Φ(x)ᵀ."""
        return torch.linalg.solve_triangular(self.cholesky, self._whiten(jacobian.rows()).mT, upper=False)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        whitened1 = self.whitened_cross(jacobian1)
        whitened2 = whitened1 if jacobian2 is jacobian1 else self.whitened_cross(jacobian2)
        return whitened1.mT @ whitened2

    def variance(self, jacobian: Jacobian) -> Tensor:
        if self.system.variances.shape[-1] > 1 or jacobian.x.requires_grad:
            return self.whitened_cross(jacobian).square().sum(-2)
        # One number for all parameters can wait: no copies of N×P numbers for it, nor for the squares.
        unscaled = torch.linalg.solve_triangular(self.cholesky, jacobian.rows().mT, upper=False)
        return torch.linalg.vector_norm(unscaled, dim=-2).square() * self.system.variances


def feature_moment(system: System, factor: Tensor | None = None, keep: bool = True) -> Tensor:
    """Φᵀ D⁻¹ Φ, (B, P, P), block of training points by block; in float64, since float32 sums lose definiteness.

    Where the noise is one number in each batch, this is JᵀJ up to factors. That is kept, where there is room: the
    eigenvalues that serve fitting, and the factor for predictions, come from one sum over the data.

    :param factor: M, (B, P, P), for M⁻¹ Φᵀ D⁻¹ Φ M⁻ᵀ instead.
    :param keep: Whether these data will be asked for again.
    """
    noise, roots = system.noise, system.root_variances
    if factor is None and keep and _keeps_moment(system):
        moment = system.linearization.keep(_MOMENT, (system.x,), lambda _: _accumulated(system, len(system.x)))
        moment = moment * (roots.unsqueeze(-1) * noise[:, :1, None].reciprocal())
        return moment.mul_(roots.unsqueeze(-2))
    moment = _accumulated(system, system.batch, noise.rsqrt(), factor)
    if factor is not None:
        return moment
    return moment.mul_(roots.unsqueeze(-1)).mul_(roots.unsqueeze(-2))


def kept_moment(system: System) -> Tensor | None:
    """JᵀJ, (B or 1, P, P), if it serves these data and has been kept by :func:`feature_moment`."""
    return system.linearization.kept(_MOMENT, (system.x,)) if _has_constant_noise(system) else None


def _keeps_moment(system: System) -> bool:
    """Whether JᵀJ serves these data, and stays beside what is made of it."""
    return system.fits(4.0 * system.batch * system.num_parameters**2) and _has_constant_noise(system)


def _has_constant_noise(system: System) -> bool:
    """Whether the noise is one number in each batch."""
    return bool((system.noise == system.noise[:, :1]).all())


def add_lower_products(matrix: Tensor, features: Tensor) -> None:
    """Adds ΦᵀΦ for rows Φ, (B, m, P), to the lower triangle of a matrix (B, P, P), in block columns: what is above them
    is not touched."""
    size = matrix.shape[-1]
    columns = block_columns(size, max(1, min(_BLOCK_COLUMNS, size // _NARROWEST)))
    for j, left in enumerate(columns):
        for right in columns[: j + 1]:
            matrix[:, left, right] += features[..., left].mT @ features[..., right]


def _accumulated(system: System, batch: int, scale: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """The sum over the training data of the products of their features, (batch, P, P).

    :param scale: By which rows of J are multiplied, (B or 1, N).
    :param factor: M, (B, P, P), where they are M⁻¹ Φᵀ.
    """
    jacobian, shards, outputs = system.jacobian.own, system.jacobian.shards, system.jacobian.function.num_outputs
    size, block = system.num_parameters, jacobian.points_per_block()
    scale = None if scale is None else shards.own(scale, -1)
    roots = system.root_variances
    moment = torch.zeros(batch, size, size, dtype=torch.float64, device=system.x.device)
    for i in settings.progress(range(0, jacobian.num_points, block), "Accumulating features"):
        features = jacobian[slice(i, i + block)].rows()
        if scale is not None:
            features = features * scale[:, i * outputs : (i + block) * outputs, None]
        if factor is not None:
            features = torch.linalg.solve_triangular(factor, (features * roots.unsqueeze(-2)).mT, upper=False).mT
        add_lower_products(moment, features)
    moment = shards.lower_summed(moment)
    mirror_upper_triangle(moment.mT)
    system.check_finite(moment.diagonal(dim1=-2, dim2=-1))
    return moment
