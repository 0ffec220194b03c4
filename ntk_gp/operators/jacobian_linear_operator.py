"""J(X) as a lazy matrix."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.getitem import IndexType
from torch import Size, Tensor

from ..jacobian.base import Jacobian
from ..jacobian.linearization import Linearization
from ..network import full_precision
from ._batches import FoldedColumns, expand, flatten_batch, is_everything, select


class JacobianLinearOperator(LinearOperator):
    r"""The Jacobian :math:`\boldsymbol J(\boldsymbol X)` of a network's outputs with respect to its P parameters.

    Of size (*batch, N, P) with N = n·C rows, row = point·C + output; `op.mT` is (*batch, P, N). A product with a vector
    costs one forward-mode pass over the n inputs, a product of the transpose one reverse-mode pass. It is
    differentiable with respect to `x`.

    :param x: The inputs, (*batch, n, d).
    :param linearization: The frozen network with its engines.
    :param transposed: Whether this is :math:`\boldsymbol J^\top`.
    """

    def __init__(self, x: Tensor, *, linearization: Linearization, transposed: bool = False):
        super().__init__(x, linearization=linearization, transposed=transposed)
        self.x = x
        self.linearization = linearization
        self.transposed = transposed
        self._jacobian_memo: Jacobian | None = None

    @property
    def _jacobian(self) -> Jacobian:
        if torch.is_grad_enabled() and self.x.requires_grad:
            return self.linearization.jacobian(flatten_batch(self.x))
        if self._jacobian_memo is None:
            self._jacobian_memo = self.linearization.jacobian(flatten_batch(self.x))
        return self._jacobian_memo

    def _size(self) -> Size:
        network = self.linearization.network
        rows = self.x.shape[-2] * network.num_outputs(self.x)
        columns = network.function(self.x.dtype, self.x.device).num_parameters
        return Size([*self.x.shape[:-2], columns, rows] if self.transposed else [*self.x.shape[:-2], rows, columns])

    def _transpose_nonbatch(self) -> JacobianLinearOperator:
        return self.__class__(self.x, linearization=self.linearization, transposed=not self.transposed)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        columns = FoldedColumns(rhs, self.batch_shape)
        jacobian = self._jacobian
        product = jacobian.vjp if self.transposed else jacobian.jvp
        with full_precision(rhs.device.type):
            return columns.unfold(product(columns.flat.mT).mT)

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        index, other = (col_index, row_index) if self.transposed else (row_index, col_index)
        if self.linearization.network.num_outputs(self.x) != 1 or not is_everything(other):
            return super()._getitem(row_index, col_index, *batch_indices)
        x = select(self.x, batch_indices, index)
        return self.__class__(x, linearization=self.linearization, transposed=self.transposed)

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        row_index, col_index, *batch_indices = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        if self.transposed:
            row_index, col_index = col_index, row_index
        outputs = self.linearization.network.num_outputs(self.x)
        points = self.x[(*batch_indices, row_index // outputs)].reshape(1, -1, self.x.shape[-1])
        jacobian = self.linearization.jacobian(points, keep=False)
        columns, output = col_index.reshape(-1), (row_index % outputs).reshape(-1)
        size = jacobian.points_per_block()
        pieces = [
            jacobian[slice(i, i + size)]
            .rows()
            .reshape(-1, outputs, self.shape[-2 if self.transposed else -1])[
                torch.arange(len(columns[i : i + size]), device=columns.device),
                output[i : i + size],
                columns[i : i + size],
            ]
            for i in range(0, points.shape[1], size)
        ]
        return torch.cat(pieces).reshape(row_index.shape) if pieces else self.x.new_zeros(row_index.shape)

    def to_dense(self) -> Tensor:
        with full_precision(self.x.device.type):
            dense = self._jacobian.rows().clone()  # the caller's own
        dense = dense.expand(self.batch_shape.numel(), *dense.shape[-2:]).reshape(*self.batch_shape, *dense.shape[-2:])
        return dense.mT if self.transposed else dense

    def _expand_batch(self, batch_shape: Size | list[int]) -> JacobianLinearOperator:
        return self.__class__(expand(self.x, batch_shape), linearization=self.linearization, transposed=self.transposed)
