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
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
    condition = (diagonal.amax(-1) / diagonal.amin(-1)).square()
    return torch.finfo(cholesky.dtype).eps * float(condition.amax())


def digits_lost(cholesky: Tensor) -> float:
    """A bound on the relative error of a solution: eps times the trace of L Lᵀ over its smallest eigenvalue.

    That is as far as the factor's diagonal tells: its smallest square stands for the eigenvalue. The error is usually
    no larger than :func:`rounding_error`.

    :param cholesky: L, (B, N, N).
    """
    smallest = cholesky.diagonal(dim1=-2, dim2=-1).amin(-1).square()
    trace = cholesky.square().sum((-2, -1))
    return torch.finfo(cholesky.dtype).eps * float((trace / smallest).amax())


def needs_orthogonalisation(system: System, factor: Tensor | None) -> bool:
    """Whether there is no Cholesky factor in float64, or it has lost more digits than a step of refinement restores.

    :param factor: L, (B, N, N), if the factorisation has found one.
    """
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
    """How large the rounding error of a system's factor may be before it is refined."""
    return ACCURATE.get(system.dtype, ACCURATE[torch.float32])


def warn_of_rounding(cholesky: Tensor) -> None:
    """Says that a posterior made with this factor, (B, N, N), has lost digits."""
    warnings.warn(
        f"With so little noise, rounding leaves a relative error of up to about {10 * rounding_error(cholesky):.0e} in "
        "the posterior, and there is no memory for a more exact factorisation. Give ntk_gp.settings.memory_budget "
        "more, or the likelihood more noise.",
        NumericalWarning,
        stacklevel=2,
    )
