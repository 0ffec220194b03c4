"""Normal distributions: densities by exact solves and samples from exact roots, also beyond 800 points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import LinearOperator
from torch import Size, Tensor

from .._compat import check_sample
from ..distributed.replicated import must_agree, same_on_all_ranks, same_random_numbers
from ..operators import NTKLinearOperator
from ..operators._batches import common_shape
from .exactly_solved import exactly_solved, without_constants
from .recognised import contains_ntk

_ONE = Size()


def log_prob(default: Callable[..., Any], distribution: MultivariateNormal, value: Tensor) -> Tensor:
    """By this package's solves, also where an import has switched fast computations off; if the user has, GPyTorch's
    Cholesky factor."""
    flag = gpytorch_settings.fast_computations.log_prob
    chosen = not flag.is_default() and flag.off()
    if chosen or not distribution.islazy or not contains_ntk(distribution.lazy_covariance_matrix):
        return default(distribution, value)
    must_agree("values of which the density is asked for", value)  # before anything that one rank alone may refuse
    check_sample(distribution, value)
    residual = value - distribution.loc
    covariance = exactly_solved(distribution.lazy_covariance_matrix)
    shape = common_shape(residual.shape[:-1], covariance.batch_shape)
    residual = residual.expand(*shape, residual.shape[-1]).contiguous()
    inv_quad, logdet = _repeated(covariance, shape).inv_quad_logdet(residual.unsqueeze(-1), logdet=True)
    return -0.5 * (inv_quad + logdet + residual.shape[-1] * math.log(2 * math.pi))


def _repeated(matrix: LinearOperator, batch_shape: Size) -> LinearOperator:
    """The matrix with these batches, as a repetition, which has its solves do more columns."""
    if matrix.batch_shape == batch_shape:
        return matrix
    own = (*[1] * (len(batch_shape) - len(matrix.batch_shape)), *matrix.batch_shape)
    repeats = [size // of for size, of in zip(batch_shape, own, strict=True)]
    return matrix.repeat(*repeats, 1, 1)


def rsample(
    default: Callable[..., Any],
    distribution: MultivariateNormal,
    sample_shape: Size = _ONE,
    base_samples: Tensor | None = None,
) -> Tensor:
    """From exact roots: GPyTorch's have rank 100 beyond 800 points."""
    if not distribution.islazy or not contains_ntk(distribution.lazy_covariance_matrix):
        return default(distribution, sample_shape, base_samples)
    covariance = without_constants(distribution.lazy_covariance_matrix)
    if base_samples is not None or not isinstance(covariance, NTKLinearOperator):  # they need a square root
        covariance = exactly_solved(covariance)
    if base_samples is not None:
        must_agree("base samples", base_samples)
    with same_random_numbers(distribution.loc.device):
        drawn = default(MultivariateNormal(distribution.loc, covariance), sample_shape, base_samples)
    return same_on_all_ranks(drawn)
