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
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import AdditiveStructureKernel, InducingPointKernel, Kernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.lazy.lazy_evaluated_kernel_tensor import recall_grad_state
from gpytorch.models import GP, exact_gp, exact_prediction_strategies
from linear_operator import to_linear_operator
from linear_operator.operators import DenseLinearOperator, LinearOperator, SumLinearOperator
from linear_operator.utils.memoize import cached
from torch import Size, Tensor

from . import composites, stock, variances
from .kernels import NTKKernel
from .kernels import contains_ntk as is_made_of_ntk
from .operators import NTKLinearOperator
from .operators.exactly_solved import NTK_OPERATORS, exactly_solved, without_constants
from .operators.ntk_sum_linear_operator import NTKSumLinearOperator, entry_by_entry, product_over_batch
from .prediction import NTKInducingPointStrategy, NTKPredictionStrategy

_ONE = Size()
_MARK = "_ntk_gp_replaces"  # on each function put in, with what was there before


def install() -> None:
    """Puts the functions below in the place of GPyTorch's; a second time changes nothing."""
    uninstall()  # what an earlier copy of this module has put there
    for owner, name, replacement in _REPLACED:
        setattr(owner, name, _wrapped(replacement, getattr(owner, name), inherited=name not in vars(owner)))
    composites.install()
    variances.install()
    stock.mark()


def uninstall() -> None:
    """Gives GPyTorch back its own functions, for this process.

    Models with an :class:`~ntk_gp.kernels.NTKKernel` alone keep this package's predictions; sums, products, marginal
    likelihoods and samples become GPyTorch's: estimates beyond 800 points.
    """
    for owner, name, _ in _REPLACED:
        while hasattr(function := getattr(owner, name), _MARK):
            default, inherited = getattr(function, _MARK)
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, default)
    composites.uninstall()
    variances.uninstall()


def _wrapped(replacement: Callable[..., Any], default: Callable[..., Any], inherited: bool) -> Callable[..., Any]:
    @functools.wraps(default)
    def function(*args: Any, **kwargs: Any) -> Any:
        return replacement(default, *args, **kwargs)

    setattr(function, _MARK, (default, inherited))
    return function


def _prediction_strategy(
    default: Callable[..., Any], train_inputs: Any, train_prior_dist: Any, train_labels: Any, likelihood: Any
) -> Any:
    """This package's, where GPyTorch would take its default one; a kernel's own comes first."""
    arguments = train_inputs, train_prior_dist, train_labels, likelihood
    matrix = train_prior_dist.lazy_covariance_matrix
    if not contains_ntk(matrix):
        return default(*arguments)
    own = _own_strategy(matrix)
    if own is None:
        return NTKPredictionStrategy(*arguments)
    if own is InducingPointKernel.prediction_strategy:
        return NTKInducingPointStrategy(*arguments)
    return default(*arguments)


def _own_strategy(matrix: LinearOperator) -> Callable[..., Any] | None:
    """What the outermost kernel predicts by, if not by GPyTorch's default."""
    if not isinstance(matrix, LazyEvaluatedKernelTensor):
        return None
    kernel = matrix.kernel
    while type(kernel).prediction_strategy in _DELEGATING:
        kernel = kernel.base_kernel
    own = type(kernel).prediction_strategy
    return None if own is Kernel.prediction_strategy else own


_DELEGATING = (ScaleKernel.prediction_strategy, AdditiveStructureKernel.prediction_strategy)


def _call(default: Callable[..., Any], model: GP, *args: Any, **kwargs: Any) -> Any:
    """Marks what `forward` has put together from dense tensors: they do not say what was in them, the model does."""
    output = default(model, *args, **kwargs)
    if type(output) not in (MultivariateNormal, MultitaskMultivariateNormal):
        return output
    if output.islazy and not isinstance(output.lazy_covariance_matrix, DenseLinearOperator):
        return output
    if not any(isinstance(module, NTKKernel) for module in model.modules()):
        return output
    layout = {"interleaved": output._interleaved} if isinstance(output, MultitaskMultivariateNormal) else {}
    return type(output)(output.mean, NTKSumLinearOperator(output.lazy_covariance_matrix), **layout)


def _evaluate_kernel(default: Callable[..., Any], matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    """As GPyTorch does, but without what other threads would meet meanwhile: lazy evaluation switched off for the whole
    process, and a kernel whose `active_dims` are gone."""
    return _evaluated(matrix) if contains_ntk(matrix) else default(matrix)


@cached(name="kernel_eval")
@recall_grad_state
def _evaluated(matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    kernel = object.__new__(type(matrix.kernel))  # GPyTorch's own copies share their attributes
    buffers = {**matrix.kernel._buffers, "active_dims": None}  # x₁ and x₂ are those columns already
    kernel.__dict__.update(matrix.kernel.__dict__, _buffers=buffers)
    evaluate = super(Kernel, kernel).__call__
    result = evaluate(matrix.x1, matrix.x2, last_dim_is_batch=matrix.last_dim_is_batch, **matrix.params)
    result = to_linear_operator(result).evaluate_kernel()
    if type(result) is SumLinearOperator:  # its parts were lazy when they were multiplied by constants
        result = SumLinearOperator(*map(without_constants, result.linear_ops))
    if gpytorch_settings.debug.on() and result.shape != matrix.shape:
        raise RuntimeError(f"Expected a kernel matrix of shape {tuple(matrix.shape)}, got {tuple(result.shape)}.")
    return result


def _prod_batch(default: Callable[..., Any], matrix: LinearOperator, dim: int) -> LinearOperator:
    """Entry by entry, likewise."""
    return product_over_batch(matrix, dim) if contains_ntk(matrix) else default(matrix, dim)


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
    residual = residual.expand(*shape, residual.shape[-1]).contiguous()
    inv_quad, logdet = _repeated(covariance, shape).inv_quad_logdet(residual.unsqueeze(-1), logdet=True)
    return -0.5 * (inv_quad + logdet + residual.shape[-1] * math.log(2 * math.pi))


def _repeated(matrix: LinearOperator, batch_shape: Size) -> LinearOperator:
    """The matrix with these batches, as a repetition, which has its solves do more columns."""
    own = (*[1] * (len(batch_shape) - len(matrix.batch_shape)), *matrix.batch_shape)
    repeats = [size // of for size, of in zip(batch_shape, own, strict=True)]
    return matrix if matrix.batch_shape == batch_shape else matrix.repeat(*repeats, 1, 1)


def _rsample(
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
    return default(MultivariateNormal(distribution.loc, covariance), sample_shape, base_samples)


def contains_ntk(matrix: LinearOperator) -> bool:
    """Whether a neural tangent kernel is a part of this matrix, evaluated or not."""
    if isinstance(matrix, LazyEvaluatedKernelTensor):
        return is_made_of_ntk(matrix.kernel)
    if isinstance(matrix, NTK_OPERATORS):
        return True
    parts = (*matrix._args, *matrix._kwargs.values())
    return any(contains_ntk(part) for part in parts if isinstance(part, LinearOperator))


_REPLACED: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (exact_gp, "prediction_strategy", _prediction_strategy),
    (exact_prediction_strategies, "prediction_strategy", _prediction_strategy),
    (GP, "__call__", _call),
    (LazyEvaluatedKernelTensor, "evaluate_kernel", _evaluate_kernel),
    (LinearOperator, "_mul_matrix", _mul_matrix),
    (LinearOperator, "_prod_batch", _prod_batch),
    (MultivariateNormal, "log_prob", _log_prob),
    (MultivariateNormal, "rsample", _rsample),
)
