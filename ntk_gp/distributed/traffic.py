"""How many bytes go between ranks: a model that `Group.traffic` is held against.

Collective operations are counted as rings send them, the least that there can be: a sum of b bytes takes 2 b (R − 1)/R
from each rank, and to gather pieces of b bytes, (R − 1) b.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cholesky import Layout
from .shards import block_columns


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends, for each operation on Jacobians whose rows are sharded.

    :param points: n.
    :param outputs: C.
    :param parameters: P.
    :param ranks: R.
    :param itemsize: Bytes of a number: 8 in solvers, whatever the inputs are.
    """

    points: int
    outputs: int
    parameters: int
    ranks: int
    itemsize: int = 8

    @property
    def rows(self) -> int:
        """N = n·C."""
        return self.points * self.outputs

    @property
    def most_rows(self) -> int:
        """Of the rank that has most."""
        return -(-self.points // self.ranks) * self.outputs

    def summed(self, elements: int) -> int:
        """A sum over ranks of so many numbers."""
        return 2 * (self.ranks - 1) * elements * self.itemsize // self.ranks

    def gathered(self, elements: int) -> int:
        """The same for pieces of so many numbers, from each rank, that all get."""
        return (self.ranks - 1) * elements * self.itemsize

    def jvp(self, columns: int = 1) -> int:
        """J u for so many u."""
        return self.gathered(self.most_rows * columns)

    def vjp(self, columns: int = 1) -> int:
        """Jᵀ v for so many v."""
        return self.summed(self.parameters * columns)

    def kernel_matmul(self, columns: int = 1, kept: bool = False) -> int:
        """K v for so many v.

        :param kept: By rows of K that are kept.
        """
        return self.jvp(columns) if kept else self.vjp(columns) + self.jvp(columns)

    def own_gram(self, rank: int = 0) -> int:
        """K, of which each rank has its own rows: what this rank has computed of others' rows."""
        sizes = [self.points // self.ranks + (each < self.points % self.ranks) for each in range(self.ranks)]
        starts = [sum(sizes[:each]) for each in range(self.ranks)]
        pairs = 0
        for other in range(self.ranks):
            if other == rank:
                continue
            higher = max(rank, other)
            first_half = (2 * starts[higher] + sizes[higher]) // 2 - starts[higher]
            pairs += sizes[rank] * first_half if rank < other else (sizes[rank] - first_half) * sizes[other]
        return pairs * self.outputs**2 * self.itemsize

    def gram(self, rank: int = 0) -> int:
        """K, dense on every rank."""
        return self.own_gram(rank) + self.gathered(self.most_rows * self.rows)

    def cross(self, other_rows: int) -> int:
        """K(X, x) for so many rows at test inputs."""
        return self.gathered(self.most_rows * other_rows)

    def feature_moment(self) -> int:
        """Φᵀ D⁻¹ Φ, in weight space."""
        columns = block_columns(self.parameters)
        return sum(self.summed((self.parameters - each.start) * (each.stop - each.start)) for each in columns)

    def scattered_feature_moment(self, rank: int = 0) -> int:
        """The same for its factor over ranks: of the lower triangle in block rows, what other ranks have of it."""
        layout = Layout.even(self.parameters, self.ranks)
        others = (layout.numbers_held(other) for other in range(self.ranks) if other != rank)
        return sum(others) * self.itemsize
