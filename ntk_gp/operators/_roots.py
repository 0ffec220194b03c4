"""Square roots of positive semidefinite matrices."""

from __future__ import annotations

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor


def square_root(matrix: Tensor) -> Tensor:
    """R with R Rᵀ equal to a positive semidefinite matrix: by Cholesky, or by eigenvalues where it is singular."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info.any():
        return factor
    if matrix.requires_grad:  # equal eigenvalues have no derivative
        return psd_safe_cholesky(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)
