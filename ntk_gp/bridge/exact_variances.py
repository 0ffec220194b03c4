"""Small variances come out as they are, for models with a neural tangent kernel.

GPyTorch rounds variances below `gpytorch.settings.min_variance` up, and warns of negative ones: a guard against what
subtraction leaves in low precision. This package's variances are sums of squares, or differences formed in float64, and
a small one is an answer. They are rounded only by a `min_variance` that the user has set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator.operators import (
    BatchRepeatLinearOperator,
    BlockDiagLinearOperator,
    CatLinearOperator,
    ConstantMulLinearOperator,
    DiagLinearOperator,
    InterpolatedLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .._compat import constant_in
from ..operators import NTKLinearOperator
from ..operators.ntk_posterior_linear_operator import NTKPosteriorEntries, NTKPosteriorLinearOperator
from ..stock import chosen_min_variance
from .recognised import contains_ntk, parts_of

# Whose diagonals are variances of this package.
_OWN = (LazyEvaluatedKernelTensor, NTKLinearOperator, NTKPosteriorEntries, NTKPosteriorLinearOperator)
# Whose diagonals are the parts', added, repeated, or multiplied by what is not negative.
_COMBINED = (BatchRepeatLinearOperator, BlockDiagLinearOperator, CatLinearOperator, SumLinearOperator)
# What may be added to them.
_NOISE = (DiagLinearOperator, KroneckerProductLinearOperator, RootLinearOperator, ZeroLinearOperator)


def variance(default: Callable[..., Any], distribution: MultivariateNormal) -> Tensor:
    """Unrounded where it is exact and the user has set no `min_variance`."""
    covariance = distribution.lazy_covariance_matrix if distribution.islazy else None
    chosen = covariance is None or chosen_min_variance(covariance.dtype) is not None
    if covariance is None or chosen or not is_exact(covariance):
        return default(distribution)
    return _exact_variance(distribution, covariance)


def _exact_variance(distribution: MultivariateNormal, covariance: LinearOperator) -> Tensor:
    """The diagonal, in the shape of the distribution; entries that are zero are rounded up, with a warning."""
    event_shape = distribution.loc.shape[-1:]
    diagonal = covariance.diagonal(dim1=-1, dim2=-2)
    variance = diagonal.reshape(diagonal.shape[:-1] + event_shape).expand(distribution.batch_shape + event_shape)
    positive = variance > 0
    if positive.all():
        return variance
    least = gpytorch_settings.min_variance.value(variance.dtype)
    warnings.warn(
        f"{int((~positive).sum())} of {positive.numel()} variances are zero, as far as {variance.dtype} can tell: the "
        "network's Jacobian vanishes there, or the data leave nothing of it. They are rounded up to "
        f"gpytorch.settings.min_variance, {least}.",
        NumericalWarning,
        stacklevel=4,
    )
    return variance.where(positive, least)


def is_exact(matrix: Any) -> bool:
    """Whether the diagonal of a covariance matrix is made of this package's variances and of what is added to them.

    That is so for a prior with an NTK in it, for a posterior by this package's exact solvers, and for either plus
    noise. It is not for a posterior that is a difference of matrices in the inputs' precision.
    """
    return _is_not_negative(matrix) and _holds_ntk(matrix)


def _is_not_negative(matrix: Any) -> bool:
    """Whether no entry of the diagonal is a difference that rounding may have made negative."""
    if isinstance(matrix, NTKPosteriorLinearOperator):
        return matrix.source.keeps_small_variances
    if isinstance(matrix, (NTKLinearOperator, NTKPosteriorEntries, *_NOISE)):
        return True
    if isinstance(matrix, LazyEvaluatedKernelTensor):
        return contains_ntk(matrix)
    if isinstance(matrix, ConstantMulLinearOperator):
        return bool((constant_in(matrix) >= 0).all()) and _is_not_negative(matrix.base_linear_op)
    if isinstance(matrix, InterpolatedLinearOperator):  # rows and columns of noise, where both were chosen by a tensor
        return isinstance(matrix.base_linear_op, DiagLinearOperator) and bool((matrix.left_interp_values >= 0).all())
    return isinstance(matrix, _COMBINED) and all(_is_not_negative(part) for part in parts_of(matrix))


def _holds_ntk(matrix: Any) -> bool:
    """Whether some of the diagonal is this package's, not all of it noise."""
    return isinstance(matrix, _OWN) or any(_holds_ntk(part) for part in parts_of(matrix))
