"""Square roots of positive semidefinite matrices."""

from __future__ import annotations

import warnings

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor


def square_root(matrix: Tensor) -> Tensor:
    """R with R Rᵀ equal to a positive semidefinite matrix: by Cholesky, or by eigenvalues where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return factor
    if matrix.requires_grad:  # equal eigenvalues have no derivative
        return psd_safe_cholesky(matrix)
    return root_by_eigenvalues(matrix)


def root_by_eigenvalues(matrix: Tensor) -> Tensor:
    """R with R Rᵀ equal to a positive semidefinite matrix, which may be singular."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)


def warn_of_low_rank(size: int) -> None:
    """Says that a root, such as samples are drawn from, is GPyTorch's estimate."""
    rank = min(size, gpytorch_settings.max_root_decomposition_size.value())
    warnings.warn(
        f"The square root of a matrix of {size} rows does not fit in ntk_gp.settings.memory_budget: samples are drawn "
        f"from one of rank {rank}, without the rest of the variance. Give the budget more, draw at fewer points, or "
        "draw functions with ntk_gp.draw_functions.",
        NumericalWarning,
        stacklevel=3,
    )
