"""Kernels and their matrices: how they are evaluated and multiplied entry by entry, and their dtype and device.

GPyTorch reads the dtype and device off a kernel's parameters, and a kernel made of neural tangent kernels may have
none. A kernel matrix of such a kernel has the dtype of the inputs, as the matrix itself does once it is evaluated; a
sum or a product of kernels has the dtype and device of its neural tangent kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpytorch import settings as gpytorch_settings
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.lazy.lazy_evaluated_kernel_tensor import recall_grad_state
from linear_operator import to_linear_operator
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DenseLinearOperator,
    LinearOperator,
    SumLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.utils.memoize import cached
from torch import Size, Tensor

from .._compat import BUFFERS, buffers_in, constant_in, own_batch_shape
from ..operators.ntk_sum_linear_operator import entry_by_entry, product_over_batch
from .exactly_solved import without_constants
from .feature_sums import sum_of_features
from .recognised import NeuralTangentKernel, contains_ntk, named_modules_of


def dtype_of_matrix(default: Callable[..., Any], matrix: LazyEvaluatedKernelTensor) -> Any:
    """That of the inputs, or of the kernel where they are integers."""
    return matrix.x1.dtype if contains_ntk(matrix) and matrix.x1.is_floating_point() else default(matrix)


def dtype_of_kernel(default: Callable[..., Any], kernel: Kernel) -> Any:
    """That of the neural tangent kernel in it, where no parameter has one."""
    ntk = _ntk_without_parameters(kernel)
    return default(kernel) if ntk is None else ntk.dtype


def device_of_kernel(default: Callable[..., Any], kernel: Kernel) -> Any:
    """That of the neural tangent kernel in it, where no parameter has one."""
    ntk = _ntk_without_parameters(kernel)
    return default(kernel) if ntk is None else ntk.device


def _ntk_without_parameters(kernel: Kernel) -> NeuralTangentKernel | None:
    """The first one in a kernel that has no parameters at all, if any."""
    if next(kernel.parameters(), None) is not None:
        return None
    return next((module for module in kernel.modules() if isinstance(module, NeuralTangentKernel)), None)


def named_sub_kernels(default: Callable[..., Any], kernel: Kernel) -> Iterator[tuple[str, Kernel]]:
    """The same ones, found without a walk through the snapshots of networks, in which there are none."""
    return (
        (name, module)
        for name, module in named_modules_of(kernel)
        if module is not kernel and isinstance(module, Kernel)
    )


def batch_shape(default: Callable[..., Any], kernel: Kernel) -> Size:
    """The kernel's own where those of all kernels within are the same: most of the time that a broadcast takes."""
    own = own_batch_shape(kernel)
    is_the_same = all(_without_inner(inner) == own for _, inner in kernel.named_sub_kernels())
    return own if is_the_same else default(kernel)


def _without_inner(kernel: Kernel) -> Size:
    """The batch shape of a kernel without those within, where its class does not say otherwise."""
    return own_batch_shape(kernel) if type(kernel).batch_shape is Kernel.batch_shape else kernel.batch_shape


def evaluate_kernel(default: Callable[..., Any], matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    """As GPyTorch does, but without what other threads would meet meanwhile: lazy evaluation switched off for the whole
    process, and a kernel whose `active_dims` are gone."""
    return evaluated(matrix) if contains_ntk(matrix) else default(matrix)


@cached(name="kernel_eval")
@recall_grad_state
def evaluated(matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    """The same for any kernel."""
    result = _evaluated_unchecked(matrix)
    if gpytorch_settings.debug.on():
        _check_shape(result.shape, _shape(matrix))
    return result


def _evaluated_within(matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    """The same as a part of a sum: of its shape only rows and columns are checked. The batch, which GPyTorch finds by
    a walk through all kernels within, is that of the whole."""
    result = _evaluated_unchecked(matrix)
    if gpytorch_settings.debug.on():
        _check_shape(result.matrix_shape, _rows_and_columns(matrix))
    return result


def _evaluated_unchecked(matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    result = sum_of_features(matrix) if _is_sum(matrix.kernel) else None
    return _evaluated_by_kernel(matrix) if result is None else result


def _check_shape(shape: Sequence[int], expected: Sequence[int]) -> None:
    if tuple(shape) != tuple(expected):
        raise RuntimeError(f"Expected a kernel matrix of shape {tuple(expected)}, got {tuple(shape)}.")


def _rows_and_columns(matrix: LazyEvaluatedKernelTensor) -> tuple[int, int]:
    outputs = matrix.kernel.num_outputs_per_input(matrix.x1, matrix.x2)
    of_rows, of_columns = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    return matrix.x1.shape[-2] * of_rows, matrix.x2.shape[-2] * of_columns


def _shape(matrix: LazyEvaluatedKernelTensor) -> Size:
    """As GPyTorch finds it, by three walks through all kernels within; in the usual case, by one."""
    batch = matrix.kernel.batch_shape
    if matrix.last_dim_is_batch or not batch == matrix.x1.shape[:-2] == matrix.x2.shape[:-2]:
        return matrix.shape
    return Size([*batch, *_rows_and_columns(matrix)])


def _is_sum(kernel: Kernel) -> bool:
    """Whether it is a sum of kernels, scaled or not."""
    while isinstance(kernel, ScaleKernel):
        kernel = kernel.base_kernel
    return isinstance(kernel, AdditiveKernel)


def _evaluated_by_kernel(matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    if type(matrix.kernel) is AdditiveKernel and not matrix.last_dim_is_batch:
        terms = [kernel(matrix.x1, matrix.x2, **matrix.params) for kernel in matrix.kernel.kernels]
        return _sum_of([to_linear_operator(term) for term in terms])
    kernel = object.__new__(type(matrix.kernel))  # GPyTorch's own copies share their attributes
    buffers = {**buffers_in(matrix.kernel), "active_dims": None}  # x₁ and x₂ are those columns already
    kernel.__dict__.update({**matrix.kernel.__dict__, BUFFERS: buffers})
    evaluate = super(Kernel, kernel).__call__
    result = evaluate(matrix.x1, matrix.x2, last_dim_is_batch=matrix.last_dim_is_batch, **matrix.params)
    return _evaluated_parts(to_linear_operator(result))


def _evaluated_parts(matrix: LinearOperator) -> LinearOperator:
    """The same matrix with nothing in it to evaluate; a sum without the parts that are zero, which have no numbers."""
    if isinstance(matrix, ZeroLinearOperator) or type(matrix) is DenseLinearOperator:
        return matrix
    if type(matrix) is ConstantMulLinearOperator:
        base = _evaluated_parts(matrix.base_linear_op)
        return base if isinstance(base, ZeroLinearOperator) else ConstantMulLinearOperator(base, constant_in(matrix))
    if isinstance(matrix, LazyEvaluatedKernelTensor):
        return _with_constant_apart(matrix)
    if type(matrix) is not SumLinearOperator:
        return matrix.evaluate_kernel()
    return _sum_of(matrix.linear_ops)


def _sum_of(terms: Sequence[LinearOperator]) -> LinearOperator:
    """All of them together, evaluated; not added one by one, for which each partial sum is asked for its shape."""
    evaluated_terms = [_evaluated_parts(term) for term in terms]
    parts = [without_constants(part) for part in evaluated_terms if not isinstance(part, ZeroLinearOperator)]
    return SumLinearOperator(*parts) if len(parts) > 1 else [*parts, *evaluated_terms][0]


def _with_constant_apart(matrix: LazyEvaluatedKernelTensor) -> LinearOperator:
    """One kernel's matrix, evaluated; the outputscale of a `ScaleKernel` without an NTK stays beside the numbers.

    GPyTorch multiplies them, and autograd would keep, and differentiate, another matrix as large.
    """
    kernel = matrix.kernel
    if type(kernel) is not ScaleKernel or contains_ntk(kernel) or kernel.outputscale.dim() or matrix.last_dim_is_batch:
        return _evaluated_within(matrix)
    base = LazyEvaluatedKernelTensor(matrix.x1, matrix.x2, kernel=kernel.base_kernel, **matrix.params)
    numbers = _evaluated_within(base)  # not by GPyTorch, which switches lazy evaluation off in all threads meanwhile
    if type(numbers) is not DenseLinearOperator:  # lazy already
        return numbers.mul(kernel.outputscale.reshape(1, 1))
    return ConstantMulLinearOperator(numbers, kernel.outputscale)


def mul_matrix(default: Callable[..., Any], matrix: LinearOperator, other: Tensor | LinearOperator) -> LinearOperator:
    """Entry by entry; GPyTorch's would take roots of rank 100 of two lazy matrices."""
    if contains_ntk(matrix) or (isinstance(other, LinearOperator) and contains_ntk(other)):
        return entry_by_entry(matrix, other)
    return default(matrix, other)


def prod_batch(default: Callable[..., Any], matrix: LinearOperator, dim: int) -> LinearOperator:
    """The product of the matrices of a batch, entry by entry, likewise."""
    return product_over_batch(matrix, dim) if contains_ntk(matrix) else default(matrix, dim)
