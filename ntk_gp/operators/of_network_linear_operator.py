"""A kernel matrix computed from a network, marked as such."""

from __future__ import annotations

from linear_operator.operators import LinearOperator
from linear_operator.utils.getitem import IndexType
from torch import Size, Tensor

from .._compat import OPTIONS


class OfNetworkLinearOperator(LinearOperator):
    """Another operator's matrix, recognised as one that a network is in: solved exactly, and of one state of it.

    :param base: The matrix, (*batch, M, N).
    :param network_state: The number of the network's state; None where that is not known, as after pickling.
    """

    def __init__(self, base: LinearOperator, *, network_state: int | None = None):
        super().__init__(base, network_state=network_state)
        self.base = base
        self.network_state = network_state

    def _like(self, base: LinearOperator) -> OfNetworkLinearOperator:
        return self.__class__(base, network_state=self.network_state)

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "network_state": None}  # states are those of one process
        return {**state, OPTIONS: {**state[OPTIONS], "network_state": None}}

    def _size(self) -> Size:
        return self.base.shape

    def _transpose_nonbatch(self) -> LinearOperator:
        return self._like(self.base._transpose_nonbatch())

    def _expand_batch(self, batch_shape: Size | list[int]) -> LinearOperator:
        return self._like(self.base._expand_batch(batch_shape))

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._like(self.base._permute_batch(*dims))

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._like(self.base._unsqueeze_batch(dim))

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        return self._like(self.base._getitem(row_index, col_index, *batch_indices))

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        return self.base._get_indices(row_index, col_index, *batch_indices)

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return self._like(self.base._mul_constant(other))

    def _diagonal(self) -> Tensor:
        return self.base._diagonal()

    def to_dense(self) -> Tensor:
        return self.base.to_dense()

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.base._matmul(rhs)

    def _t_matmul(self, rhs: Tensor) -> Tensor:
        return self.base._t_matmul(rhs)

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        return self.base._bilinear_derivative(left_vecs, right_vecs)
