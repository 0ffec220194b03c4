"""From a matrix as GPyTorch puts it together to one with this package's solves.

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

from .. import settings
from ._densely_solved import DenselySolved
from .ntk_added_diag_linear_operator import NTKAddedDiagLinearOperator
from .ntk_linear_operator import NTKLinearOperator
from .ntk_sum_linear_operator import NTKSumLinearOperator
from .structured import (
    NTKBlockDiagLinearOperator,
    NTKBlockInterleavedLinearOperator,
    NTKInterpolatedLinearOperator,
    NTKKroneckerLinearOperator,
    are_positive,
    noise_factors,
    pays_to_interpolate,
)

# Solved exactly, with nothing in them to evaluate.
_EVALUATED = (
    NTKAddedDiagLinearOperator,
    NTKBlockDiagLinearOperator,
    NTKBlockInterleavedLinearOperator,
    NTKInterpolatedLinearOperator,
    NTKKroneckerLinearOperator,
)
_KEPT = (
    DenselySolved,
    LowRankRootAddedDiagLinearOperator,
    LowRankRootLinearOperator,
    RootLinearOperator,
    DiagLinearOperator,
    TriangularLinearOperator,
    CholLinearOperator,
)

# A matrix that an NTK is a part of has one of these in it.
NTK_OPERATORS = (NTKLinearOperator, DenselySolved, *_EVALUATED)


def exactly_solved(matrix: LinearOperator) -> LinearOperator:
    """The same matrix, as lazy as it was, with exact solves, log-determinants and roots as long as they fit in memory.

    :param matrix: A square one that a neural tangent kernel is a part of, under any of linear_operator's operators.
    """
    if isinstance(matrix, _EVALUATED):
        return matrix
    matrix = matrix.evaluate_kernel()
    if isinstance(matrix, _KEPT):
        return matrix
    for kind, rule in _RULES.items():
        if isinstance(matrix, kind):
            return rule(matrix)
    return NTKSumLinearOperator(matrix)


def without_constants(matrix: LinearOperator) -> LinearOperator:
    """The same matrix, evaluated, its constant factors absorbed by what knows how to."""
    if isinstance(matrix, NTKLinearOperator):
        return matrix
    matrix = matrix.evaluate_kernel()
    if type(matrix) is ConstantMulLinearOperator:
        base, constant = without_constants(matrix.base_linear_op), matrix._constant
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


def networks_of(matrix: LinearOperator) -> set[int]:
    """The states of the networks whose kernels are parts of this matrix, as numbers."""
    if isinstance(matrix, NTKLinearOperator):
        return {matrix.network_state}
    return set().union(*(networks_of(part) for part in matrix._args if isinstance(part, LinearOperator)))


def _constant_multiple(matrix: LinearOperator) -> LinearOperator:
    simple = without_constants(matrix)
    return NTKSumLinearOperator(simple) if simple is matrix else exactly_solved(simple)


def _repeated(matrix: BatchRepeatLinearOperator) -> LinearOperator:
    base = exactly_solved(matrix.base_linear_op)
    if base.batch_shape.numel() == 1:
        return base.expand(*matrix.shape)
    return NTKSumLinearOperator(matrix)


def _masked(matrix: MaskedLinearOperator) -> LinearOperator:
    base = matrix.base.evaluate_kernel()
    if not matrix.row_eq_col_mask or not isinstance(base, AddedDiagLinearOperator):
        return NTKSumLinearOperator(matrix)
    kernel = without_constants(base._linear_op)
    return _observed(kernel, matrix.row_mask) + _observed_noise(base._diag_tensor, matrix.row_mask)


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
    square = all(factor.is_square for factor in kernel.linear_ops)
    factors = noise_factors(noise, [factor.shape[-1] for factor in kernel.linear_ops]) if square else None
    held = 4 * 8 * sum(f.shape[-1] ** 2 * f.batch_shape.numel() for f in kernel.linear_ops)
    if factors is None or not are_positive(factors) or held > settings.memory_budget.bytes(kernel.device):
        return NTKSumLinearOperator(kernel) + noise
    return NTKKroneckerLinearOperator(kernel, noise)


def _noisy(matrix: AddedDiagLinearOperator) -> LinearOperator:
    kernel, noise = without_constants(matrix._linear_op), matrix._diag_tensor
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
