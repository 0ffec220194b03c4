"""The table of what is replaced in GPyTorch, and the one way in which it is put in and taken out again.

A replacement is called with GPyTorch's own function, or the one that reads a property, and then with the arguments of
that. What is put in carries a mark with what was there before: nothing is wrapped twice, not even by a second copy of
this module (`importlib.reload`), and :func:`uninstall` finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import GP, exact_gp, exact_prediction_strategies
from linear_operator.operators import LinearOperator

from .. import stock
from . import distributions, exact_variances, kernel_matrices, models

_Replacement = Callable[..., Any]

# The owner, a module or a class; the name of a function or property of it; and what is called in its place.
REPLACED: tuple[tuple[Any, str, _Replacement], ...] = (
    (exact_gp, "prediction_strategy", models.prediction_strategy),
    (exact_prediction_strategies, "prediction_strategy", models.prediction_strategy),
    (GP, "__call__", models.call),
    (Kernel, "named_sub_kernels", kernel_matrices.named_sub_kernels),
    (Kernel, "batch_shape", kernel_matrices.batch_shape),
    (Kernel, "dtype", kernel_matrices.dtype_of_kernel),
    (Kernel, "device", kernel_matrices.device_of_kernel),
    (LazyEvaluatedKernelTensor, "dtype", kernel_matrices.dtype_of_matrix),
    (LazyEvaluatedKernelTensor, "evaluate_kernel", kernel_matrices.evaluate_kernel),
    (LinearOperator, "_mul_matrix", kernel_matrices.mul_matrix),
    (LinearOperator, "_prod_batch", kernel_matrices.prod_batch),
    (MultivariateNormal, "log_prob", distributions.log_prob),
    (MultivariateNormal, "rsample", distributions.rsample),
    (MultivariateNormal, "variance", exact_variances.variance),
)

_MARK = "_ntk_gp_replaces"


class _Mark(NamedTuple):
    """What is remembered on each function that was put in."""

    default: Any  # the function or property that was there before
    inherited: bool  # whether it was a base class's
    replacement: _Replacement


def install() -> None:
    """Puts the functions of this package in the place of GPyTorch's; a second time changes nothing.

    Importing the package does so.
    """
    for owner, name, replacement in REPLACED:
        mark = _mark(owner, name)
        if mark is None or mark.replacement is not replacement:  # or else an earlier copy of this module's
            _take_out(owner, name)
            _put_in(owner, name, replacement)
    stock.mark()


def uninstall() -> None:
    """Gives GPyTorch back its own functions, for this process; :func:`install` puts this package's in again.

    Models with an :class:`~ntk_gp.NTKKernel` alone keep this package's predictions; sums, products, marginal
    likelihoods and samples become GPyTorch's: estimates beyond 800 points.
    """
    for owner, name, _ in REPLACED:
        _take_out(owner, name)


def _put_in(owner: Any, name: str, replacement: _Replacement) -> None:
    default = getattr(owner, name)
    function = _function(default)

    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return replacement(function, *args, **kwargs)

    setattr(replaced, _MARK, _Mark(default, name not in vars(owner), replacement))
    setattr(owner, name, default.getter(replaced) if isinstance(default, property) else replaced)


def _take_out(owner: Any, name: str) -> None:
    while (mark := _mark(owner, name)) is not None:
        if mark.inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, mark.default)


def _mark(owner: Any, name: str) -> _Mark | None:
    return getattr(_function(getattr(owner, name)), _MARK, None)


def _function(attribute: Any) -> Any:
    """The function itself, or the one that reads a property."""
    return attribute.fget if isinstance(attribute, property) else attribute
