"""From a matrix as GPyTorch puts it together to one with this package's solves."""

from __future__ import annotations

from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MaskedLinearOperator,
)
from torch import Tensor

from .ntk_added_diag_linear_operator import NTKAddedDiagLinearOperator
from .ntk_linear_operator import NTKLinearOperator
from .ntk_posterior_linear_operator import NTKPosteriorAddedDiagLinearOperator, NTKPosteriorLinearOperator
from .ntk_sum_linear_operator import NTKSumAddedDiagLinearOperator, NTKSumLinearOperator

_SOLVED = (
    NTKAddedDiagLinearOperator,
    NTKPosteriorAddedDiagLinearOperator,
    NTKPosteriorLinearOperator,
    NTKSumAddedDiagLinearOperator,
    NTKSumLinearOperator,
)


def exactly_solved(matrix: LinearOperator) -> LinearOperator:
    """The same matrix, as lazy as it was, with exact solves and log-determinants as long as they fit in memory.

    :param matrix: A square one, evaluated, that a neural tangent kernel is a part of, under GPyTorch's operators for
        sums, noise and missing targets.
    """
    if isinstance(matrix, _SOLVED):
        return matrix
    if isinstance(matrix, MaskedLinearOperator) and matrix.row_eq_col_mask:
        base = exactly_solved(matrix.base.evaluate_kernel())
        if isinstance(base, AddedDiagLinearOperator):
            return _observed(base._linear_op, matrix.row_mask) + _observed_noise(base._diag_tensor, matrix.row_mask)
    if type(matrix) is AddedDiagLinearOperator:
        return NTKSumLinearOperator(matrix._linear_op) + matrix._diag_tensor
    return NTKSumLinearOperator(matrix)


def _observed(matrix: LinearOperator, rows: Tensor) -> LinearOperator:
    """Some rows of a kernel matrix, and the same columns: again a neural tangent kernel's where that is possible."""
    points = matrix.points_of(rows) if isinstance(matrix, NTKLinearOperator) else None
    if points is None:
        return NTKSumLinearOperator(MaskedLinearOperator(matrix, rows, rows))
    return matrix.at_points(points)


def _observed_noise(noise: DiagLinearOperator, rows: Tensor) -> DiagLinearOperator:
    if isinstance(noise, ConstantDiagLinearOperator):
        return ConstantDiagLinearOperator(noise.diag_values, diag_shape=int(rows.sum()))
    return DiagLinearOperator(noise._diagonal()[..., rows])
