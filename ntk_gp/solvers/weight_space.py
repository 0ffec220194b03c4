"""Weight space: Bayesian linear regression on the Jacobian's P features."""

from __future__ import annotations

from itertools import pairwise

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from .. import settings
from ..jacobian.base import Jacobian
from ..jacobian.memory import mirror_upper_triangle
from .base import Solver
from .function_space import FunctionSpaceSolver
from .system import System

# The Gram matrix of the features is accumulated in this many block columns, lower triangle only.
_BLOCK_COLUMNS = 4


class WeightSpaceSolver(Solver):
    r"""Exact, by the Cholesky factor M of :math:`\Lambda = I + \Phi^\top D^{-1} \Phi` with the whitened features
    :math:`\Phi = J \Sigma^{1/2}`: N·P² + P³/3 flops, 8 P² bytes, and never N×P numbers at once.

    The posterior covariance is :math:`\Phi_* \Lambda^{-1} \Phi_*^\top`, a square: no difference of large numbers in it.

    :param system: K + D.
    :param precision: Λ, where it is known already.
    """

    def __init__(self, system: System, precision: Tensor | None = None):
        super().__init__(system)
        self.root_variances = system.parameter_variances.sqrt()
        if precision is None:
            precision = feature_moment(system)
            precision.diagonal(dim1=-2, dim2=-1).add_(1.0)
        self.cholesky = psd_safe_cholesky(precision)

    def extended(self, system: System) -> WeightSpaceSolver | None:
        """Adds m rows to the precision: a rank-m update, and a new factor."""
        if not system.fits(2.0 * system.batch * system.num_parameters**2):
            return None
        precision = feature_moment(system.rows_after(self.system)) + self.cholesky @ self.cholesky.mT
        return WeightSpaceSolver(system, precision)

    def _whiten(self, rows: Tensor) -> Tensor:
        return rows * self.root_variances.unsqueeze(-2)

    def _project(self, rhs: Tensor) -> Tensor:
        """Λ⁻¹ Φᵀ D⁻¹ rhs, (B, P, r)."""
        weighted = rhs / self.system.noise.unsqueeze(-1)
        projected = self.root_variances.unsqueeze(-1) * self.system.jacobian.vjp(weighted.mT).mT
        return torch.cholesky_solve(projected, self.cholesky)

    def solve(self, rhs: Tensor) -> Tensor:
        solution = self._solve_once(rhs)
        return solution + self._solve_once(rhs - self.system.matmul(solution))

    def _solve_once(self, rhs: Tensor) -> Tensor:
        weights = self.root_variances.unsqueeze(-1) * self._project(rhs)
        return (rhs - self.system.jacobian.jvp(weights.mT).mT) / self.system.noise.unsqueeze(-1)

    def mean_weights(self, residual: Tensor) -> Tensor:
        return self.root_variances.unsqueeze(-2) * self._project(residual.mT).mT

    def logdet(self) -> Tensor:
        half = self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return 2 * half + self.system.noise.expand(self.system.batch, -1).log().sum(-1)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        r"""By :math:`\Phi^\top A^{-1} \Phi = I - \Lambda^{-1}` and
        :math:`A^{-1} = D^{-1} - D^{-1} \Phi \Lambda^{-1} \Phi^\top D^{-1}`."""
        system, function = self.system, self.system.jacobian.function
        if not (system.weights > 0).all():  # a group without weight is not in Φ
            return FunctionSpaceSolver(system).logdet_derivatives()
        shrinkage = 1 - torch.cholesky_inverse(self.cholesky).diagonal(dim1=-2, dim2=-1)
        by_parameter = shrinkage / system.parameter_variances
        by_group = torch.zeros(
            *by_parameter.shape[:-1], function.num_groups, dtype=torch.float64, device=system.x.device
        )
        for piece, group in zip(by_parameter.split(function.sizes, dim=-1), function.group_indices, strict=True):
            by_group[..., group] += piece.sum(-1)
        size, outputs = system.jacobian.points_per_block(), function.num_outputs
        leverages = [
            self.variance(system.jacobian[slice(i, i + size)]) for i in range(0, system.num_rows // outputs, size)
        ]
        return by_group, (1 - torch.cat(leverages, dim=-1) / system.noise) / system.noise

    @property
    def nbytes(self) -> int:
        return self.cholesky.nbytes

    def half_size(self) -> int:
        return self.system.num_parameters

    def half_at(self, jacobian: Jacobian) -> Tensor:
        """M⁻¹ Φ(x)ᵀ."""
        return torch.linalg.solve_triangular(self.cholesky, self._whiten(jacobian.rows()).mT, upper=False)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        half1 = self.half_at(jacobian1)
        half2 = half1 if jacobian2 is jacobian1 else self.half_at(jacobian2)
        return half1.mT @ half2

    def variance(self, jacobian: Jacobian) -> Tensor:
        return self.half_at(jacobian).square().sum(-2)


def feature_moment(system: System) -> Tensor:
    """Φᵀ D⁻¹ Φ, (B, P, P), block of training points by block; in float64, since float32 sums lose definiteness."""
    jacobian, outputs = system.jacobian, system.jacobian.function.num_outputs
    size, block = system.num_parameters, jacobian.points_per_block()
    edges = torch.linspace(0, size, min(_BLOCK_COLUMNS, size) + 1).long().tolist()
    columns = [slice(a, b) for a, b in pairwise(edges)]
    scale = system.noise.rsqrt()
    moment = torch.zeros(system.batch, size, size, dtype=torch.float64, device=system.x.device)
    for i in settings.progress(range(0, jacobian.num_points, block), "Accumulating features"):
        features = jacobian[slice(i, i + block)].rows() * scale[:, i * outputs : (i + block) * outputs, None]
        for j, left in enumerate(columns):
            for right in columns[: j + 1]:
                moment[:, left, right] += features[..., left].mT @ features[..., right]
    mirror_upper_triangle(moment.mT)
    system.check_finite(moment.diagonal(dim1=-2, dim2=-1))
    roots = system.parameter_variances.sqrt()
    return moment.mul_(roots.unsqueeze(-1)).mul_(roots.unsqueeze(-2))
