"""Models: which prediction strategy they take, and how dense matrices that `forward` returns are marked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import AdditiveStructureKernel, InducingPointKernel, Kernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import GP
from linear_operator.operators import DenseLinearOperator, LinearOperator

from .._compat import is_interleaved
from ..network import expecting
from ..operators.ntk_sum_linear_operator import NTKSumLinearOperator
from . import passes
from .prediction_strategies import NTKInducingPointStrategy, NTKPredictionStrategy
from .recognised import contains_ntk

# These hand the question on to the kernel inside of them.
_DELEGATING = (ScaleKernel.prediction_strategy, AdditiveStructureKernel.prediction_strategy)


def prediction_strategy(
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


def call(default: Callable[..., Any], model: GP, *args: Any, **kwargs: Any) -> Any:
    """Lets the mean have f(x) from a pass that the kernel needs, and marks what `forward` has put together from dense
    tensors: they do not say what was in them, the model does."""
    with expecting(partial(passes.values_along, model)):
        output = default(model, *args, **kwargs)
    if type(output) not in (MultivariateNormal, MultitaskMultivariateNormal):
        return output
    if output.islazy and not isinstance(output.lazy_covariance_matrix, DenseLinearOperator):
        return output
    if not contains_ntk(model):
        return output
    layout = {"interleaved": is_interleaved(output)} if isinstance(output, MultitaskMultivariateNormal) else {}
    return type(output)(output.mean, NTKSumLinearOperator(output.lazy_covariance_matrix), **layout)
