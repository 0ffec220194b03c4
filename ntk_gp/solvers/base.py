"""What every way to solve offers."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod

import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import memory
from ..jacobian.base import Jacobian
from .system import System

# What a factorisation may lose before more is done, by the dtype of the inputs. Means and variances lose up to ten
# times as much; they are promised to 1e-8 and 5e-3.
ACCURATE = {torch.float64: 3e-10, torch.float32: 1e-5}

# What it may lose, before features are orthogonalised in its place.
MENDABLE = {torch.float64: 1e-5, torch.float32: 1e-2}


class Solver(ABC):
    """One way to solve with a :class:`System`; everything in float64, batches first.

    Operators carry it by reference: it must have no method of a tensor's that converts (`to`, `half`, `clone`, …).

    The posterior covariance is k(x, x') − c(x)ᵀ c(x') in function space, and c(x)ᵀ c(x') in weight space; c has t rows.

    :param system: K + D.
    """

    def __init__(self, system: System):
        self.system = system

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """(K + D)⁻¹ rhs, (B, N, r)."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log |K + D|, (B,)."""

    def mean_weights(self, residual: Tensor) -> Tensor:
        """ŵ = Σ Jᵀ (K + D)⁻¹ r for every row r: (B, r, N) to (B, r, P). The posterior mean is f(x) + J(x) ŵ."""
        return self.system.features(self.solve(residual.mT)).mT

    @abstractmethod
    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        """The posterior covariance, (B, M₁, M₂)."""

    @abstractmethod
    def variance(self, jacobian: Jacobian) -> Tensor:
        """The posterior variance, (B, M). Never negative."""

    @abstractmethod
    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        """Of the log-determinant with respect to each group's variance, (B, G), and to each row's noise, (B, N)."""

    def extended(self, system: System) -> Solver | None:
        """The solver of a system that begins with this one's rows, made from this one; None if nothing is saved."""
        return None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @abstractmethod
    def whitened_size(self) -> int:
        """t, the height of c."""

    def points_per_block(self, outputs: int) -> int:
        """How many test points' c may be held at once: an eighth of the memory budget."""
        budget = memory.TEST_POINTS.bytes(self.system.x.device)
        return max(1, budget // (8 * self.system.batch * outputs * max(1, self.whitened_size())))


def rounding_error(cholesky: Tensor) -> float:
    """About the relative error of a factorised matrix's inverse: its condition number, estimated, times eps."""
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    return torch.finfo(cholesky.dtype).eps * float(condition.amax())


def digits_lost(cholesky: Tensor) -> float:
    """A bound, as far as one diagonal can tell, on the relative error of a solution: trace times eps over the smallest.

    :func:`rounding_error` is about its usual size.
    """
    smallest = cholesky.diagonal(dim1=-2, dim2=-1).amin(-1).square()
    trace = cholesky.square().sum((-2, -1))
    return torch.finfo(cholesky.dtype).eps * float((trace / smallest).amax())


def needs_orthogonalisation(system: System, factor: Tensor | None) -> bool:
    """Whether a Cholesky factor does not exist in float64, or has lost more than refinement, of second order, mends."""
    return factor is None or not digits_lost(factor) <= MENDABLE.get(system.dtype, MENDABLE[torch.float32])


def not_positive_definite(system: System) -> NotPSDError:
    """What is raised where nothing that fits in the memory budget solves."""
    return NotPSDError(
        f"K + D of {system.num_rows} rows is not positive definite in float64: the largest prior variance is "
        f"{float(system.jacobian.diagonal(system.variances).amax()):.1e}, the smallest noise "
        f"{float(system.noise.amin()):.1e}. The features could be orthogonalised instead, but {system.num_rows} rows "
        f"of {system.num_parameters} features do not fit in ntk_gp.settings.memory_budget. Raise it, or the noise, or "
        "lower the outputscale."
    )


def accuracy(system: System) -> float:
    """How large a rounding error may be."""
    return ACCURATE.get(system.dtype, ACCURATE[torch.float32])


def warn_of_rounding(cholesky: Tensor) -> None:
    """Says that digits are lost."""
    warnings.warn(
        f"With so little noise, rounding leaves a relative error of up to about {10 * rounding_error(cholesky):.0e} in "
        "the posterior, and there is no memory for a more exact factorisation. Give ntk_gp.settings.memory_budget "
        "more, or the likelihood more noise.",
        NumericalWarning,
        stacklevel=2,
    )
