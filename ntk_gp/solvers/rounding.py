"""What rounding costs a factorisation, how much of that is allowed, and what is said where it is more."""

from __future__ import annotations

import warnings

import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .system import System

# The relative rounding error that a factor may have before more is done, by the dtype of the inputs. A mean or variance
# made with it may be off by ten times as much: 3e-9 for float64 inputs, which are promised 1e-8, and 1e-4 for float32
# ones, which are promised 5e-3.
ACCURATE = {torch.float64: 3e-10, torch.float32: 1e-5}

# The error that one more step of refinement still repairs; beyond, features are orthogonalised instead.
MENDABLE = {torch.float64: 1e-5, torch.float32: 1e-2}


def rounding_error(cholesky: Tensor) -> float:
    """About the relative error of a factorised matrix's inverse: eps times its condition number, which is estimated
    from the diagonal of the factor.

    :param cholesky: L, (B, N, N).
    """
    return rounding_error_by(cholesky.diagonal(dim1=-2, dim2=-1))


def rounding_error_by(diagonal: Tensor) -> float:
    """The same, from the diagonal of the factor, (B, N)."""
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    return torch.finfo(diagonal.dtype).eps * float(condition.amax())


def digits_lost(cholesky: Tensor) -> float:
    """A bound on the relative error of a solution: eps times the trace of L Lᵀ over its smallest eigenvalue.

    That is as far as the factor's diagonal tells: its smallest square stands for the eigenvalue. The error is usually
    no larger than :func:`rounding_error`.

    :param cholesky: L, (B, N, N).
    """
    return digits_lost_by(cholesky.diagonal(dim1=-2, dim2=-1), cholesky.square().sum((-2, -1)))


def digits_lost_by(diagonal: Tensor, trace: Tensor) -> float:
    """The same, from the diagonal of the factor, (B, N), and the trace of L Lᵀ, (B,)."""
    smallest = diagonal.amin(-1).square()
    return torch.finfo(diagonal.dtype).eps * float((trace / smallest).amax())


def needs_orthogonalisation(system: System, factor: Tensor | None) -> bool:
    """Whether there is no Cholesky factor in float64, or it has lost more digits than a step of refinement restores.

    :param factor: L, (B, N, N), if the factorisation has found one.
    """
    return factor is None or is_beyond_repair(system, digits_lost(factor))


def is_beyond_repair(system: System, lost: float) -> bool:
    """Whether that many digits lost, a relative error, are more than a step of refinement restores."""
    return not lost <= MENDABLE.get(system.dtype, MENDABLE[torch.float32])


def not_positive_definite(system: System, way_out: str | None = None) -> NotPSDError:
    """What is raised where nothing that fits in the memory budget solves.

    :param way_out: What else could be done; by default that memory for orthogonalisation is lacking.
    """
    if way_out is None:
        way_out = (
            f"The features could be orthogonalised instead, but {system.num_rows} rows of {system.num_parameters} "
            "features do not fit in ntk_gp.settings.memory_budget. Raise it, or the noise, or lower the outputscale."
        )
    return NotPSDError(
        f"K + D of {system.num_rows} rows is not positive definite in float64: the largest prior variance is "
        f"{float(system.jacobian.diagonal(system.variances).amax()):.1e}, the smallest noise "
        f"{float(system.noise.amin()):.1e}. {way_out}"
    )


def accuracy(system: System) -> float:
    """How large the rounding error of a system's factor may be before it is refined."""
    return ACCURATE.get(system.dtype, ACCURATE[torch.float32])


def warn_of_rounding(cholesky: Tensor) -> None:
    """Says that a posterior made with this factor, (B, N, N), has lost digits."""
    warn_of_rounding_by(cholesky.diagonal(dim1=-2, dim2=-1))


def warn_of_rounding_by(diagonal: Tensor) -> None:
    """The same, from the diagonal of the factor, (B, N)."""
    reason = "there is no memory for a more exact factorisation. Give ntk_gp.settings.memory_budget more, or the "
    _warn(diagonal, f"{reason}likelihood more noise")


def warn_of_rounding_over_ranks(diagonal: Tensor) -> None:
    """The same, in function space over ranks."""
    reason = "features are not orthogonalised over ranks. Give the likelihood more noise, or set "
    _warn(diagonal, f"{reason}ntk_gp.settings.solver('weight_space')")


def _warn(diagonal: Tensor, reason: str) -> None:
    warnings.warn(
        f"With so little noise, rounding leaves a relative error of up to about {10 * rounding_error_by(diagonal):.0e} "
        f"in the posterior, and {reason}.",
        NumericalWarning,
        stacklevel=3,
    )
