"""The Jacobian whose rows are sharded over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..jacobian.base import Jacobian
from ..jacobian.memory import empty
from ..jacobian.products import JacobianProduct, TransposedJacobianProduct, kernel_product
from ..network import NetworkFunction
from .group import Group
from .shards import RowsOfRanks

# Bytes of a block that is computed at once: memory that was freed is there for the next one.
TILE = 1 << 24


class ShardedJacobian(Jacobian):
    r"""J(X) with contiguous points for each rank, and the results of all operations replicated.

    =====================  ===========================================  ===============================
    operation              what a rank does                             what goes between ranks
    =====================  ===========================================  ===============================
    J u                    its rows                                     the rows are gathered, N
    Jᵀ v                   the sum over its rows                        sums over ranks, P
    J Σ J'ᵀ v              both                                         P + N
    J Σ J'ᵀ, J' elsewhere  its rows                                     the rows are gathered, N·N'
    J Σ Jᵀ, dense          half of each block with another rank's       the other halves; gathered, N²
                           points, which it captures for that
    J Σ Jᵀ, own rows       the same                                     the other halves, N²/2R for each
    =====================  ===========================================  ===============================

    :param function: The network function.
    :param x: The inputs, (B, n, d), the same on all ranks.
    :param group: The ranks.
    :param own: The Jacobian at this rank's points.
    :param linearize: The Jacobian at any points, by this rank alone.

    :ivar list[slice] points: The points of each rank.
    """

    def __init__(
        self, function: NetworkFunction, x: Tensor, group: Group, own: Jacobian, linearize: Callable[[Tensor], Jacobian]
    ):
        super().__init__(function, x)
        self.group = group
        self.points = group.slices(self.num_points)
        self.linearize = linearize
        outputs = function.num_outputs
        self._shards = RowsOfRanks(group, [slice(p.start * outputs, p.stop * outputs) for p in self.points])
        self._own = own
        # What is decided from these is decided alike on all ranks, whose own figures may differ by a point's worth.
        pairs = self._own.num_points**2 / self.num_points**2
        share = self._own.num_points / self.num_points
        costs = [self._own.nbytes, self._own.gram_cost(self._own) / pairs, self._own.product_cost(self._own) / share]
        agreed = group.largest(torch.tensor(costs, dtype=torch.float64, device=group.device)).tolist()
        self._nbytes, self._gram_cost, self._product_cost = int(agreed[0]), agreed[1], agreed[2]

    @classmethod
    def at_inputs(
        cls, function: NetworkFunction, x: Tensor, group: Group, linearize: Callable[[Tensor], Jacobian]
    ) -> ShardedJacobian:
        """J(X), of which each rank captures its own rows.

        :raises RuntimeError: If ranks have other inputs, or a network with other parameters.
        """
        group.agree("inputs", x)
        group.agree_on(function, "network's parameters", function.parameters.values())
        return cls(function, x, group, linearize(x[:, group.slices(x.shape[1])[group.rank]]), linearize)

    @property
    def own(self) -> Jacobian:
        return self._own

    @property
    def shards(self) -> RowsOfRanks:
        return self._shards

    def transformed(self, transform: Callable[[Jacobian], Jacobian | None]) -> ShardedJacobian | None:
        """What is made of the Jacobian at any points, sharded in the same way; None where some rank can make none."""
        own = transform(self._own)
        missing = self.group.largest(torch.tensor([float(own is None)], device=self.group.device))
        if bool(missing):
            return None
        assert own is not None

        def linearize(x: Tensor) -> Jacobian:
            found = transform(self.linearize(x))
            if found is None:
                raise RuntimeError(
                    "The network does other things for another rank than it does here at the same inputs."
                )
            return found

        return ShardedJacobian(own.function, self.x, self.group, own, linearize)

    @property
    def nbytes(self) -> int:
        """On the rank that holds most."""
        return self._nbytes

    def at(self, points: Tensor | slice) -> Jacobian:
        """The Jacobian at some points, captured by this rank alone."""
        return self.linearize(self.x[:, points])

    def __getitem__(self, points: Tensor | slice) -> Jacobian:
        """The Jacobian at some of the points, on every rank: meant for few."""
        return self.at(points)

    def jvp(self, tangents: Tensor) -> Tensor:
        if torch.is_grad_enabled() and tangents.requires_grad:
            return JacobianProduct.apply(tangents, self)
        return self.shards.gathered(self._own.jvp(tangents), -1)

    def vjp(self, cotangents: Tensor) -> Tensor:
        if torch.is_grad_enabled() and cotangents.requires_grad:
            return TransposedJacobianProduct.apply(cotangents, self)
        return self.shards.summed(self._own.vjp(self.shards.own(cotangents, -1)))

    def rows(self) -> Tensor:
        return self.shards.gathered(self._own.rows(), 1)

    def diagonal(self, variances: Tensor) -> Tensor:
        return self.shards.gathered(self._own.diagonal(variances), -1)

    def cross_diagonal(self, other: Jacobian, variances: Tensor) -> Tensor:
        there = other.own if isinstance(other, ShardedJacobian) else other[self.points[self.group.rank]]
        return self.shards.gathered(self._own.cross_diagonal(there, variances), -1)

    @torch.no_grad()
    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        return self.shards.gathered(self.own_gram(other, variances), 1)

    @torch.no_grad()
    def own_gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        """This rank's rows of J Σ_w J'ᵀ, (B or W, N_r, N'), in memory of its own.

        Of J Σ Jᵀ with itself, a rank computes its own block, and half of those of its points with each other rank's;
        the other halves are the transposes of what that one has computed.
        """
        if not isinstance(other, ShardedJacobian):
            return self._own.gram(other, variances)
        out = empty((self._results(other, variances), self._own.num_rows, other.num_rows), like=variances)
        if other is self:
            self._fill_symmetric(out, variances)
            return out
        for points, rows in zip(other.points, other.shards.rows, strict=True):
            there = other.own if points == other.points[self.group.rank] else other.at(points)
            out[:, :, rows] = self._own.gram(there, variances)
        return out

    def _fill_symmetric(self, out: Tensor, variances: Tensor) -> None:
        for turn in range(self.group.size):
            partner = (turn - self.group.rank) % self.group.size  # whose own partner in this turn is this rank
            if partner == self.group.rank:
                self._fill_own(out[:, :, self.shards.mine], variances)
            else:
                self._fill_with(partner, out, variances)

    def _fill_own(self, block: Tensor, variances: Tensor) -> None:
        """This rank's rows with themselves, tile by tile."""
        outputs, count = self.function.num_outputs, self._own.num_points
        tiles = list(_split(slice(0, count), self._steps(block[:1].numel())))
        tiles = list(_split(slice(0, count), max(1, math.isqrt(len(tiles)))))
        for i, points in enumerate(tiles):
            left = self._own[points] if len(tiles) > 1 else self._own
            rows = _rows(points, outputs)
            block[:, rows, rows] = left.gram(left, variances)
            for other in tiles[:i]:
                columns = _rows(other, outputs)
                block[:, rows, columns] = tile = left.gram(self._own[other], variances)
                block[:, columns, rows] = tile.mT

    def _fill_with(self, partner: int, out: Tensor, variances: Tensor) -> None:
        """This rank's rows with another one's: the lower of the two multiplies with the first half of the higher one's
        points, the higher one with the rest; what either has computed goes to the other while it is small."""
        outputs = self.function.num_outputs
        lower, higher = (self.points[rank] for rank in sorted((self.group.rank, partner)))
        middle = (higher.start + higher.stop) // 2
        steps = self._steps((lower.stop - lower.start) * (higher.stop - middle) * outputs**2)
        halves = zip(_split(slice(higher.start, middle), steps), _split(slice(middle, higher.stop), steps), strict=True)
        is_lower = self.group.rank < partner
        there = self.at(slice(higher.start, middle) if is_lower else lower)
        for first, second in halves:
            if is_lower:
                computed = self._own.gram(there[_shifted(first, higher.start)], variances)
                shape = second.stop - second.start, self._own.num_points
            else:
                computed = self._own[_shifted(second, higher.start)].gram(there, variances)
                shape = lower.stop - lower.start, first.stop - first.start
            received = empty((len(out), shape[0] * outputs, shape[1] * outputs), like=out)
            self.group.exchange([(partner, computed)], [(partner, received)])
            if is_lower:
                out[:, :, _rows(first, outputs)] = computed
                out[:, :, _rows(second, outputs)] = received.mT
            else:
                out[:, _rows(_shifted(second, higher.start), outputs), _rows(lower, outputs)] = computed
                out[:, _rows(_shifted(first, higher.start), outputs), _rows(lower, outputs)] = received.mT

    def _steps(self, numbers: int) -> int:
        """In how many pieces so many numbers are computed: more than one only where factors are held."""
        return 1 if self._nbytes == 0 else -(-numbers * self.x.element_size() // TILE)

    def kernel_matmul(self, other: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (rhs.requires_grad or variances.requires_grad):
            return kernel_product(self, other, rhs, variances)
        return super().kernel_matmul(other, rhs, variances)

    def gram_cost(self, other: Jacobian) -> float:
        """Of all ranks together."""
        pairs = other.num_points / self.num_points
        return self._gram_cost * (1.0 if other is self else 2.0 * pairs)

    def product_cost(self, other: Jacobian) -> float:
        """Of all ranks together."""
        return self._product_cost * (1.0 + other.num_points / self.num_points) / 2

    def report(self) -> list[dict[str, object]]:
        """That of this rank's rows."""
        return self._own.report()


def _split(points: slice, count: int) -> Iterator[slice]:
    """So many pieces of a slice, about equal."""
    size = points.stop - points.start
    for i in range(count):
        yield slice(points.start + size * i // count, points.start + size * (i + 1) // count)


def _shifted(points: slice, start: int) -> slice:
    return slice(points.start - start, points.stop - start)


def _rows(points: slice, outputs: int) -> slice:
    return slice(points.start * outputs, points.stop * outputs)
