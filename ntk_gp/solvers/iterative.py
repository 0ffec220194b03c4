"""Iteration: conjugate gradients, preconditioned by a Nyström approximation, where nothing exact fits in memory."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import memory, settings
from ..distributed.shards import ALL_HERE, Shards
from ..jacobian.base import Jacobian
from ..stock import is_stock
from .base import Solver
from .function_space import FunctionSpaceSolver
from .system import System

logger = logging.getLogger("ntk_gp")

# An NTK's eigenvalues fall fast: with so many landmarks a handful of steps is left.
_LANDMARKS = 1000
# Matrices of landmarks and rows that must fit in the memory budget: those that are made at once, and room for the rest.
_COPIES = 8
# Steps of a solve with them, usually: to compare costs by.
_USUAL_STEPS = 10


class Multiplies(Protocol):
    """What conjugate gradients ask of K + D: its product with (1, N, r), in float64."""

    def matmul(self, rhs: Tensor) -> Tensor:
        """Exactly."""

    def single_precision_matmul(self, rhs: Tensor) -> Tensor:
        """To the precision that is asked for."""


@dataclass(frozen=True)
class SolveReport:
    """How an iterative solve ended.

    :param steps: Steps taken.
    :param residual: The largest relative residual ‖b − A x̂‖ / ‖b‖ of any column, measured in float64.
    :param error: An estimate of the largest relative error ‖x − x̂‖ / ‖x‖ in the norm of A, by the preconditioner.
    :param tolerance: The residual asked for.
    """

    steps: int
    residual: float
    error: float
    tolerance: float

    @property
    def converged(self) -> bool:
        return self.residual <= self.tolerance

    def warn(self, what: str, rows: int, otherwise: str) -> None:
        """Says that a solve stopped short of its tolerance, how far, and what to do.

        :param what: The solve, as the beginning of a sentence.
        :param rows: N.
        :param otherwise: What else to allow, beside steps and memory.
        """
        warnings.warn(
            f"{what} stopped after {self.steps} steps with a relative residual of {self.residual:.1e} (and an error of "
            f"about {self.error:.1e}); {self.tolerance:.1e} was asked for (N = {rows}). The result is that inexact. "
            "Allow more steps (gpytorch.settings.max_cg_iterations), more memory for an exact solve "
            f"(ntk_gp.settings.memory_budget), {otherwise}.",
            NumericalWarning,
            stacklevel=3,
        )


class IterativeSolver(Solver):
    """Preconditioned conjugate gradients in float64, all columns at once: J and Jᵀ once for each step and column.

    :param system: K + D, without batches.

    :ivar SolveReport report: How the last solve ended.
    """

    name = "iterative"
    is_exact = False
    keeps_small_variances = False
    report: SolveReport | None = None

    @classmethod
    def cost(cls, system: System) -> float:
        """The preconditioner, and as many steps with one column as are usual; each further column takes as many."""
        rows, jacobian = system.num_rows, system.jacobian
        landmarks = cls.nbytes_needed(system) / (8 * _COPIES * jacobian.shards.most_rows(rows))
        cross = 2 * landmarks / rows * jacobian.gram_cost(jacobian)  # that is for one triangle of N²
        return cross + 2 * rows * landmarks**2 + _USUAL_STEPS * jacobian.product_cost(jacobian)

    @classmethod
    def nbytes_needed(cls, system: System) -> float:
        """The preconditioner, of as many landmarks as are useful and the memory budget has room for."""
        held = system.jacobian.shards.most_rows(system.num_rows)
        useful = 8.0 * _COPIES * held * min(_LANDMARKS, max(1, system.num_rows // 2))
        least = 8.0 * _COPIES * held
        return max(least, min(useful, _COPIES * memory.PRECONDITIONER.bytes(system.x.device)))

    @classmethod
    def obstacle(cls, system: System) -> str | None:
        """Batches; memory is none, with one landmark it takes a few vectors."""
        return None if system.batch == 1 else f"solves no batches of systems, and there are {system.batch}"

    def __init__(self, system: System):
        super().__init__(system)
        system.check_finite(self.preconditioner.factors)  # it is made here

    @cached_property
    def preconditioner(self) -> NystromPreconditioner:
        return NystromPreconditioner.of(self.system)

    def __getstate__(self) -> dict[str, Any]:
        """Without a preconditioner of which other processes have their rows: it is made again where it is asked for."""
        whole = self.preconditioner.shards.is_whole
        return {name: value for name, value in vars(self).items() if whole or name != "preconditioner"}

    def solve(self, rhs: Tensor) -> Tensor:
        solution, self.report = conjugate_gradients(self.system, rhs[0], self.preconditioner)
        logger.debug("Conjugate gradients: %s", self.report)
        if self.report.converged:
            return solution.unsqueeze(0)
        if FunctionSpaceSolver.fits(self.system):
            return FunctionSpaceSolver(self.system).solve(rhs)
        self.report.warn("Conjugate gradients", self.system.num_rows, "or more noise")
        return solution.unsqueeze(0)

    def logdet(self) -> Tensor:
        return self.preconditioner.logdet() + _trace_of_log(self.system, self.preconditioner)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        """Estimated at random vectors, as a difference from the preconditioner's, whose derivatives are known."""
        system, preconditioner = self.system, self.preconditioner
        probes = _probes(system)
        solved = self.solve(probes.unsqueeze(0))[0]
        known = preconditioner.scale.mT * preconditioner(preconditioner.scale.mT * probes)
        inverse_diagonal = preconditioner.inverse_diagonal() + (probes * (solved - known)).mean(-1)
        if system.variances.shape[1] == 1:  # s tr(A⁻¹K) = N − tr(A⁻¹D)
            by_variance = (system.num_rows - (inverse_diagonal * system.noise[0]).sum()) / system.variances[0, 0]
            return by_variance.reshape(1, 1), inverse_diagonal.unsqueeze(0)
        products = (system.jacobian.vjp(probes.mT.unsqueeze(0)) * system.jacobian.vjp(solved.mT.unsqueeze(0))).mean(-2)
        return system.jacobian.function.sum_by_group(products), inverse_diagonal.unsqueeze(0)

    @property
    def nbytes(self) -> int:
        return self.preconditioner.nbytes

    def whitened_size(self) -> int:
        return self.system.num_rows

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        cross1 = self.system.cross(jacobian1)
        cross2 = cross1 if jacobian2 is jacobian1 else self.system.cross(jacobian2)
        return jacobian1.gram(jacobian2, self.system.variances) - cross1.mT @ _Solve.apply(cross2, self)

    def variance(self, jacobian: Jacobian) -> Tensor:
        cross = self.system.cross(jacobian)
        prior = jacobian.diagonal(self.system.variances)
        return (prior - (cross * _Solve.apply(cross, self)).sum(-2)).clamp_min(0.0)


class _Solve(torch.autograd.Function):
    """A⁻¹ b, differentiable with respect to b (B, N, r)."""

    @staticmethod
    def forward(ctx, rhs: Tensor, solver: IterativeSolver) -> Tensor:
        ctx.solver = solver
        columns = rhs.transpose(0, 1).reshape(1, rhs.shape[1], -1)
        solution = solver.solve(columns)
        return solution.reshape(rhs.shape[1], rhs.shape[0], rhs.shape[2]).transpose(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Solve.apply(grad, ctx.solver), None


class NystromPreconditioner:
    r"""K replaced by what m training points explain of it, :math:`K_{Xm} K_{mm}^{-1} K_{mX} = U \hat\Lambda U^\top`.

    In the whitened system :math:`D^{-1/2} K D^{-1/2} + I`. What is not in the span of U is scaled as the smallest
    eigenvalue there (Frangella, Tropp and Udell, "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl.
    2023).

    Where rows are shared among ranks, each holds its own of U.

    :param cross: The landmarks' columns of K, (N, m), in float64, or the own rows of them; overwritten.
    :param core: Of these, the landmarks' rows, (m, m).
    :param noise: The diagonal of D, (N,). Positive.
    :param shards: Which rows are whose.
    """

    @classmethod
    def of(cls, system: System) -> NystromPreconditioner:
        """For K + D without batches."""
        jacobian, shards, outputs = system.jacobian, system.jacobian.shards, system.jacobian.function.num_outputs
        rows = system.num_rows
        rank = max(1, most_landmarks(rows, system.x.device, held=shards.most_rows(rows)) // outputs)
        chosen = jacobian[drawn_landmarks(jacobian.num_points, rank).to(system.x.device)]
        cross = jacobian.own.gram(chosen, system.variances)[0]
        system.check_finite(shards.summed(torch.stack(cross.aminmax())))
        return cls(cross, chosen.gram(chosen, system.variances)[0], system.noise[0], shards)

    def __init__(self, cross: Tensor, core: Tensor, noise: Tensor, shards: Shards = ALL_HERE):
        self.noise = noise
        self.scale = noise.rsqrt().unsqueeze(0)
        self.shards = shards
        cross.mul_(shards.own(self.scale, 1).mT)
        size = core.diagonal().mean()  # jitter is for matrices of size one
        core = psd_safe_cholesky(core / size) * size.sqrt()
        factor = torch.linalg.solve_triangular(core.mT, cross, upper=True, left=False)
        del cross
        values, vectors = torch.linalg.eigh(shards.summed(factor.mT @ factor))
        values = values.clamp_min(values[-1] * 1e-14)
        self.basis = factor @ (vectors * values.rsqrt())
        self.factors = (values[0] + 1) / (values + 1)  # what M⁻¹ multiplies the directions U by

    def __call__(self, rhs: Tensor) -> Tensor:
        """M⁻¹ rhs for a whitened rhs (N, r)."""
        return rhs + self._scaled(rhs, self.factors - 1)

    def root(self, rhs: Tensor) -> Tensor:
        """M^{-1/2} rhs."""
        return rhs + self._scaled(rhs, self.factors.sqrt() - 1)

    def _scaled(self, rhs: Tensor, factors: Tensor) -> Tensor:
        """U diag(factors) Uᵀ rhs."""
        inside = self.shards.summed(self.basis.mT @ self.shards.own(rhs, 0))
        return self.shards.gathered(self.basis @ (factors.unsqueeze(-1) * inside), 0)

    def logdet(self) -> Tensor:
        """log |D^{1/2} M D^{1/2}|."""
        return self.noise.log().sum() - self.factors.log().sum()

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of D^{-1/2} M⁻¹ D^{-1/2}."""
        return (1 + self.shards.gathered(self.basis.square() @ (self.factors - 1), 0)) / self.noise

    @property
    def nbytes(self) -> int:
        """Bytes held, by the rank that has most rows."""
        return self.basis[:1].nbytes * self.shards.most_rows(len(self.basis))


def most_landmarks(rows: int, device: torch.device, held: int | None = None) -> int:
    """How many landmarks are useful for so many rows, and fit in the memory budget.

    :param held: Of how many rows this process holds them; of all by default.
    """
    held = rows if held is None else held
    return max(1, min(_LANDMARKS, rows // 2, memory.PRECONDITIONER.bytes(device) // (8 * held)))


def drawn_landmarks(points: int, rank: int) -> Tensor:
    """Which points are landmarks, (rank,): drawn at random."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randperm(points, generator=generator, device="cpu")[:rank].sort().values


def tolerance() -> float:
    """The user's tolerance where one was set in GPyTorch (its defaults are far too loose), or else this package's."""
    value = gpytorch_settings.cg_tolerance.value()
    return settings.solve_tolerance.value() if is_stock(value) else value


def conjugate_gradients(
    system: Multiplies, rhs: Tensor, preconditioner: NystromPreconditioner
) -> tuple[Tensor, SolveReport]:
    """(K + D)⁻¹ rhs for rhs (N, r), until every column's own residual is small, and how that went.

    :param system: K + D, without batches, as what multiplies by it.
    :param rhs: Right-hand sides.
    :param preconditioner: Approximates the whitened system.
    """
    target, scale = tolerance(), preconditioner.scale.mT
    solution = torch.zeros_like(rhs)
    residual = rhs.clone()
    bounds = target * rhs.norm(dim=0).clamp_min(torch.finfo(rhs.dtype).tiny)
    direction, inner, steps = torch.zeros_like(rhs), torch.zeros_like(rhs[0]), 0
    limit = gpytorch_settings.max_cg_iterations.value()
    for steps in settings.progress(range(limit), "Conjugate gradients"):  # noqa: B007
        if bool((residual.norm(dim=0) <= bounds).all()):
            residual = _residual(system, rhs, solution)  # recurrences drift: look at the true one
            if bool((residual.norm(dim=0) <= bounds).all()):
                break
            inner = torch.zeros_like(inner)  # start over from here
        correction = scale * preconditioner(scale * residual)
        new_inner = (residual * correction).sum(0)
        direction = correction + torch.where(inner > 0, new_inner / inner.where(inner > 0, 1.0), 0.0) * direction
        inner = new_inner
        image = system.single_precision_matmul(direction.unsqueeze(0))[0]
        curvature = (direction * image).sum(0)
        length = torch.where(curvature > 0, inner / curvature.where(curvature > 0, 1.0), 0.0)
        solution += length * direction
        residual -= length * image
    else:
        steps, residual = limit, _residual(system, rhs, solution)
    relative = float((residual.norm(dim=0) / bounds).max()) * target
    energy = (residual * (scale * preconditioner(scale * residual))).sum(0).clamp_min(0.0)
    error = float((energy / (rhs * solution).sum(0).abs().clamp_min(torch.finfo(rhs.dtype).tiny)).max()) ** 0.5
    return solution, SolveReport(steps, relative, error, target)


def _residual(system: Multiplies, rhs: Tensor, solution: Tensor) -> Tensor:
    return rhs - system.matmul(solution.unsqueeze(0))[0]


def _probes(system: System) -> Tensor:
    """Random signs, (N, probes)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (system.num_rows, gpytorch_settings.num_trace_samples.value())
    return torch.randint(0, 2, shape, generator=generator, device="cpu").mul(2).sub(1).to(system.x)


def _trace_of_log(system: System, preconditioner: NystromPreconditioner) -> Tensor:
    """tr log (M^{-1/2} D^{-1/2} A D^{-1/2} M^{-1/2}), (1,), by stochastic Lanczos quadrature.

    Ubaru, Chen and Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl.
    2017. The matrix is close to a multiple of the identity, so that few steps and few random vectors do.
    """
    scale = preconditioner.scale.mT
    vector = _probes(system) / system.num_rows**0.5
    previous = torch.zeros_like(vector)
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = [torch.zeros_like(vector[0])]
    for _ in range(min(gpytorch_settings.max_lanczos_quadrature_iterations.value(), system.num_rows)):
        image = scale * preconditioner.root(vector)
        image = preconditioner.root(scale * system.matmul(image.unsqueeze(0))[0])
        diagonal.append((vector * image).sum(0))
        image = image - diagonal[-1] * vector - off_diagonal[-1] * previous
        off_diagonal.append(image.norm(dim=0))
        if bool((off_diagonal[-1] <= 1e-8 * diagonal[-1]).all()):
            break
        previous, vector = vector, image / off_diagonal[-1].clamp_min(torch.finfo(image.dtype).tiny)
    beside = torch.stack(off_diagonal[1 : len(diagonal)], dim=-1) if len(diagonal) > 1 else diagonal[0].new_zeros(0)
    matrix = torch.diag_embed(torch.stack(diagonal, dim=-1))
    if len(diagonal) > 1:
        matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    logs = values.clamp_min(torch.finfo(values.dtype).tiny).log()
    return system.num_rows * (vectors[:, 0].square() * logs).sum(-1).mean().reshape(1)
