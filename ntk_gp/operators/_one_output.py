"""K + D of outputs that have only features in common, as the matrices of one output: for marginal likelihoods."""

from __future__ import annotations

from typing import Any, NamedTuple

from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    KroneckerProductDiagLinearOperator,
)
from torch import Tensor

from .._compat import added_diagonal, without_diagonal
from ..jacobian.one_output import OneOutputLinearization, one_output
from ._batches import are_one, flatten_batch


class OneOutputBlocks(NamedTuple):
    """The blocks of K + D = ⊕ (ΨSΨᵀ + D_c), one for each of C outputs.

    :param matrix: One block, (*batch, n, n), where all are the same; else all of them, (*batch, C, n, n); an operator
        like that for K + D.
    :param outputs: C.
    :param is_shared: Which of the two.
    """

    matrix: Any
    outputs: int
    is_shared: bool

    def marginal_terms(self, rhs: Tensor) -> tuple[Tensor, Tensor] | None:
        """rhsᵀ (K + D)⁻¹ rhs for each column, (*batch, r), and log |K + D|, (*batch), of rhs (*batch, n·C, r)."""
        columns = rhs.unflatten(-2, (-1, self.outputs))
        columns = columns.flatten(-2) if self.is_shared else columns.transpose(-3, -2)
        terms = self.matrix._marginal_terms(columns)
        if terms is None:
            return None
        inv_quad, logdet = terms
        if self.is_shared:
            return inv_quad.unflatten(-1, (self.outputs, -1)).sum(-2), self.outputs * logdet
        return inv_quad.sum(-2), logdet.sum(-1)


def one_output_blocks(matrix: AddedDiagLinearOperator) -> OneOutputBlocks | None:
    """The blocks of a matrix K + D; None where outputs share parameters, or there is one."""
    kernel, noise = without_diagonal(matrix), added_diagonal(matrix)
    outputs = kernel._outputs
    if outputs == 1:
        return None
    found = one_output(kernel.linearization.jacobian(flatten_batch(kernel.x1.detach()).double()))
    if found is None:
        return None
    own = _noise(noise, kernel.x1.shape[-2], outputs)
    is_shared = own.batch_shape == noise.batch_shape
    x1, x2, variances = kernel.x1, kernel.x2, kernel.variances
    same = are_one(x1, x2)
    if not is_shared:
        x1, x2, variances = (
            part.unsqueeze(-3).expand(*part.shape[:-2], outputs, *part.shape[-2:]) for part in (x1, x2, variances)
        )
    linearization = OneOutputLinearization(kernel.linearization)
    one = kernel.__class__(x1, x1 if same else x2, variances, linearization=linearization, function=found.function)
    return OneOutputBlocks(matrix.__class__(one, own), outputs, is_shared)


def _noise(noise: DiagLinearOperator, points: int, outputs: int) -> DiagLinearOperator:
    """That of one output, (*batch, n, n), where it is the same for all and known to stay so; else of each, (*batch, C,
    n, n)."""
    if isinstance(noise, ConstantDiagLinearOperator):
        return ConstantDiagLinearOperator(noise.diag_values, diag_shape=points)
    if isinstance(noise, KroneckerProductDiagLinearOperator) and len(noise.linear_ops) == 2:
        of_points, of_outputs = noise.linear_ops
        if isinstance(of_points, ConstantDiagLinearOperator) and of_outputs.shape[-1] == outputs:
            values = of_points.diag_values * of_outputs._diagonal()
            return ConstantDiagLinearOperator(values.unsqueeze(-1), diag_shape=points)
    diagonal = noise._diagonal().unflatten(-1, (points, outputs))
    if not diagonal.requires_grad and bool((diagonal == diagonal[..., :1]).all()):
        return DiagLinearOperator(diagonal[..., 0])
    return DiagLinearOperator(diagonal.mT)
