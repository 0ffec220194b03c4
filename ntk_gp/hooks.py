"""What GPyTorch does differently, once this package is imported, for models with a neural tangent kernel in them.

GPyTorch asks only the outermost kernel for its prediction strategy, multiplies lazy matrices by way of low-rank roots,
and puts operators of its own between a kernel's matrix and the marginal likelihood: from 801 points on, they solve by
conjugate gradients. That concerns sums and products with an :class:`~ntk_gp.kernels.NTKKernel`, missing targets and
batches of targets. Models without one are left as they are.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, ProductKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator import to_dense, to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor

from . import composites, stock, variances
from .kernels import NTKKernel
from .operators import NTKAddedDiagLinearOperator, NTKLinearOperator
from .operators.exactly_solved import exactly_solved
from .operators.ntk_posterior_linear_operator import NTKPosteriorAddedDiagLinearOperator, NTKPosteriorLinearOperator
from .operators.ntk_sum_linear_operator import NTKSumAddedDiagLinearOperator, NTKSumLinearOperator
from .prediction import NTKPredictionStrategy

_default_prediction_strategy = Kernel.prediction_strategy
_default_product = ProductKernel.forward
_default_log_prob = MultivariateNormal.log_prob

_OPERATORS = (
    NTKAddedDiagLinearOperator,
    NTKLinearOperator,
    NTKPosteriorAddedDiagLinearOperator,
    NTKPosteriorLinearOperator,
    NTKSumAddedDiagLinearOperator,
    NTKSumLinearOperator,
)


def install() -> None:
    """Puts the functions below in the place of GPyTorch's."""
    Kernel.prediction_strategy = _prediction_strategy
    ProductKernel.forward = _product
    MultivariateNormal.log_prob = _log_prob
    composites.install()
    variances.install()
    stock.mark()


@functools.wraps(_default_prediction_strategy)
def _prediction_strategy(kernel: Kernel, train_inputs: Any, train_prior_dist: Any, train_labels: Any, likelihood: Any):
    strategy = NTKPredictionStrategy if _has_ntk(kernel) else functools.partial(_default_prediction_strategy, kernel)
    return strategy(train_inputs, train_prior_dist, train_labels, likelihood)


@functools.wraps(_default_product)
def _product(kernel: ProductKernel, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
    """Entry by entry; GPyTorch's would take roots of rank 100 of two lazy matrices."""
    if not _has_ntk(kernel):
        return _default_product(kernel, x1, x2, diag=diag, **params)
    product = math.prod(to_dense(factor(x1, x2, diag=diag, **params)) for factor in kernel.kernels)
    return product if diag else NTKSumLinearOperator(to_linear_operator(product))


@functools.wraps(_default_log_prob)
def _log_prob(distribution: MultivariateNormal, value: Tensor) -> Tensor:
    """By this package's solves, also where an import has switched fast computations off; if the user has, GPyTorch's
    Cholesky factor."""
    flag = gpytorch_settings.fast_computations.log_prob
    chosen = not flag.is_default() and flag.off()
    if chosen or not distribution.islazy or not _contains_ntk(distribution.lazy_covariance_matrix):
        return _default_log_prob(distribution, value)
    covariance = exactly_solved(distribution.lazy_covariance_matrix.evaluate_kernel())
    with flag(True):
        return _default_log_prob(MultivariateNormal(distribution.loc, covariance), value)


def _has_ntk(kernel: Kernel) -> bool:
    return any(isinstance(module, NTKKernel) for module in kernel.modules())


def _contains_ntk(matrix: LinearOperator) -> bool:
    """Whether a neural tangent kernel is a part of this matrix, evaluated or not."""
    if isinstance(matrix, LazyEvaluatedKernelTensor):
        return _has_ntk(matrix.kernel)
    parts = (part for part in matrix._args if isinstance(part, LinearOperator))
    return isinstance(matrix, _OPERATORS) or any(_contains_ntk(part) for part in parts)
