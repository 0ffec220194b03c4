"""Function space: the Cholesky factor of K + D, N×N."""

from __future__ import annotations

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from ..jacobian.base import Jacobian
from .base import Solver
from .system import System


class FunctionSpaceSolver(Solver):
    """Exact, by the Cholesky factor L of K + D: N²·Σ(d_in + d_out) + N³/3 flops, 8 N² bytes.

    :param system: K + D.
    :param cholesky: L, where it is known already.
    """

    def __init__(self, system: System, cholesky: Tensor | None = None):
        super().__init__(system)
        self.cholesky = _cholesky_in_place(system) if cholesky is None else cholesky

    def extended(self, system: System) -> FunctionSpaceSolver | None:
        """Adds m rows to the factor: N² m flops in place of N³/3."""
        if not system.fits(2.0 * system.batch * system.num_rows**2):
            return None
        added = system.rows_after(self.system)
        old, new = self.system.num_rows, system.num_rows
        half = self.half_at(added.jacobian)
        schur = added.dense() - half.mT @ half
        factor = torch.zeros(system.batch, new, new, dtype=torch.float64, device=system.x.device)
        factor[:, :old, :old] = self.cholesky
        factor[:, old:, :old] = half.mT
        factor[:, old:, old:] = psd_safe_cholesky(schur)
        return FunctionSpaceSolver(system, factor)

    def solve(self, rhs: Tensor) -> Tensor:
        return torch.cholesky_solve(rhs, self.cholesky)

    def logdet(self) -> Tensor:
        return 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        system = self.system
        inverse = torch.cholesky_inverse(self.cholesky)
        groups = torch.eye(system.weights.shape[1], dtype=torch.float64, device=system.x.device)
        by_group = [
            (inverse * system.linearization.gram(system.jacobian, system.jacobian, one[None])).sum((-2, -1))
            for one in groups
        ]
        return torch.stack(by_group, dim=-1), inverse.diagonal(dim1=-2, dim2=-1)

    @property
    def nbytes(self) -> int:
        return self.cholesky.nbytes

    def half_size(self) -> int:
        return self.system.num_rows

    def half_at(self, jacobian: Jacobian) -> Tensor:
        """L⁻¹ K(X, x)."""
        return torch.linalg.solve_triangular(self.cholesky, self._cross(jacobian), upper=False)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        prior = jacobian1.gram(jacobian2, self.system.weights)
        half1 = self.half_at(jacobian1)
        half2 = half1 if jacobian2 is jacobian1 else self.half_at(jacobian2)
        return prior - half1.mT @ half2

    def variance(self, jacobian: Jacobian) -> Tensor:
        prior = jacobian.diagonal(self.system.weights)
        # What rounding leaves below zero is zero as far as float64 can tell.
        return (prior - self.half_at(jacobian).square().sum(-2)).clamp_min(0.0)


def _cholesky_in_place(system: System) -> Tensor:
    matrix = system.dense()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
    factor, info = torch.linalg.cholesky_ex(matrix)
    del matrix
    if not info.any():
        return factor
    system.check_finite(diagonal)
    return psd_safe_cholesky(system.dense())  # with GPyTorch's jitter, and its warning
