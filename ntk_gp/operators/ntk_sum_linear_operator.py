"""Sums of a neural tangent kernel matrix and other matrices."""

from __future__ import annotations

import functools

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    SumLinearOperator,
    to_linear_operator,
)
from torch import Tensor

from .._compat import added_diagonal
from ._densely_solved import DenselySolved
from ._parts import Arguments, Part, Product, part_of


class _Combined(DenselySolved):
    """What sums and products share: what is made of them, by GPyTorch's methods, is exact again."""

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        return entry_by_entry(self, other)

    def _prod_batch(self, dim: int) -> LinearOperator:
        return product_over_batch(self, dim)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        return self + added_diagonal(super().add_diagonal(diag))


class NTKSumLinearOperator(_Combined, SumLinearOperator):
    """A neural tangent kernel matrix plus others, such as a Matérn kernel's or correlated noise; solved exactly.

    :param linear_ops: The matrices to add; or one alone that holds such a sum or a product, in a form that solves
        otherwise.
    """

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return self.__class__(*(operator._mul_constant(other) for operator in self.linear_ops))

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return NTKSumAddedDiagLinearOperator(self, other)
        if isinstance(other, RootLinearOperator):  # the base class would form root and inverse root of both
            return self.__class__(*self.linear_ops, other)
        added = super().__add__(other)
        return self.__class__(*added.linear_ops) if type(added) is SumLinearOperator else added


class NTKSumAddedDiagLinearOperator(DenselySolved, AddedDiagLinearOperator):
    """Such a sum, or a product, plus noise.

    :param linear_ops: The :class:`NTKSumLinearOperator` and the :class:`~linear_operator.operators.DiagLinearOperator`.
    """

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        return entry_by_entry(self, other)


class NTKProductLinearOperator(_Combined):
    """The product, entry by entry, of a neural tangent kernel matrix and another, as lazy as they are.

    Slices are products of slices: of a joint matrix of training and test points only what is asked for is computed.

    :param left: (*batch, M, N).
    :param right: (*batch, M, N); the batches broadcast.
    """

    def __init__(self, left: LinearOperator, right: LinearOperator):
        batch_shape = torch.broadcast_shapes(left.batch_shape, right.batch_shape)
        left, right = (
            part if part.batch_shape == batch_shape else part._expand_batch(batch_shape) for part in (left, right)
        )
        super().__init__(left, right)
        self.left = left
        self.right = right

    def _size(self) -> torch.Size:
        return self.left.shape

    def _transpose_nonbatch(self) -> LinearOperator:
        return self.__class__(self.left._transpose_nonbatch(), self.right._transpose_nonbatch())

    def _expand_batch(self, batch_shape: torch.Size | list[int]) -> LinearOperator:
        return self.__class__(self.left._expand_batch(batch_shape), self.right._expand_batch(batch_shape))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self.__class__(self.left._permute_batch(*dims), self.right._permute_batch(*dims))

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self.__class__(self.left._unsqueeze_batch(dim), self.right._unsqueeze_batch(dim))

    def _getitem(self, row_index, col_index, *batch_indices) -> LinearOperator:
        return self.__class__(
            self.left._getitem(row_index, col_index, *batch_indices),
            self.right._getitem(row_index, col_index, *batch_indices),
        )

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        parts = (self.left.evaluate_kernel(), self.right.evaluate_kernel())
        left, right = (part._get_indices(row_index, col_index, *batch_indices) for part in parts)
        return left * right

    def _diagonal(self) -> Tensor:
        return self.left._diagonal() * self.right._diagonal()

    def to_dense(self) -> Tensor:
        return self.left.to_dense() * self.right.to_dense()

    def _matmul(self, rhs: Tensor) -> Tensor:
        if self._fits or self.shape[-2] <= 1:
            return self.to_dense() @ rhs
        half = self.shape[-2] // 2  # one half of the rows after the other, as often as it takes
        parts = (self[..., :half, :], self[..., half:, :])
        return torch.cat([part._matmul(rhs) for part in parts], dim=-1 if rhs.dim() == 1 else -2)

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return self.__class__(self.left._mul_constant(other), self.right)

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        return NTKSumLinearOperator(self) + other


@part_of.register
def _of_product(matrix: NTKProductLinearOperator, arguments: Arguments) -> Part:
    return Product(part_of(matrix.left, arguments), part_of(matrix.right, arguments))


def entry_by_entry(left: LinearOperator, right: Tensor | LinearOperator) -> LinearOperator:
    """The product, entry by entry, of two matrices, (*batch, M, N), that a neural tangent kernel is a part of.

    linear_operator's own takes roots of both, of rank 100 beyond 800 points.
    """
    right = to_linear_operator(right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, DiagLinearOperator):
            return NTKSumLinearOperator(one._mul_matrix(other))
        if one.matrix_shape == (1, 1) != other.matrix_shape:  # constants, with more batches than the other may have
            shape = torch.broadcast_shapes(one.batch_shape, other.batch_shape)
            return other.expand(*shape, *other.matrix_shape)._mul_constant(one.to_dense()[..., 0, 0].expand(shape))
    if left.matrix_shape != right.matrix_shape:
        shape = torch.broadcast_shapes(left.matrix_shape, right.matrix_shape)
        left, right = (
            part
            if part.matrix_shape == shape
            else to_linear_operator(part.to_dense().expand(*part.batch_shape, *shape))
            for part in (left, right)
        )
    return NTKProductLinearOperator(left, right)


def product_over_batch(matrix: LinearOperator, dim: int) -> LinearOperator:
    """The product, entry by entry, of the matrices along a batch dimension, which is dropped.

    :param dim: Which one, counted from the first.
    """
    matrix = matrix.evaluate_kernel()
    index = [slice(None)] * dim
    return functools.reduce(entry_by_entry, (matrix[(*index, i)] for i in range(matrix.shape[dim])))
