r"""Cholesky factors of matrices that no rank could hold: block rows, dealt out to the ranks in turn.

Each rank has a contiguous slice of the rows of a symmetric matrix A, in blocks of b rows. They are eliminated in
another order than they are numbered in: the first block of each rank, then the second of each, every other time from
the last rank to the first. So the rank that holds a row is the one that knows the data behind it, and all ranks have
work to the end (on block-cyclic layouts: Golub and Van Loan, "Matrix Computations", 2013, section 1.6). With Π this
order,

.. math:: \Pi A \Pi^\top = L L^\top,

and of L as of A a rank holds the lower triangle of its own block rows: N²/(2R) + N b/2 numbers.

What it takes, with N/b blocks and vectors in r columns:

=============  ==============  ======================================  ===================================
operation      flops per rank  numbers that a rank sends                messages
=============  ==============  ======================================  ===================================
factorise      N³/(3R)         about (R − 1) N² / (2R), and N b / R     2 for each block
forward        N² r / R        N r / R                                  1 for each block
backward       N² r / R        2 (R − 1) N r / R                        1 for each block
solve          2 N² r / R      those, and (R − 1) N r / R               those, and 1
inverse        2 N³/(3R)       N² / (2R)                                1 for each block
L⁻¹            N³/(3R)         N² / (2R)                                1 for each block
=============  ==============  ======================================  ===================================

Rows in one dimension keep to a rank what is the data's; what all receive then does not fall with R, N²/2 numbers. A
broadcast counts once, for the rank that has what is sent; :func:`traffic` has the exact numbers of bytes. What is
replicated comes from the same messages, so that it is the same to the last bit on all ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, zip_longest

import torch
from torch import Tensor

from .. import settings
from ..jacobian.memory import empty
from .group import Group

# Rows of a block: at 256 a product of blocks runs at the processor's rate, and a panel is short beside the matrix.
_BLOCK = 256
# Where there are fewer rows, blocks are smaller, down to a number below which calls cost more than flops: so that each
# rank has several, and all have work until the end.
_SMALLEST_BLOCK = 32
_BLOCKS_PER_RANK = 8
# Messages that each block of a factorisation and of a solve takes, and for how many flops a rank waits for one: for 100
# µs at 30 Gflop/s.
_MESSAGES, _FLOPS_PER_MESSAGE = 4, 3e6


@dataclass(frozen=True)
class Block:
    """Some rows of the matrix.

    :param index: When they are eliminated.
    :param rank: Who holds them.
    :param rows: Where they are among that rank's rows.
    :param columns: Where they are in the order of elimination.
    """

    index: int
    rank: int
    rows: slice
    columns: slice

    @property
    def size(self) -> int:
        """b, or fewer in a rank's last block."""
        return self.columns.stop - self.columns.start


class Layout:
    """Which rows are where, and in which order they are eliminated.

    :param sizes: How many rows each rank has.
    :param block: How many make a block; by default as many as products need to run at the processor's rate.
    :param multiple: What a default number of rows is a multiple of: C, so that blocks consist of whole points.

    :ivar tuple blocks: All :class:`Block`, in the order of elimination.
    :ivar int size: N.
    """

    def __init__(self, sizes: Sequence[int], block: int | None = None, multiple: int = 1):
        self.sizes = tuple(sizes)
        self.size = sum(self.sizes)
        self.block = _block_size(max(self.sizes), multiple) if block is None else block
        pieces = [
            [(rank, slice(i, min(i + self.block, size))) for i in range(0, size, self.block)]
            for rank, size in enumerate(self.sizes)
        ]
        rounds = [[piece for piece in each if piece is not None] for each in zip_longest(*pieces)]
        dealt = [piece for turn, each in enumerate(rounds) for piece in (each if turn % 2 == 0 else each[::-1])]
        ends = accumulate(rows.stop - rows.start for _, rows in dealt)
        self.blocks = tuple(
            Block(index, rank, rows, slice(end - rows.stop + rows.start, end))
            for index, ((rank, rows), end) in enumerate(zip(dealt, ends, strict=True))
        )
        self._of_rank: list[list[Block]] = [[] for _ in self.sizes]
        for one in self.blocks:
            self._of_rank[one.rank].append(one)

    @classmethod
    def even(cls, size: int, ranks: int) -> Layout:
        """So many rows, as equally many for each rank as can be, the first ones having one more."""
        return cls([size // ranks + (rank < size % ranks) for rank in range(ranks)])

    def of_rank(self, rank: int, start: int = 0) -> list[Block]:
        """The blocks of a rank that are eliminated at `start` or later: its last ones."""
        return self._of_rank[rank][self._first(rank, start) :]

    def _first(self, rank: int, start: int) -> int:
        return bisect_left(self._of_rank[rank], start, key=lambda block: block.index)

    def rows_of_rank(self, rank: int, start: int = 0) -> slice:
        """Their rows, among those of the rank."""
        return slice(min(self._first(rank, start) * self.block, self.sizes[rank]), self.sizes[rank])

    def numbers_held(self, rank: int) -> int:
        """How many numbers of a matrix, or of its factor, a rank holds."""
        return sum(block.size * block.columns.stop for block in self._of_rank[rank])

    @property
    def most_numbers_held(self) -> int:
        """The same of the rank that holds most."""
        return max(map(self.numbers_held, range(len(self.sizes))))

    @property
    def waiting_flops(self) -> float:
        """What all ranks together could compute while they wait for the messages of a factorisation and a solve."""
        return len(self.sizes) * len(self.blocks) * _MESSAGES * _FLOPS_PER_MESSAGE

    @cached_property
    def panel_numbers(self) -> int:
        """How many numbers a rank's parts of all panels have, with what the shorter ones are padded by."""
        ranks = range(len(self.sizes))
        longest = (max(self._rows_after(rank, block) for rank in ranks) for block in self.blocks)
        return sum(block.size * rows for block, rows in zip(self.blocks, longest, strict=True))

    def _rows_after(self, rank: int, block: Block) -> int:
        rows = self.rows_of_rank(rank, block.index + 1)
        return rows.stop - rows.start

    def order(self) -> Tensor:
        """The rows in the order of elimination, (N,)."""
        starts = [0, *accumulate(self.sizes)]
        rows = [
            torch.arange(starts[one.rank] + one.rows.start, starts[one.rank] + one.rows.stop) for one in self.blocks
        ]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)


def _block_size(rows: int, multiple: int) -> int:
    wanted = min(_BLOCK, max(_SMALLEST_BLOCK, rows // _BLOCKS_PER_RANK))
    return multiple * max(1, wanted // multiple)


class BlockRows:
    """A rank's own block rows of the lower triangle of a symmetric matrix, in the order of elimination.

    :param group: The ranks.
    :param layout: Which rows are whose.
    :param like: A tensor of the dtype, and on the device.

    :ivar list blocks: The blocks of this rank.
    :ivar list pieces: For each of them its entries, (b, width): up to and including its own columns.
    """

    def __init__(self, group: Group, layout: Layout, like: Tensor):
        self.group, self.layout = group, layout
        self.blocks = layout.of_rank(group.rank)
        self.pieces = [empty((one.size, one.columns.stop), like=like) for one in self.blocks]

    @classmethod
    def from_rows(cls, group: Group, layout: Layout, rows: Tensor) -> BlockRows:
        """From this rank's rows of the matrix, (N_r, N), as they are numbered."""
        matrix = cls(group, layout, rows)
        order = layout.order().to(rows.device)
        for block, piece in zip(matrix.blocks, matrix.pieces, strict=True):
            piece.copy_(rows[block.rows].index_select(1, order[: block.columns.stop]))
        return matrix

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(piece.nbytes for piece in self.pieces)

    def copy(self) -> BlockRows:
        """The same in memory of its own."""
        new = object.__new__(BlockRows)
        new.group, new.layout, new.blocks = self.group, self.layout, self.blocks
        new.pieces = [empty(piece.shape, like=piece).copy_(piece) for piece in self.pieces]
        return new

    def set_column(self, block: Block, values: Tensor) -> None:
        """Writes the columns of a block below and on the diagonal.

        :param values: For this rank's rows from this block on, `layout.rows_of_rank(rank, block.index)`, and the rows
            of the block: (rows, b).
        """
        start = self.layout.rows_of_rank(self.group.rank, block.index).start
        for own, piece in self.from_block(block.index):
            piece[:, block.columns] = values[own.rows.start - start : own.rows.stop - start]

    def column_product(self, block: Block, values: Tensor) -> Tensor:
        """The sum of the products of all entries of a block's columns, those above the diagonal too, which equal those
        below: this rank's part.

        :param values: Of another symmetric matrix, as in :meth:`set_column`; (..., rows, b) to (...,).
        """
        start = self.layout.rows_of_rank(self.group.rank, block.index).start
        total = values.new_zeros(values.shape[:-2])
        for own, piece in self.from_block(block.index):
            other = values[..., own.rows.start - start : own.rows.stop - start, :]
            weight = 1 if own.index == block.index else 2
            total += weight * torch.einsum("ij,...ij->...", piece[:, block.columns], other)
        return total

    def from_block(self, start: int) -> Iterator[tuple[Block, Tensor]]:
        """This rank's blocks that are eliminated at `start` or later, with their entries."""
        for block, piece in zip(self.blocks, self.pieces, strict=True):
            if block.index >= start:
                yield block, piece

    def own(self, block: Block) -> Tensor:
        """The entries of a block of this rank's."""
        return next(piece for own, piece in zip(self.blocks, self.pieces, strict=True) if own.index == block.index)

    def add_to_diagonal(self, local: Tensor) -> None:
        """Adds numbers for this rank's rows, (N_r,), to the diagonal."""
        for block, piece in zip(self.blocks, self.pieces, strict=True):
            piece[:, block.columns].diagonal().add_(local[block.rows])

    def local_diagonal(self) -> Tensor:
        """That of this rank's rows, (N_r,)."""
        like = self.pieces[0] if self.pieces else torch.zeros(0, dtype=torch.float64, device=self.group.device)
        return torch.cat(
            [like.new_zeros(0)]
            + [piece[:, block.columns].diagonal() for block, piece in zip(self.blocks, self.pieces, strict=True)]
        )

    def diagonal(self) -> Tensor:
        """The diagonal, (N,), as rows are numbered; on all ranks."""
        return self.group.gather(self.local_diagonal(), 0, self.layout.sizes)


class DistributedCholesky:
    """L, the Cholesky factor of a symmetric matrix in block rows, and what is solved with it.

    Vectors are columns, as rows are numbered: a rank has its own rows of them, (N_r, r), unless they are replicated,
    (N, r). All ranks have to call each method, at the same time.

    :param matrix: Becomes L.

    :ivar int info: Zero; or k if in the order of elimination the leading k×k block is not positive definite, as
        LAPACK's. It is the same on all ranks, which have no factor then.
    """

    def __init__(self, matrix: BlockRows):
        self.rows = matrix
        self.group, self.layout = matrix.group, matrix.layout
        self.info = self._factorise()

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds."""
        return self.rows.nbytes

    def _factorise(self) -> int:
        """Block by block: the corner is factorised by its rank, each rank solves for its own part of the panel below,
        and with the whole panel takes its contribution out of its own rows."""
        for block in settings.progress(self.layout.blocks, "Factorisation"):
            corner = self._broadcast_corner(block)
            failed_at = -float(corner[0, 0])
            if failed_at >= 0:
                return block.columns.start + int(failed_at)
            self._eliminate(block, corner)
        return 0

    def _broadcast_corner(self, block: Block) -> Tensor:
        """The factor of the corner; where there is none, its first number is −k, with k as LAPACK's `info`."""
        corner = self._buffer(block.size, block.size)
        if block.rank == self.group.rank:
            own = self.rows.own(block)[:, block.columns]
            factor, info = torch.linalg.cholesky_ex(own)
            own.copy_(factor)
            corner.copy_(factor)
            if info or not torch.isfinite(factor).all():
                corner[0, 0] = -float(max(int(info), 1))
        return self.group.broadcast(corner, block.rank)

    def _eliminate(self, block: Block, corner: Tensor) -> None:
        after = list(self.rows.from_block(block.index + 1))
        panel = self._buffer(sum(own.size for own, _ in after), block.size)
        pieces = panel.split([own.size for own, _ in after])
        for part, (_, piece) in zip(pieces, after, strict=True):
            part.copy_(piece[:, block.columns])
        panel = torch.linalg.solve_triangular(corner, panel.mT, upper=False).mT
        pieces = panel.split([own.size for own, _ in after])
        whole = self._whole_panel(block, panel)
        for part, (_, piece) in zip(pieces, after, strict=True):
            piece[:, block.columns] = part
            rest = piece[:, block.columns.stop :]
            rest.addmm_(part, whole[: rest.shape[1]].mT, alpha=-1)

    def _whole_panel(self, block: Block, panel: Tensor) -> Tensor:
        """The panels of all ranks, in the order of elimination."""
        layout, start = self.layout, block.index + 1
        later = [layout.rows_of_rank(rank, start) for rank in range(self.group.size)]
        sizes = [rows.stop - rows.start for rows in later]
        gathered = self.group.gather(panel, 0, sizes).split(sizes)
        ordered = [
            gathered[one.rank][one.rows.start - later[one.rank].start : one.rows.stop - later[one.rank].start]
            for one in layout.blocks[start:]
        ]
        return torch.cat(ordered) if ordered else panel

    def forward(self, local: Tensor) -> Tensor:
        """L⁻¹ Π B, (N_r, r): what is this rank's of B to what is this rank's of the result."""
        out = local.clone()
        for block in self.layout.blocks:
            part = self._buffer(block.size, local.shape[1])
            if block.rank == self.group.rank:
                corner = self.rows.own(block)[:, block.columns]
                part = torch.linalg.solve_triangular(corner, out[block.rows], upper=False).contiguous()
                out[block.rows] = part
            if block is self.layout.blocks[-1]:
                break  # of no use to anyone else
            part = self.group.broadcast(part, block.rank)
            for own, piece in self.rows.from_block(block.index + 1):
                out[own.rows].addmm_(piece[:, block.columns], part, alpha=-1)
        return out

    def backward(self, local: Tensor) -> Tensor:
        """(L⁻¹ Π)ᵀ B, (N_r, r): what is this rank's of B to what is this rank's of the result."""
        out = local.clone()
        for block in reversed(self.layout.blocks):
            total = local.new_zeros(block.size, local.shape[1])
            if block is not self.layout.blocks[-1]:
                for own, piece in self.rows.from_block(block.index + 1):
                    total.addmm_(piece[:, block.columns].mT, out[own.rows])
                total = self.group.sum(total)
            if block.rank == self.group.rank:
                corner = self.rows.own(block)[:, block.columns]
                out[block.rows] = torch.linalg.solve_triangular(corner.mT, out[block.rows] - total, upper=True)
        return out

    def solve(self, rhs: Tensor) -> Tensor:
        """A⁻¹ rhs, (N, r), replicated."""
        return self.group.gather(self.backward(self.forward(self.local(rhs))), 0, self.layout.sizes)

    def local(self, replicated: Tensor) -> Tensor:
        """This rank's rows of (N, r)."""
        return replicated.split(self.layout.sizes)[self.group.rank]

    def diagonal(self) -> Tensor:
        """That of L, (N,), as rows are numbered; on all ranks."""
        return self.rows.diagonal()

    def logdet(self) -> Tensor:
        """log |A|, a number; on all ranks."""
        return self.group.sum(2 * self.rows.local_diagonal().log().sum())

    def local_trace(self) -> Tensor:
        """The sum of squares of this rank's rows of L: its part of the trace of L Lᵀ."""
        squares = [piece.square().sum() for piece in self.rows.pieces]
        return torch.stack([*squares, self._buffer(1)[0].zero_()]).sum()

    def inverse(self) -> BlockRows:
        """A⁻¹, in the same layout, in memory of its own.

        With W = L⁻¹, the inverse is WᵀW: a block row of W is added to the block rows of WᵀW above, which have taken the
        place of rows of W that came before.
        """
        result = self.rows.copy()
        for block, row in self._inverse_factor(result):
            for own, piece in zip(result.blocks, result.pieces, strict=True):
                if own.index < block.index:
                    piece.addmm_(row[:, own.columns].mT, row[:, : own.columns.stop])
                elif own.index == block.index:
                    torch.mm(row[:, block.columns].mT, row, out=piece)
        return result

    def inverse_factor(self) -> Iterator[tuple[Block, Tensor]]:
        """The block rows of W = L⁻¹ in the order of elimination, (b, width) up to and including a block's own columns,
        each on all ranks: N³/(3R) flops, and a copy of this rank's rows while it lasts."""
        return self._inverse_factor(self.rows.copy())

    def _inverse_factor(self, rows: BlockRows) -> Iterator[tuple[Block, Tensor]]:
        """A block row of W is finished by its rank, broadcast, and subtracted from the block rows of W below.

        :param rows: L; of it, what is below a block row of W is overwritten.
        """
        for block in settings.progress(self.layout.blocks, "Inverse"):
            row = self._row_of_inverse_factor(block, rows)
            before, corner = slice(block.columns.start), row[:, block.columns]
            for _, piece in rows.from_block(block.index + 1):
                factor = piece[:, block.columns].clone()
                piece[:, before].addmm_(factor, row[:, before], alpha=-1)
                piece[:, block.columns] = -(factor @ corner)
            yield block, row

    def _row_of_inverse_factor(self, block: Block, result: BlockRows) -> Tensor:
        """A block row of W, on all ranks."""
        row = self._buffer(block.size, block.columns.stop)
        if block.rank == self.group.rank:
            piece = result.own(block)
            identity = torch.eye(block.size, dtype=piece.dtype, device=piece.device)
            corner = torch.linalg.solve_triangular(piece[:, block.columns], identity, upper=False)
            torch.mm(corner, piece[:, : block.columns.start], out=row[:, : block.columns.start])
            row[:, block.columns] = corner
        return self.group.broadcast(row, block.rank)

    def _buffer(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64, device=self.group.device)


def traffic(layout: Layout, rank: int, columns: int = 1) -> dict[str, Counter[str]]:
    """The bytes that a rank sends in each operation, as :attr:`~ntk_gp.distributed.group.Group.traffic` counts them.

    :param layout: Of the matrix.
    :param rank: Whose.
    :param columns: r, of the vectors in `forward`, `backward` and `solve`.
    """
    ranks = len(layout.sizes)
    if ranks == 1:
        return {name: Counter() for name in ("factorise", "forward", "backward", "solve", "inverse", "inverse factor")}
    corners = sum(one.size**2 for one in layout.of_rank(rank))
    rows = layout.blocks[:-1]
    parts = sum(one.size for one in rows if one.rank == rank)
    sums = sum(2 * (ranks - 1) * 8 * one.size * columns // ranks for one in rows)
    forward = Counter(broadcast=8 * columns * parts)
    backward = Counter(sum=sums)
    gathered = Counter(gather=8 * (ranks - 1) * max(layout.sizes) * columns)
    return {
        "factorise": Counter(broadcast=8 * corners, gather=8 * (ranks - 1) * layout.panel_numbers),
        "forward": forward,
        "backward": backward,
        "solve": forward + backward + gathered,
        "inverse": Counter(broadcast=8 * layout.numbers_held(rank)),
        "inverse factor": Counter(broadcast=8 * layout.numbers_held(rank)),
    }
