"""Which rows are this rank's, and the way between those and all rows: for code that goes over training rows.

Such code takes the Jacobian's `own` rows, and of other tensors `shards.own(...)`. What it adds up over them becomes the
whole sum by `shards.summed(...)`, and what it finds for each of them that for all rows by `shards.gathered(...)`. In
one process nothing is sharded: all of these hand back what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .group import Group

# The lower triangle of a matrix goes round in this many block columns.
_BLOCK_COLUMNS = 4


def block_columns(size: int, count: int = _BLOCK_COLUMNS) -> list[slice]:
    """About equal slices of so many columns, as many as asked for, or one for each column."""
    count = min(count, size)
    return [slice(a, b) for a, b in pairwise([size * i // count for i in range(count + 1)])] if size else []


class Shards:
    """All rows in one process."""

    is_whole = True
    ranks = 1

    def most_rows(self, rows: int) -> int:
        """How many of so many rows the rank has that has most."""
        return rows

    def own(self, rows: Tensor, dim: int) -> Tensor:
        """This rank's rows, of a tensor with all rows along a dimension; the whole of length one there stays."""
        return rows

    def gathered(self, own: Tensor, dim: int) -> Tensor:
        """All rows, of each rank's own along a dimension."""
        return own

    def summed(self, total: Tensor) -> Tensor:
        """The sum over ranks; in the memory of what it is made of, if that is contiguous."""
        return total

    def lower_summed(self, total: Tensor) -> Tensor:
        """The same for the lower triangles of matrices (B, P, P), in place: what is above is not to be read."""
        return total

    def agree(self, what: str, *values: Tensor) -> None:
        """Raises where ranks have other values.

        :param what: What they are called.
        """

    def stacked(self, piece: Tensor, dim: int) -> Tensor:
        """Pieces of one shape from all ranks, one after the other along a dimension."""
        return piece

    def picked(self, own: Tensor, index: Tensor, dim: int) -> Tensor:
        """Some rows on all ranks, of each rank's own along a dimension.

        :param index: Their numbers among all rows.
        """
        return own.index_select(dim, index)


class RowsOfRanks(Shards):
    """Contiguous rows for each rank of a group.

    :param group: The ranks.
    :param rows: The rows of each rank.
    """

    is_whole = False

    def __init__(self, group: Group, rows: Sequence[slice]):
        self.group = group
        self.ranks = group.size
        self.rows = rows
        self.mine = rows[group.rank]
        self._sizes = [each.stop - each.start for each in rows]

    def most_rows(self, rows: int) -> int:
        return max(self._sizes)

    def own(self, rows: Tensor, dim: int) -> Tensor:
        return rows if rows.shape[dim] == 1 else rows.narrow(dim, self.mine.start, self.mine.stop - self.mine.start)

    def gathered(self, own: Tensor, dim: int) -> Tensor:
        return self.group.gather(own, dim, self._sizes)

    def summed(self, total: Tensor) -> Tensor:
        return self.group.sum(total)

    def lower_summed(self, total: Tensor) -> Tensor:
        for columns in block_columns(total.shape[-1]):
            total[:, columns.start :, columns] = self.summed(total[:, columns.start :, columns])
        return total

    def agree(self, what: str, *values: Tensor) -> None:
        self.group.agree(what, *values)

    def stacked(self, piece: Tensor, dim: int) -> Tensor:
        return self.group.gather(piece, dim, [piece.shape[dim]] * self.group.size)

    def picked(self, own: Tensor, index: Tensor, dim: int) -> Tensor:
        mine = (index >= self.mine.start) & (index < self.mine.stop)
        shape = list(own.shape)
        shape[dim] = len(index)
        out = own.new_zeros(shape)
        out.index_copy_(dim, mine.nonzero().squeeze(-1), own.index_select(dim, index[mine] - self.mine.start))
        return self.group.sum(out)


ALL_HERE = Shards()
