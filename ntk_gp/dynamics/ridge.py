"""The ridge that an early stopping time comes closest to."""

from __future__ import annotations

import torch
from torch import Tensor

from .filters import Filter


def best_ridge(filter: Filter, eigenvalues: Tensor, squares: Tensor) -> float:
    r"""The σ² > 0 whose ridge regression is nearest to training stopped at one time, at the training inputs.

    :math:`\sum_i (q_i^\top r)^2 (\lambda_i \phi(\lambda_i) - \lambda_i / (\lambda_i + \sigma^2))^2` is minimised. Along
    one eigenvector alone both agree at :math:`\sigma_i^2 = 1/\phi(\lambda_i) - \lambda_i`, which for gradient flow is
    :math:`\lambda_i / (e^{\lambda_i t} - 1) \le 1/t`. The minimum is between the least and the largest of these.

    :param filter: One time.
    :param eigenvalues: λᵢ, (k,).
    :param squares: (qᵢᵀr)², (k,).
    """
    positive = eigenvalues > 0
    eigenvalues, squares = eigenvalues[positive], squares[positive]
    learned = eigenvalues * filter.learned(eigenvalues)[0]
    alone = (eigenvalues / learned - eigenvalues)[learned > 0]
    largest = max(float(alone.max()) if len(alone) else 0.0, 0.0)
    if not largest > 0:  # all is learned, to rounding
        return 0.0
    least = max(float(alone.min()), 1e-12 * largest)

    def distances(logarithms: Tensor) -> Tensor:
        ridge = logarithms.exp().unsqueeze(-1)
        return (squares * (learned - eigenvalues / (eigenvalues + ridge)).square()).sum(-1)

    low, high = torch.log(eigenvalues.new_tensor([least, largest]))
    for _ in range(12):  # a finer grid around the best point each time
        grid = low + (high - low) * torch.linspace(0, 1, 41, dtype=low.dtype, device=low.device)
        best = int(distances(grid).argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(((low + high) / 2).exp())
