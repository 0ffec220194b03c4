"""What GPyTorch does differently, once this package is imported, for models with a neural tangent kernel in them.

GPyTorch asks only the outermost kernel for its prediction strategy, multiplies lazy matrices by way of low-rank roots,
and puts operators of its own between a kernel's matrix and the marginal likelihood: from 801 points on, they solve by
conjugate gradients, and sample from roots of rank 100. That concerns sums and products with an
:class:`~ntk_gp.kernels.NTKKernel`, of kernels or of their matrices, missing targets, and batches of targets. Models
without one are left as they are, and :func:`uninstall` leaves all as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveStructureKernel, Kernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import exact_gp, exact_prediction_strategies
from linear_operator.operators import LinearOperator
from torch import Size, Tensor

from .kernels import NTKKernel
from .operators import NTKLinearOperator
from .operators.exactly_solved import NTK_OPERATORS, exactly_solved, without_constants
from .operators.ntk_sum_linear_operator import entry_by_entry
from .prediction import NTKPredictionStrategy

_MARK = "_ntk_gp_replaces"  # on each function put in, with what was there before


def install() -> None:
    """Puts the functions below in the place of GPyTorch's; a second time changes nothing."""
    uninstall()  # what an earlier copy of this module has put there
    for owner, name, replacement in _REPLACED:
        setattr(owner, name, _wrapped(replacement, getattr(owner, name)))


def uninstall() -> None:
    """Gives GPyTorch back its own functions, for this process.

    Models with an :class:`~ntk_gp.kernels.NTKKernel` alone keep this package's predictions; sums, products, marginal
    likelihoods and samples become GPyTorch's: estimates beyond 800 points.
    """
    for owner, name, _ in _REPLACED:
        function = getattr(owner, name)
        while hasattr(function, _MARK):
            function = getattr(function, _MARK)
        setattr(owner, name, function)


def _wrapped(replacement: Callable[..., Any], default: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(default)
    def function(*args: Any, **kwargs: Any) -> Any:
        return replacement(default, *args, **kwargs)

    setattr(function, _MARK, default)
    return function


def _prediction_strategy(
    default: Callable[..., Any], train_inputs: Any, train_prior_dist: Any, train_labels: Any, likelihood: Any
) -> Any:
    """This package's, where GPyTorch would take its default one; a kernel's own comes first."""
    matrix = train_prior_dist.lazy_covariance_matrix
    strategy = NTKPredictionStrategy if contains_ntk(matrix) and _has_no_strategy(matrix) else default
    return strategy(
        train_inputs=train_inputs, train_prior_dist=train_prior_dist, train_labels=train_labels, likelihood=likelihood
    )


def _has_no_strategy(matrix: LinearOperator) -> bool:
    if not isinstance(matrix, LazyEvaluatedKernelTensor):
        return True
    kernel = matrix.kernel
    while type(kernel).prediction_strategy in _DELEGATING:
        kernel = kernel.base_kernel
    return type(kernel).prediction_strategy is Kernel.prediction_strategy


_DELEGATING = (ScaleKernel.prediction_strategy, AdditiveStructureKernel.prediction_strategy)


def _mul_matrix(default: Callable[..., Any], matrix: LinearOperator, other: Tensor | LinearOperator) -> LinearOperator:
    """Entry by entry; GPyTorch's would take roots of rank 100 of two lazy matrices."""
    if contains_ntk(matrix) or (isinstance(other, LinearOperator) and contains_ntk(other)):
        return entry_by_entry(matrix, other)
    return default(matrix, other)


def _log_prob(default: Callable[..., Any], distribution: MultivariateNormal, value: Tensor) -> Tensor:
    """By this package's solves, also where an import has switched fast computations off; if the user has, GPyTorch's
    Cholesky factor."""
    flag = gpytorch_settings.fast_computations.log_prob
    chosen = not flag.is_default() and flag.off()
    if chosen or not distribution.islazy or not contains_ntk(distribution.lazy_covariance_matrix):
        return default(distribution, value)
    if distribution._validate_args:
        distribution._validate_sample(value)
    residual = value - distribution.loc
    covariance = exactly_solved(distribution.lazy_covariance_matrix)
    shape = torch.broadcast_shapes(residual.shape[:-1], covariance.batch_shape)
    residual = residual.expand(*shape, residual.shape[-1])
    inv_quad, logdet = _repeated(covariance, shape).inv_quad_logdet(residual.unsqueeze(-1), logdet=True)
    return -0.5 * (inv_quad + logdet + residual.shape[-1] * math.log(2 * math.pi))


def _repeated(matrix: LinearOperator, batch_shape: Size) -> LinearOperator:
    """The matrix with these batches, as a repetition, which has its solves do more columns."""
    own = (*[1] * (len(batch_shape) - len(matrix.batch_shape)), *matrix.batch_shape)
    repeats = [size // of for size, of in zip(batch_shape, own, strict=True)]
    return matrix if matrix.batch_shape == batch_shape else matrix.repeat(*repeats, 1, 1)


def _rsample(default: Callable[..., Any], distribution: MultivariateNormal, *args: Any, **kwargs: Any) -> Tensor:
    """From exact roots: GPyTorch's have rank 100 beyond 800 points."""
    if not distribution.islazy or not contains_ntk(distribution.lazy_covariance_matrix):
        return default(distribution, *args, **kwargs)
    covariance = without_constants(distribution.lazy_covariance_matrix)
    if not isinstance(covariance, NTKLinearOperator):
        covariance = exactly_solved(covariance)
    return default(MultivariateNormal(distribution.loc, covariance), *args, **kwargs)


def contains_ntk(matrix: LinearOperator) -> bool:
    """Whether a neural tangent kernel is a part of this matrix, evaluated or not."""
    if isinstance(matrix, LazyEvaluatedKernelTensor):
        return any(isinstance(module, NTKKernel) for module in matrix.kernel.modules())
    if isinstance(matrix, NTK_OPERATORS):
        return True
    parts = (*matrix._args, *matrix._kwargs.values())
    return any(contains_ntk(part) for part in parts if isinstance(part, LinearOperator))


_REPLACED: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (exact_gp, "prediction_strategy", _prediction_strategy),
    (exact_prediction_strategies, "prediction_strategy", _prediction_strategy),
    (LinearOperator, "_mul_matrix", _mul_matrix),
    (MultivariateNormal, "log_prob", _log_prob),
    (MultivariateNormal, "rsample", _rsample),
)
