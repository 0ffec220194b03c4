"""Weight space over ranks: I + Φᵀ D⁻¹ Φ in block rows, factorised by all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from .. import memory, settings
from ..jacobian.base import Jacobian
from ..jacobian.memory import empty
from ..jacobian.products import JacobianProduct
from ..solvers import orthogonal
from ..solvers.base import Solver
from ..solvers.rounding import (
    accuracy,
    digits_lost_by,
    is_beyond_repair,
    not_positive_definite,
    rounding_error_by,
    warn_of_rounding_by,
)
from ..solvers.system import System
from ..solvers.weight_space import MEAN_FACTOR, WeightSpaceSolver, kept_moment
from .cholesky import Block, BlockRows, DistributedCholesky, Layout
from .function_space import DistributedFunctionSpaceSolver
from .graph import ForwardSolve, OnEachRank, Solve, SumOverRanks
from .solver import SolverOverRanks, group_of


class DistributedWeightSpaceSolver(SolverOverRanks, WeightSpaceSolver):
    r"""Exact, by the Cholesky factor M of :math:`\Lambda = I + \Phi^\top D^{-1} \Phi` over R ranks (:mod:`.cholesky`),
    which share the flops, P³/3 as well as N P²; 12 P²/R bytes on each, and no P×P matrix on any.

    Parameters are dealt to ranks in contiguous slices. Each rank adds up the products of its own rows of Φ, strip by
    strip of Λ's lower triangle: rows are formed again for each, of which there are about R, fewer where the memory
    budget has more room. A strip goes to the ranks that own its block rows, as sums for these alone: P²/2 numbers, half
    of what a sum takes that all ranks receive. Where JᵀJ is kept on all of them, from fitting, each takes its own.

    c(x) = M⁻¹ Φ(x)ᵀ stays with the ranks that have its rows; of M test points, sums of M numbers go round, of
    covariances M². Derivatives of the log-determinant take W = M⁻¹, whose block rows are broadcast, once: the squared
    columns of W are the diagonal of Λ⁻¹, and W Φᵀ of each rank's own rows are their leverages.

    Where rounding costs digits, a covariance is refined to an error of second order: with z an approximation of
    Λ⁻¹ φ, it is φᵀz' + zᵀφ' − zᵀΛz', in which Λ is that of the features themselves: N P / R flops for each test point
    and rank. Where there are fewer digits still, features are orthogonalised and the factor is whole on all ranks, as
    in :class:`~ntk_gp.solvers.weight_space.WeightSpaceSolver`, if that fits; if not, a posterior warns.

    :param system: K + D, whose rows are sharded.
    :raises linear_operator.utils.errors.NotPSDError: On all ranks, if Λ is not positive definite in float64, and there
        is no memory to orthogonalise features.
    """

    name = "distributed_weight_space"
    is_replicated = False

    @classmethod
    def cost(cls, system: System) -> float:
        """Of all ranks together: the products of features, as in one process, the factor, and for each block the time
        that messages take. As many numbers go between ranks as for a factor that is replicated: to sum for all takes
        1.25 P² (R − 1)/R, and half P² each to sum for one and to factorise."""
        parameters = system.num_parameters
        flops = 1.25 * system.num_rows * parameters**2 + parameters**3 / 3
        return system.batch * (flops + _layout(system).waiting_flops)

    @classmethod
    def nbytes_needed(cls, system: System) -> float:
        """Of the rank that needs most: its block rows, those of W beside them for derivatives, a strip of either that
        all ranks have, and two panels."""
        layout = _layout(system)
        return 8.0 * (3 * system.batch * layout.most_numbers_held + 2 * system.num_parameters * layout.block)

    def __init__(self, system: System):
        Solver.__init__(self, system)
        self.is_orthogonalised = self.is_refined = self._mean_is_refined = False
        diagonal, lost = self._digits_lost()
        if (diagonal is None or is_beyond_repair(system, lost)) and orthogonal.weight_space_fits(system):
            del self.factors
            self.is_orthogonalised = self.is_replicated = True  # type: ignore[misc]
            self.cholesky = orthogonal.weight_space_factor(system)[0]
            return
        if diagonal is None:
            raise not_positive_definite(system)
        if is_beyond_repair(system, lost):
            warn_of_rounding_by(diagonal)
        error, allowed = rounding_error_by(diagonal), accuracy(system)
        self.is_refined, self._mean_is_refined = error > allowed, error > allowed / MEAN_FACTOR
        self._log_root = diagonal.log().sum(-1)

    def _digits_lost(self) -> tuple[Tensor | None, float]:
        """The diagonal of M, (B, P), if there is a factor, and the relative error that it brings."""
        factors = self.factors
        if any(factor.info for factor in factors):
            return None, float("inf")
        diagonal = self._gathered([factor.rows.local_diagonal() for factor in factors])
        traces = self._summed(torch.stack([factor.local_trace() for factor in factors]))
        return diagonal, digits_lost_by(diagonal, traces)

    @cached_property
    def factors(self) -> list[DistributedCholesky]:
        """M of each batch."""
        matrices = _precision(self.system)
        own = [matrix.local_diagonal() for matrix in matrices]
        factors = [DistributedCholesky(matrix) for matrix in matrices]
        if any(factor.info for factor in factors):
            self.system.check_finite(self._gathered(own))
        return factors

    @property
    def nbytes(self) -> int:
        """On the rank that holds most."""
        if self.is_orthogonalised:
            return super().nbytes
        return 8 * self.system.batch * _layout(self.system).most_numbers_held

    def _precision_solve(self, rhs: Tensor) -> Tensor:
        return super()._precision_solve(rhs) if self.is_orthogonalised else Solve.apply(rhs, self.factors)

    def logdet(self) -> Tensor:
        if self.is_orthogonalised:
            return super().logdet()
        return 2 * self._log_root + self.system.noise.expand(self.system.batch, -1).log().sum(-1)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        system = self.system
        if self.is_orthogonalised:
            return super().logdet_derivatives()
        if not (system.variances > 0).all():  # a group without weight is not in Φ
            return DistributedFunctionSpaceSolver(system).logdet_derivatives()
        squares, leverage = self._by_inverse_factor()
        by_group = system.jacobian.function.sum_by_group((1 - squares) / system.parameter_variances)
        return by_group, (1 - leverage / system.noise) / system.noise

    def _by_inverse_factor(self) -> tuple[Tensor, Tensor]:
        """With W = M⁻¹ the diagonals of WᵀW, (B, P), and of Φ WᵀW Φᵀ, (B, N)."""
        system, layout, rank = self.system, _layout(self.system), group_of(self.system).rank
        own, order = system.jacobian.own, layout.order().to(system.x.device)
        squares = system.x.new_zeros(system.batch, layout.size)
        leverage = system.x.new_zeros(system.batch, own.num_rows)
        inverses = [factor.inverse_factor() for factor in self.factors]
        for blocks in _strips(system):
            rows = [[next(inverse)[1] for _ in blocks] for inverse in inverses]
            for one, of_batch in zip(squares, rows, strict=True):
                for block, row in zip(blocks, of_batch, strict=True):
                    if block.rank == rank:
                        one[: block.columns.stop] += row.square().sum(0)
            for where, features in _own_rows(system):
                whitened = self._whiten(features)[..., order[: blocks[-1].columns.stop]].expand(system.batch, -1, -1)
                for one, of_batch, of_points in zip(leverage, rows, whitened, strict=True):
                    for row in of_batch:
                        one[where] += (of_points[:, : row.shape[1]] @ row.mT).square().sum(-1)
        as_numbered = torch.empty_like(squares).index_copy_(1, order, squares)
        return self._summed(as_numbered), system.jacobian.shards.gathered(leverage, -1)

    def whitened_size(self) -> int:
        size = self.system.num_parameters
        return size + self.is_refined * (size + self.system.jacobian.shards.most_rows(self.system.num_rows))

    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        """This rank's rows of M⁻¹ Φ(x)ᵀ, (B, P_r, M); all of them where the factor is whole."""
        if self.is_orthogonalised:
            return super().whitened_cross(jacobian)
        features = OnEachRank.apply(self._whiten(jacobian.rows()), self._summed)
        own = features.split(_layout(self.system).sizes, dim=-1)[group_of(self.system).rank]
        return ForwardSolve.apply(own.mT.expand(self.system.batch, -1, -1), self.factors)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        if not self.is_refined:
            return self._over_ranks(super().covariance(jacobian1, jacobian2))
        features1, weights1, left1 = self._least_squares(jacobian1)
        features2, weights2, left2 = (
            (features1, weights1, left1) if jacobian2 is jacobian1 else self._least_squares(jacobian2)
        )
        approximate = features1 @ weights2.mT + weights1 @ features2.mT - weights1 @ weights2.mT
        return approximate - self._over_ranks(left1 @ left2.mT)

    def variance(self, jacobian: Jacobian) -> Tensor:
        if self.is_orthogonalised:
            return super().variance(jacobian)
        if not self.is_refined:
            return self._over_ranks(self.whitened_cross(jacobian).square().sum(-2))
        features, weights, left = self._least_squares(jacobian)
        approximate = ((2 * features - weights) * weights).sum(-1)
        return (approximate - self._over_ranks(left.square().sum(-1))).clamp_min(0.0)

    def _least_squares(self, jacobian: Jacobian) -> tuple[Tensor, Tensor, Tensor]:
        """φ, (B, M, P), z ≈ Λ⁻¹ φ of the same shape, and for this rank's rows D^{-1/2} Φ z, (B, M, N_r)."""
        system = self.system
        features = self._whiten(jacobian.rows())
        weights = self._precision_solve(features.mT).mT
        tangents = OnEachRank.apply(self._whiten(weights), self._summed)
        noise = system.jacobian.shards.own(system.noise, -1)
        return features, weights, JacobianProduct.apply(tangents, system.jacobian.own) * noise.rsqrt().unsqueeze(-2)

    def _over_ranks(self, own: Tensor) -> Tensor:
        """The sum of what is each rank's; what is whole on all of them as it is."""
        return own if self.is_orthogonalised else SumOverRanks.apply(own, self._summed)

    def _gathered(self, own: list[Tensor]) -> Tensor:
        """(B, P), of each batch's numbers for this rank's parameters."""
        return group_of(self.system).gather(torch.stack(own), -1, _layout(self.system).sizes)

    def _summed(self, total: Tensor) -> Tensor:
        """The sum over ranks, in memory of its own."""
        return group_of(self.system).sum(total.detach().clone(memory_format=torch.contiguous_format))


def _layout(system: System) -> Layout:
    """Of the rows of Λ: which parameters are whose."""
    return Layout.even(system.num_parameters, system.jacobian.shards.ranks)


def _strips(system: System) -> Iterator[list[Block]]:
    """Consecutive blocks, as many as have together no more numbers than the memory budget has room for beside a rank's
    own rows: at least as many as a rank holds of all."""
    layout = _layout(system)
    spare = memory.SYSTEM.bytes(system.x.device) - DistributedWeightSpaceSolver.nbytes_needed(system)
    limit = layout.most_numbers_held + max(0.0, spare) / (8 * system.batch)
    strip: list[Block] = []
    numbers = 0
    for block in layout.blocks:
        more = block.size * block.columns.stop
        if strip and numbers + more > limit:
            yield strip
            strip, numbers = [], 0
        strip.append(block)
        numbers += more
    if strip:
        yield strip


def _own_rows(system: System) -> Iterator[tuple[slice, Tensor]]:
    """Some of this rank's rows, counted from its first, and J there, (B, m, P)."""
    outputs = system.jacobian.function.num_outputs
    for points, rows in system.jacobian.own.row_blocks():
        yield slice(points.start * outputs, points.stop * outputs), rows


def _precision(system: System) -> list[BlockRows]:
    """This rank's block rows of Λ, of each batch."""
    group, layout = group_of(system), _layout(system)
    order = layout.order().to(system.x.device)
    matrices = [BlockRows(group, layout, system.x) for _ in range(system.batch)]
    roots = system.root_variances[:, order].expand(system.batch, -1)
    known = kept_moment(system)
    for blocks in settings.progress(list(_strips(system)), "Accumulating features"):
        own = _summed_strip(system, blocks, order) if known is None else _known_strip(system, known, blocks, order)
        for block, values in own:
            values = values.expand(system.batch, -1, -1)
            for matrix, one, root in zip(matrices, values, roots, strict=True):
                out = matrix.own(block)
                torch.mul(one, root[: block.columns.stop], out=out)
                out *= root[block.columns, None]
    for matrix in matrices:
        matrix.add_to_diagonal(system.x.new_ones(layout.sizes[group.rank]))
    return matrices


def _known_strip(system: System, moment: Tensor, blocks: list[Block], order: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """The same as :func:`_summed_strip` of JᵀJ, which all ranks have."""
    for block in blocks:
        if block.rank == group_of(system).rank:
            values = moment[:, order[block.columns]].index_select(2, order[: block.columns.stop])
            yield block, values / system.noise[:, :1, None]


def _summed_strip(system: System, blocks: list[Block], order: Tensor) -> Iterable[tuple[Block, Tensor]]:
    """Jᵀ D⁻¹ J in some blocks' rows, up to their own columns: this rank's blocks of the sum over all rows,
    (B or 1, b, width).

    :param order: The order of elimination.
    """
    group, batch = group_of(system), max(len(system.x), len(system.noise))
    scale = system.jacobian.shards.own(system.noise, -1).rsqrt().unsqueeze(-1)
    sums = [empty((batch, block.size, block.columns.stop), like=system.x).zero_() for block in blocks]
    for where, rows in _own_rows(system):
        features = (rows * scale[:, where])[..., order[: blocks[-1].columns.stop]]
        for block, total in zip(blocks, sums, strict=True):
            left, right = features[..., block.columns], features[..., : block.columns.stop]
            total.baddbmm_(left.mT.expand(batch, -1, -1), right.expand(batch, -1, -1))
    group.scatter_sums(sums, [block.rank for block in blocks])
    return [(block, total) for block, total in zip(blocks, sums, strict=True) if block.rank == group.rank]
