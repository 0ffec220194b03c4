"""Block-diagonal matrices of matrices with a neural tangent kernel in them: independent outputs."""

from __future__ import annotations

import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    LinearOperator,
    RootLinearOperator,
)
from linear_operator.operators.block_linear_operator import BlockLinearOperator
from torch import Tensor

from ._solving_operators import Solves


class _Blockwise(Solves, BlockLinearOperator):
    """A block-diagonal matrix whose blocks, a batch, know how to solve."""

    _stock: type[BlockLinearOperator]

    def _solve_columns(self, rhs: Tensor) -> Tensor:
        rhs = rhs.expand(*torch.broadcast_shapes(rhs.shape[:-2], self.batch_shape), *rhs.shape[-2:]).contiguous()
        return self._remove_batch_dim(self.base_linear_op.solve(self._add_batch_dim(rhs)))

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        root = self.base_linear_op.root_decomposition(method).root.to_dense()
        return RootLinearOperator(self._stock(root))


class NTKBlockDiagLinearOperator(_Blockwise, BlockDiagLinearOperator):
    """One block after the other.

    :param base_linear_op: The blocks, (*batch, k, n, n), solved exactly.
    """

    _stock = BlockDiagLinearOperator


class NTKBlockInterleavedLinearOperator(_Blockwise, BlockInterleavedLinearOperator):
    """The rows of the blocks in turn, as in an interleaved multitask distribution of independent outputs.

    :param base_linear_op: The blocks, (*batch, k, n, n), solved exactly.
    """

    _stock = BlockInterleavedLinearOperator
