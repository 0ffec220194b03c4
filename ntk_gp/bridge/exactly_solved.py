"""How a matrix with a neural tangent kernel in it is solved: the same matrix, as an operator that solves exactly.

What is done with each of linear_operator's operators, once evaluated, where a neural tangent kernel K is a part:

====================================  ==========================================================================
operator                              becomes
====================================  ==========================================================================
c K                                   K, the constant absorbed
K + D                                 :class:`.NTKAddedDiagLinearOperator`: the cheapest exact way
some rows of K + D                    the same, of the points observed
R Rᵀ, R Rᵀ + D (inducing points)      itself: GPyTorch's Woodbury formula is exact
⊗ Kᵢ, ⊗ Kᵢ + ⊗ Nᵢ (multitask)         :class:`.NTKKroneckerLinearOperator`: eigenvalues of the factors
blocks, blocks + D                    blocks that are each solved as this table says
W B Wᵀ + D (interpolation)            :class:`.NTKInterpolatedLinearOperator`, for grids smaller than the data
diagonal, triangular, Cholesky        itself
anything else                         a dense factor in float64, or iteration to a tolerance where it does not fit
====================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from linear_operator.operators import (
    AddedDiagLinearOperator,
    BatchRepeatLinearOperator,
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    CholLinearOperator,
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    InterpolatedLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
    MaskedLinearOperator,
    RootLinearOperator,
    SumKroneckerLinearOperator,
    TriangularLinearOperator,
)
from torch import Tensor

from .. import memory
from .._compat import added_diagonal, constant_in, without_diagonal
from ..operators import NTKLinearOperator
from ..operators._densely_solved import DenselySolved
from ..operators.ntk_block_linear_operators import NTKBlockDiagLinearOperator, NTKBlockInterleavedLinearOperator
from ..operators.ntk_interpolated_linear_operator import NTKInterpolatedLinearOperator, pays_to_interpolate
from ..operators.ntk_kronecker_linear_operator import NTKKroneckerLinearOperator, are_positive, noise_factors
from ..operators.ntk_sum_linear_operator import NTKSumLinearOperator
from .recognised import SOLVED_OPERATORS

# Exact by themselves, as this package or GPyTorch solves them.
_KEPT = (
    DenselySolved,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
    RootLinearOperator,
    DiagLinearOperator,
    TriangularLinearOperator,
    CholLinearOperator,
)


def exactly_solved(matrix: LinearOperator) -> LinearOperator:
    """The same matrix, as lazy as it was, with exact solves, log-determinants and roots as long as they fit in memory.

    :param matrix: A square one that a neural tangent kernel is a part of, under any of linear_operator's operators.
    """
    if isinstance(matrix, SOLVED_OPERATORS):
        return matrix
    matrix = _evaluated(matrix)
    if isinstance(matrix, _KEPT):
        return matrix
    for kind, rule in _RULES.items():
        if isinstance(matrix, kind):
            return rule(matrix)
    return NTKSumLinearOperator(matrix)


def _evaluated(matrix: LinearOperator) -> LinearOperator:
    """With nothing in it to evaluate. A kernel's matrix and noise, the usual case, need not be taken apart for that."""
    if type(matrix) is not AddedDiagLinearOperator:
        return matrix.evaluate_kernel()
    parts = (part if isinstance(part, DiagLinearOperator) else part.evaluate_kernel() for part in matrix.linear_ops)
    return AddedDiagLinearOperator(*parts)


def without_constants(matrix: LinearOperator) -> LinearOperator:
    """The same matrix, evaluated; a constant in front of it is multiplied into its parts where that is possible."""
    if isinstance(matrix, NTKLinearOperator | DenseLinearOperator):
        return matrix
    matrix = matrix.evaluate_kernel()
    if type(matrix) is ConstantMulLinearOperator:
        base, constant = without_constants(matrix.base_linear_op), constant_in(matrix)
        if isinstance(base, NTKLinearOperator | DenselySolved):
            return base._mul_constant(constant)
        if type(base) is KroneckerProductLinearOperator:
            first, *others = base.linear_ops
            return KroneckerProductLinearOperator(first._mul_constant(constant), *others)
        if isinstance(base, BlockDiagLinearOperator | BlockInterleavedLinearOperator):
            return type(base)(base.base_linear_op._mul_constant(constant.unsqueeze(-1)))
    repeated = isinstance(matrix, BatchRepeatLinearOperator) and isinstance(matrix.base_linear_op, NTKLinearOperator)
    if repeated and matrix.base_linear_op.batch_shape.numel() == 1:
        return matrix.base_linear_op.expand(*matrix.shape)
    return matrix


def _constant_multiple(matrix: LinearOperator) -> LinearOperator:
    """c K, solved as K is where K takes the constant."""
    simple = without_constants(matrix)
    return NTKSumLinearOperator(simple) if simple is matrix else exactly_solved(simple)


def _repeated(matrix: BatchRepeatLinearOperator) -> LinearOperator:
    """One matrix for several batches: factorised once."""
    base = exactly_solved(matrix.base_linear_op)
    if base.batch_shape.numel() == 1:
        return base.expand(*matrix.shape)
    return NTKSumLinearOperator(matrix)


def _masked(matrix: MaskedLinearOperator) -> LinearOperator:
    """The rows and columns of K + D where targets were observed: K of the observed points, and their noise."""
    base = matrix.base.evaluate_kernel()
    if not matrix.row_eq_col_mask or not isinstance(base, AddedDiagLinearOperator):
        return NTKSumLinearOperator(matrix)
    kernel = without_constants(without_diagonal(base))
    return _observed(kernel, matrix.row_mask) + _observed_noise(added_diagonal(base), matrix.row_mask)


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


def _blocks(matrix: BlockDiagLinearOperator | BlockInterleavedLinearOperator) -> LinearOperator:
    """The same blocks, each solved as the table says."""
    base = exactly_solved(matrix.base_linear_op)
    if isinstance(matrix, BlockDiagLinearOperator):
        return NTKBlockDiagLinearOperator(base)
    return NTKBlockInterleavedLinearOperator(base)


def _kronecker(matrix: KroneckerProductLinearOperator) -> LinearOperator:
    """Its solves and roots are those of its factors."""
    return KroneckerProductLinearOperator(*(exactly_solved(factor) for factor in matrix.linear_ops))


def _sum_of_kronecker(matrix: SumKroneckerLinearOperator) -> LinearOperator:
    """Kernel and correlated noise in either order; the noise is what has a diagonal factor."""
    for kernel, noise in (matrix.linear_ops, matrix.linear_ops[::-1]):
        if any(isinstance(factor, DiagLinearOperator) for factor in noise.linear_ops):
            return _noisy_kronecker(kernel, noise)
    return NTKSumLinearOperator(*matrix.linear_ops)


def _noisy_kronecker(kernel: KroneckerProductLinearOperator, noise: LinearOperator) -> LinearOperator:
    """By its factors' eigenvalues where the noise has factors of the same sizes, is positive, and memory allows."""
    square = all(factor.is_square for factor in kernel.linear_ops)
    factors = noise_factors(noise, [factor.shape[-1] for factor in kernel.linear_ops]) if square else None
    held = 4 * 8 * sum(f.shape[-1] ** 2 * f.batch_shape.numel() for f in kernel.linear_ops)
    if factors is None or not are_positive(factors) or held > memory.SYSTEM.bytes(kernel.device):
        return NTKSumLinearOperator(kernel) + noise
    return NTKKroneckerLinearOperator(kernel, noise)


def _noisy(matrix: AddedDiagLinearOperator) -> LinearOperator:
    """A matrix plus diagonal noise: the structure of the matrix decides."""
    kernel, noise = without_constants(without_diagonal(matrix)), added_diagonal(matrix)
    if isinstance(kernel, BlockDiagLinearOperator | BlockInterleavedLinearOperator):
        return _blocks(type(kernel)(kernel.base_linear_op + _noise_of_blocks(kernel, noise)))
    if type(kernel) is KroneckerProductLinearOperator:
        return _noisy_kronecker(kernel, noise)
    interpolated = isinstance(kernel, InterpolatedLinearOperator) and pays_to_interpolate(kernel)
    if interpolated and bool((noise._diagonal() > 0).all()):
        return NTKInterpolatedLinearOperator(kernel, noise)
    if isinstance(kernel, NTKLinearOperator | DenselySolved | LowRankRootLinearOperator):
        return kernel + noise
    return NTKSumLinearOperator(kernel) + noise


def _noise_of_blocks(
    blocks: BlockDiagLinearOperator | BlockInterleavedLinearOperator, noise: DiagLinearOperator
) -> DiagLinearOperator:
    """The noise of the rows of each block, (*batch, k, n)."""
    if isinstance(noise, ConstantDiagLinearOperator):
        values = noise.diag_values.unsqueeze(-1).expand(*blocks.base_linear_op.batch_shape, 1)
        return ConstantDiagLinearOperator(values, diag_shape=blocks.base_linear_op.shape[-1])
    diagonal = noise._diagonal().expand(*blocks.shape[:-1]).unsqueeze(-1)
    return DiagLinearOperator(blocks._add_batch_dim(diagonal.contiguous()).squeeze(-1))


_RULES: dict[type[LinearOperator], Callable[..., LinearOperator]] = {
    ConstantMulLinearOperator: _constant_multiple,
    BatchRepeatLinearOperator: _repeated,
    MaskedLinearOperator: _masked,
    BlockDiagLinearOperator: _blocks,
    BlockInterleavedLinearOperator: _blocks,
    SumKroneckerLinearOperator: _sum_of_kronecker,
    KroneckerProductLinearOperator: _kronecker,
    AddedDiagLinearOperator: _noisy,
}
