"""Iteration: conjugate gradients, preconditioned by a Nyström approximation, where nothing exact fits in memory."""

from __future__ import annotations

import warnings

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import settings
from ..jacobian.base import Jacobian
from ..jacobian.products import JacobianProduct
from .base import Solver
from .system import System

_LANDMARKS = 2000
_STOCK_TOLERANCES = (1, 0.01)  # GPyTorch's defaults for training and prediction: far too loose for an NTK


class IterativeSolver(Solver):
    """Preconditioned conjugate gradients in float64: J and Jᵀ once for each step and column.

    :param system: K + D, without batches.
    """

    def __init__(self, system: System):
        super().__init__(system)
        self.preconditioner = NystromPreconditioner(system)

    def solve(self, rhs: Tensor) -> Tensor:
        return conjugate_gradients(self.system, rhs, self.preconditioner)

    def logdet(self) -> Tensor:
        raise NotImplementedError("Log-determinants of systems this large are estimated by GPyTorch.")

    def half_size(self) -> int:
        return self.system.num_rows

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("Log-determinants of systems this large are estimated by GPyTorch.")

    def _cross(self, jacobian: Jacobian) -> Tensor:
        system = self.system
        tangents = jacobian.rows() * system.parameter_variances.unsqueeze(-2)
        return JacobianProduct.apply(tangents, system.jacobian).mT

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        cross1 = self._cross(jacobian1)
        cross2 = cross1 if jacobian2 is jacobian1 else self._cross(jacobian2)
        return jacobian1.gram(jacobian2, self.system.weights) - cross1.mT @ _Solve.apply(cross2, self)

    def variance(self, jacobian: Jacobian) -> Tensor:
        cross = self._cross(jacobian)
        prior = jacobian.diagonal(self.system.weights)
        return (prior - (cross * _Solve.apply(cross, self)).sum(-2)).clamp_min(0.0)


class _Solve(torch.autograd.Function):
    """A⁻¹ b, differentiable with respect to b."""

    @staticmethod
    def forward(ctx, rhs: Tensor, solver: IterativeSolver) -> Tensor:
        ctx.solver = solver
        return solver.solve(rhs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.solver.solve(grad), None


class NystromPreconditioner:
    r"""K replaced by what m training points explain of it, :math:`K_{Xm} K_{mm}^{-1} K_{mX} = U \hat\Lambda U^\top`.

    In the whitened system :math:`D^{-1/2} K D^{-1/2} + I`. What is not in the span of U is scaled as the smallest
    eigenvalue there (Frangella, Tropp and Udell, "Randomized Nyström preconditioning", 2023, equation 1.3).

    :param system: K + D, without batches.
    """

    def __init__(self, system: System):
        jacobian, outputs = system.jacobian, system.jacobian.function.num_outputs
        budget = settings.memory_budget.bytes(system.x.device)
        rank = max(1, min(_LANDMARKS, system.num_rows // 2, budget // (4 * 8 * system.num_rows)) // outputs)
        generator = torch.Generator().manual_seed(0)
        landmarks = torch.randperm(jacobian.num_points, generator=generator)[:rank].sort().values
        chosen = jacobian[landmarks.to(system.x.device)]
        self.scale = system.noise.rsqrt()
        cross = jacobian.gram(chosen, system.weights)[0].mul_(self.scale.mT)
        core = psd_safe_cholesky(chosen.gram(chosen, system.weights)[0])
        factor = torch.linalg.solve_triangular(core.mT, cross, upper=True, left=False)
        values, vectors = torch.linalg.eigh(factor.mT @ factor)
        values = values.clamp_min(values[-1] * 1e-14)
        self.basis = factor @ (vectors * values.rsqrt())
        self.shrink = (values[0] + 1) / (values + 1) - 1

    def __call__(self, rhs: Tensor) -> Tensor:
        """M⁻¹ rhs for a whitened rhs (N, r)."""
        return rhs + self.basis @ (self.shrink.unsqueeze(-1) * (self.basis.mT @ rhs))


def tolerance() -> float:
    """The user's tolerance where one was set in GPyTorch, or else this package's."""
    value = gpytorch_settings.cg_tolerance.value()
    return settings.solve_tolerance.value() if value in _STOCK_TOLERANCES else value


def conjugate_gradients(system: System, rhs: Tensor, preconditioner: NystromPreconditioner) -> Tensor:
    """(K + D)⁻¹ rhs for rhs (1, N, r), each column until its own true residual is small; warns where it is not.

    :param system: K + D, without batches.
    :param rhs: Right-hand sides.
    :param preconditioner: Approximates the whitened system.
    """
    target = tolerance()
    solution = torch.zeros_like(rhs[0])
    residual = rhs[0].clone()
    norms = residual.norm(dim=0).clamp_min(torch.finfo(rhs.dtype).tiny)
    steps = gpytorch_settings.max_cg_iterations.value()
    scale = preconditioner.scale.mT
    direction = inner = None
    for _ in settings.progress(range(steps), "Conjugate gradients"):
        if bool((residual.norm(dim=0) <= target * norms).all()):
            residual = rhs[0] - system.matmul(solution.unsqueeze(0))[0]  # recurrences drift: look at the true one
            if bool((residual.norm(dim=0) <= target * norms).all()):
                break
            direction = inner = None
        correction = preconditioner(scale * residual)
        new_inner = (scale * residual * correction).sum(0)
        correction = scale * correction
        direction = correction if direction is None else correction + (new_inner / inner) * direction
        inner = new_inner
        image = system.matmul(direction.unsqueeze(0))[0]
        curvature = (direction * image).sum(0)
        length = torch.where(curvature > 0, inner / curvature.where(curvature > 0, 1.0), 0.0)
        solution += length * direction
        residual -= length * image
    else:
        residual = rhs[0] - system.matmul(solution.unsqueeze(0))[0]
    worst = float((residual.norm(dim=0) / norms).max())
    if not worst <= target:
        warnings.warn(
            f"Conjugate gradients stopped after {steps} steps with a relative residual of {worst:.1e}; {target:.1e} "
            f"was asked for (N = {system.num_rows}). The result is that inexact. Allow more steps "
            "(gpytorch.settings.max_cg_iterations), more memory for an exact solve (ntk_gp.settings.memory_budget), or "
            "more noise.",
            NumericalWarning,
            stacklevel=2,
        )
    return solution.unsqueeze(0)
