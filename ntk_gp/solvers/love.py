"""LOVE: variances from a low-rank factor in weight space, for very many test points or parameters.

Pleiss, Gardner, Weinberger and Wilson, "Constant-time predictive distributions for Gaussian processes", ICML 2018; with
the rank chosen to a tolerance, and the factor kept as P×t weights, so that no prediction looks at the training data.
"""

from __future__ import annotations

import warnings

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import settings
from ..jacobian.base import Jacobian
from ..jacobian.products import JacobianProduct
from .system import System

_PROBES = 64
_STEPS_BETWEEN_CHECKS = 20
_STOCK_RANK = 100  # GPyTorch's default for max_root_decomposition_size


class LanczosVariance:
    r"""The posterior covariance :math:`J_* (\Sigma - S S^\top) J_*^\top` with :math:`S = \Sigma J^\top R` and
    :math:`R R^\top \approx (K + D)^{-1}` from t steps of Lanczos.

    Projections explain less than the whole: the variance is never below the exact one, and falls to it with t. Steps
    are added until the variances at some of the training points change by less than
    :class:`ntk_gp.settings.love_tolerance`. A `gpytorch.settings.max_root_decomposition_size` that the user has set is
    the rank instead.

    :param system: K + D, without batches.
    """

    def __init__(self, system: System):
        if system.batch > 1:
            raise ValueError(f"fast_pred_var serves a model without batches; this one has {system.batch}.")
        self.system = system
        self.weights = system.features(_inverse_root(system).unsqueeze(0))[0]  # S, (P, t)

    @property
    def rank(self) -> int:
        """t."""
        return self.weights.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.weights.nbytes

    def half_size(self) -> int:
        """t, what a test point needs in memory."""
        return self.rank

    def points_per_block(self, outputs: int) -> int:
        """How many test points may be served at once: an eighth of the memory budget."""
        return max(1, settings.memory_budget.bytes(self.system.x.device) // (64 * outputs * max(1, self.rank)))

    def _half(self, jacobian: Jacobian) -> Tensor:
        """(J S)ᵀ, (B, t, M)."""
        if jacobian.x.requires_grad:
            return jacobian.jvp(self.weights.mT.unsqueeze(0))
        return JacobianProduct.apply(self.weights.mT.unsqueeze(0), jacobian)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        """The posterior covariance, (B, M₁, M₂)."""
        half1 = self._half(jacobian1)
        half2 = half1 if jacobian2 is jacobian1 else self._half(jacobian2)
        return jacobian1.gram(jacobian2, self.system.weights) - half1.mT @ half2

    def variance(self, jacobian: Jacobian) -> Tensor:
        """The posterior variance, (B, M). Never negative."""
        return (jacobian.diagonal(self.system.weights) - self._half(jacobian).square().sum(-2)).clamp_min(0.0)


def _inverse_root(system: System) -> Tensor:
    """R, (N, t), with R Rᵀ ≈ (K + D)⁻¹."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randperm(system.jacobian.num_points, generator=generator)[:_PROBES].to(system.x.device)
    probes = system.jacobian[points]
    cross = system.jacobian.gram(probes, system.weights)[0]
    prior = probes.diagonal(system.weights)[0]
    signs = torch.randint(0, 2, (cross.shape[-1],), generator=generator).mul(2).sub(1)
    basis = [_unit(cross @ signs.to(cross))]
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    limit, fixed = _rank_limit(system)
    last: tuple[int, Tensor] | None = None
    change = float("inf")
    for step in settings.progress(range(1, limit + 1), "Lanczos"):
        image = system.matmul(basis[-1].reshape(1, -1, 1))[0, :, 0]
        diagonal.append(image @ basis[-1])
        q = torch.stack(basis, dim=-1)
        for _ in range(2):  # once more against rounding
            image = image - q @ (q.mT @ image)
        norm = image.norm()
        # Nothing is left but rounding. Less would not do: noise far below the largest eigenvalue still counts.
        exhausted = step == system.num_rows or bool(norm <= 10 * torch.finfo(norm.dtype).eps * diagonal[0])
        if not fixed and (step % _STEPS_BETWEEN_CHECKS == 0 or exhausted):
            half = torch.linalg.solve_triangular(_factor(diagonal, off_diagonal), q.mT @ cross, upper=False)
            variance = (prior - half.square().sum(0)).clamp_min(torch.finfo(prior.dtype).tiny)
            if last is not None:
                change = float(((last[1] - variance) / variance).abs().max()) * last[0] / (step - last[0])
            if change <= settings.love_tolerance.value() or exhausted:
                change = 0.0
                break
            last = (step, variance)
        if exhausted or step == limit:
            break
        off_diagonal.append(norm)
        basis.append(image / norm)
    if not fixed and change > settings.love_tolerance.value():
        warnings.warn(
            f"fast_pred_var stopped at rank {len(diagonal)}, where variances still change by {change:.1e} of "
            f"themselves; {settings.love_tolerance.value():.1e} was asked for. They are too large by about that. "
            "Switch fast_pred_var off for exact variances, or give ntk_gp.settings.memory_budget more.",
            NumericalWarning,
            stacklevel=2,
        )
    q = torch.stack(basis[: len(diagonal)], dim=-1)
    return torch.linalg.solve_triangular(_factor(diagonal, off_diagonal), q.mT, upper=False).mT


def _rank_limit(system: System) -> tuple[int, bool]:
    """The largest rank, and whether the user has fixed it."""
    rank = gpytorch_settings.max_root_decomposition_size.value()
    if rank != _STOCK_RANK:
        return min(rank, system.num_rows), True
    budget = settings.memory_budget.bytes(system.x.device)
    return max(1, min(system.num_rows, budget // (32 * (system.num_rows + system.num_parameters)))), False


def _factor(diagonal: list[Tensor], off_diagonal: list[Tensor]) -> Tensor:
    """The Cholesky factor of Lanczos's tridiagonal matrix."""
    size = len(diagonal)
    matrix = torch.diag(torch.stack(diagonal))
    if size > 1:
        beside = torch.stack(off_diagonal[: size - 1])
        matrix = matrix + torch.diag(beside, 1) + torch.diag(beside, -1)
    return torch.linalg.cholesky(matrix)


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()
