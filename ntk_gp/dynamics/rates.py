"""The largest learning rate that gradient descent is stable with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .lanczos import Lanczos
from .problem import LOSSES, Inputs, check_loss

# How far below the stable rate one may end, and how likely the random vector is to hide a larger eigenvalue than that.
_SLACK = 0.05
_RISK = 1e-6
# Fewer rows than this have all eigenvalues computed.
_FEW = 500


def largest_stable_rate(source: nn.Module, train_x: Tensor, *, num_outputs: int = 1, loss: str = "half_sum") -> float:
    r"""The learning rate 2 / λ_max below which gradient descent on squared loss is stable, or a little less.

    Where it is linear, a network trained at a rate η diverges if and only if :math:`\eta\,\lambda_{\max} > 2`, where
    λ_max is the largest eigenvalue of K on the training inputs, times what the loss multiplies half the sum of squares
    by. For more than 500 rows λ_max comes from Lanczos' process with a random vector. What that finds is at most λ_max;
    it is raised to the bound of Kuczyński and Woźniakowski ("Estimating the largest eigenvalue by the power and
    Lanczos algorithms with a random start", SIAM J. Matrix Anal. Appl. 1992), so that the rate is at most 5 % below the
    stable one, and above it with a probability of less than 10⁻⁶. That takes some 45 products with K, and no more
    memory than as many vectors.

    :param source: The network, or its kernel. A kernel's prior variances count as rates of their own: with
        Σ ≠ I, the rate is for descent by Σ times the gradient.
    :param train_x: Training inputs, (n, d) or (n, *input_shape).
    :param num_outputs: C, for a network with several outputs.
    :param loss: `"half_sum"` of squares, `"sum"`, `"half_mse"` or `"mse"` (:class:`torch.nn.MSELoss`), which is over
        all n·C numbers. Rates are those of its gradient.
    :raises ValueError: For unknown losses, and where the kernel does.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> rate = largest_stable_rate(network, torch.randn(20, 2), loss="mse")
    """
    check_loss(loss)
    inputs = Inputs(source, train_x, num_outputs)
    if inputs.num_rows <= _FEW:
        largest = float(torch.linalg.eigvalsh(inputs.dense())[-1])
    else:
        largest = largest_eigenvalue(inputs.product, inputs.num_rows, inputs.x.device)
    if largest <= 0:
        return math.inf
    return 2.0 / (LOSSES[loss](inputs.num_rows) * largest)


def largest_eigenvalue(product: Callable[[Tensor], Tensor], rows: int, device: torch.device) -> float:
    """Of a positive semidefinite matrix, from above: at most 5 % too large, too small with a probability below 10⁻⁶.

    :param product: V to K V, (N, 1) to (N, 1).
    :param rows: N.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(rows, 1, generator=generator, dtype=torch.float64, device="cpu").to(device)
    lanczos = Lanczos(product, start)
    # After m steps, it is more than (1 − ε) λ_max but for a probability of 1.648 √N exp(−√ε (2m − 1)).
    logarithm = math.log(1.648 * math.sqrt(rows) / _RISK)
    lanczos.extend(math.ceil((logarithm / math.sqrt(_SLACK) + 1) / 2))
    found = float(lanczos.eigh()[0].max())
    return found if lanczos.is_exhausted else found / (1 - _SLACK)
