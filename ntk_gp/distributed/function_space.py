"""Function space over ranks: K + D in block rows, factorised by all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .. import settings
from ..jacobian.base import Jacobian
from ..jacobian.products import JacobianProduct
from ..solvers.base import Solver
from ..solvers.function_space import FunctionSpaceSolver
from ..solvers.rounding import (
    accuracy,
    digits_lost_by,
    is_beyond_repair,
    not_positive_definite,
    rounding_error_by,
    warn_of_rounding_over_ranks,
)
from ..solvers.system import System
from .cholesky import Block, BlockRows, DistributedCholesky, Layout
from .graph import ForwardSolve, OnEachRank, Solve, SumOverRanks
from .shards import RowsOfRanks
from .solver import SolverOverRanks, group_of

# Columns of K are formed for several blocks of a rank at once, so many of these steps for each rank: entries above the
# diagonal that are formed with them and not needed are no more than this part of K.
_STEPS_PER_RANK = 16


class DistributedFunctionSpaceSolver(SolverOverRanks, FunctionSpaceSolver):
    """Exact, by the Cholesky factor L of A = K + D over R ranks (:mod:`.cholesky`), which share the flops of the Gram
    matrix and N³/3; 4 N²/R bytes on each.

    Each rank forms its own rows of K, up to the diagonal, from its own rows of J and those of the others, which it
    captures in turn: n points of captures for each rank, and no message. What is between training and test points, and
    the posterior made of it, is shared in the same way: each rank has L⁻¹ k(X, x) for its own rows.

    What goes between ranks is the factor's (:func:`.cholesky.traffic`), with the diagonal of L, N numbers, and of M
    test points two sums of M numbers; for a covariance one of M² beside.

    Where rounding costs digits, a posterior comes from what least squares leave, as in one process, and a step of
    refinement; features are not orthogonalised, so that with less noise than that restores it warns, and where K + D is
    not positive definite in float64 it raises.

    :param system: K + D, whose rows are sharded.
    :raises linear_operator.utils.errors.NotPSDError: On all ranks, if K + D is not positive definite in float64.
    """

    name = "distributed"

    @classmethod
    def cost(cls, system: System) -> float:
        """Of all ranks together: the Gram matrix, its factor, and for each block the time that messages take."""
        jacobian, layout = system.jacobian, _layout(system)
        return jacobian.gram_cost(jacobian) + system.batch * (system.num_rows**3 / 3 + layout.waiting_flops)

    @classmethod
    def nbytes_needed(cls, system: System) -> float:
        """Of the rank that needs most: its rows, two panels, and what is formed of K at once."""
        layout = _layout(system)
        held = layout.most_numbers_held
        formed = system.batch * max(layout.sizes) * layout.block * _blocks_at_once(layout)
        return 8.0 * (system.batch * held + 2 * system.num_rows * layout.block + formed)

    def __init__(self, system: System):
        Solver.__init__(self, system)
        self.basis = None
        diagonal = self._gathered([factor.rows.local_diagonal() for factor in self.factors])
        traces = self._summed(torch.stack([factor.local_trace() for factor in self.factors]))
        lost = digits_lost_by(diagonal, traces)
        if is_beyond_repair(system, lost):
            warn_of_rounding_over_ranks(diagonal)
        self._rounding = (torch.finfo(torch.float64).eps * lost) ** 0.5
        self.is_refined = rounding_error_by(diagonal) > accuracy(system)
        self._logdet = 2 * diagonal.log().sum(-1)

    @cached_property
    def factors(self) -> list[DistributedCholesky]:
        """L of each batch."""
        matrices = _kernel_matrix(self.system)
        own = [matrix.local_diagonal() for matrix in matrices]
        factors = [DistributedCholesky(matrix) for matrix in matrices]
        if any(factor.info for factor in factors):
            self.system.check_finite(self._gathered(own))
            raise not_positive_definite(
                self.system,
                "Over ranks, features are not orthogonalised instead. Give the likelihood more noise, or "
                "lower the outputscale, or set ntk_gp.settings.solver('weight_space').",
            )
        return factors

    @property
    def nbytes(self) -> int:
        """On the rank that holds most."""
        return 8 * self.system.batch * _layout(self.system).most_numbers_held

    def solve(self, rhs: Tensor) -> Tensor:
        return Solve.apply(rhs, self.factors)

    def logdet(self) -> Tensor:
        return self._logdet

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        system, rank = self.system, group_of(self.system).rank
        inverses = [factor.inverse() for factor in self.factors]
        groups = torch.eye(system.variances.shape[1], dtype=torch.float64, device=system.x.device)
        by_group = groups.new_zeros(system.batch, len(groups))
        for blocks, own, there in _columns(system):
            for group, one in enumerate(groups):
                grams = own.gram(there, one[None]).expand(system.batch, -1, -1)
                for block, values in _by_block(self.factors[0].layout, rank, blocks, grams):
                    for batch, inverse in enumerate(inverses):
                        by_group[batch, group] += inverse.column_product(block, values[batch])
        by_noise = self._gathered([inverse.local_diagonal() for inverse in inverses])
        return self._summed(by_group), by_noise

    def whitened_size(self) -> int:
        """Of the rank that has most rows."""
        system = self.system
        own = system.jacobian.shards.most_rows(system.num_rows)
        return own + self.is_refined * (2 * system.num_parameters + system.num_rows)

    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        """This rank's rows of L⁻¹ Π K(X, x), (B, N_r, M); differentiable where the inputs of the Jacobian are."""
        system, own = self.system, self.system.jacobian.own
        if not jacobian.x.requires_grad:
            cross = own.gram(jacobian, system.variances)
        else:
            tangents = jacobian.rows() * system.parameter_variances.unsqueeze(-2)
            cross = JacobianProduct.apply(OnEachRank.apply(tangents, self._summed), own).mT
        return ForwardSolve.apply(cross.expand(system.batch, -1, -1), self.factors)

    def _explained(self, whitened1: Tensor, whitened2: Tensor) -> Tensor:
        return SumOverRanks.apply(whitened1.mT @ whitened2, self._summed)

    def _explained_variance(self, whitened: Tensor) -> Tensor:
        return SumOverRanks.apply(whitened.square().sum(-2), self._summed)

    def _cancels(self, prior: Tensor, whitened: Tensor) -> Tensor:
        """What one rank finds, whose processor may round otherwise, is what all do."""
        mask = super()._cancels(prior, whitened)
        return group_of(self.system).largest(mask.to(torch.uint8)).bool()

    def _gathered(self, own: list[Tensor]) -> Tensor:
        """(B, N), of each batch's numbers for this rank's rows."""
        return self.system.jacobian.shards.gathered(torch.stack(own), -1)

    def _summed(self, total: Tensor) -> Tensor:
        """The sum over ranks, in memory of its own."""
        return self.system.jacobian.shards.summed(total.detach().clone())


def _rows_of_ranks(system: System) -> Sequence[slice]:
    shards = system.jacobian.shards
    return shards.rows if isinstance(shards, RowsOfRanks) else [slice(0, system.num_rows)]


def _layout(system: System) -> Layout:
    sizes = [rows.stop - rows.start for rows in _rows_of_ranks(system)]
    return Layout(sizes, multiple=system.jacobian.function.num_outputs)


def _blocks_at_once(layout: Layout) -> int:
    """How many blocks' columns are formed at once."""
    return max(1, len(layout.of_rank(0)) // _STEPS_PER_RANK)


def _kernel_matrix(system: System) -> list[BlockRows]:
    """This rank's rows of K + D, of each batch."""
    group, layout = group_of(system), _layout(system)
    matrices = [BlockRows(group, layout, system.x) for _ in range(system.batch)]
    for blocks, own, there in _columns(system):
        grams = own.gram(there, system.variances).expand(system.batch, -1, -1)
        for block, values in _by_block(layout, group.rank, blocks, grams):
            for matrix, one in zip(matrices, values, strict=True):
                matrix.set_column(block, one)
    noise = system.jacobian.shards.own(system.noise, -1).expand(system.batch, -1)
    for matrix, one in zip(matrices, noise, strict=True):
        matrix.add_to_diagonal(one)
    return matrices


def _columns(system: System) -> Iterator[tuple[list[Block], Jacobian, Jacobian]]:
    """Some blocks of one rank, J at this rank's points whose rows have columns there, and J at those of the blocks."""
    layout, mine, starts = _layout(system), group_of(system).rank, [rows.start for rows in _rows_of_ranks(system)]
    jacobian, outputs = system.jacobian, system.jacobian.function.num_outputs
    steps = []
    for rank in range(len(layout.sizes)):
        blocks, size = layout.of_rank(rank), _blocks_at_once(layout)
        steps += [(rank, blocks[i : i + size]) for i in range(0, len(blocks), size)]
    for rank, blocks in settings.progress(steps, "Kernel matrix"):
        rows = layout.rows_of_rank(mine, blocks[0].index)
        if rows.start == rows.stop:
            continue
        own = jacobian.own[slice(rows.start // outputs, rows.stop // outputs)]
        first = 0 if rank == mine else starts[rank]
        points = slice((first + blocks[0].rows.start) // outputs, (first + blocks[-1].rows.stop) // outputs)
        yield blocks, own, (jacobian.own[points] if rank == mine else jacobian[points])


def _by_block(layout: Layout, rank: int, blocks: list[Block], grams: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Each block's columns of what was computed for several, from this rank's first row that has any there on."""
    start, end = layout.rows_of_rank(rank, blocks[0].index).start, 0
    for block in blocks:
        skipped = layout.rows_of_rank(rank, block.index).start - start
        yield block, grams[:, skipped:, end : end + block.size]
        end += block.size
