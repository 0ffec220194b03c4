"""Products with a Gram matrix that is formed block by block, where that is cheaper than column by column."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from ... import memory
from ...replacements.onednn import matmul
from ..base import Jacobian

Block = tuple[slice, slice, Tensor]  # rows, columns, and what is there, (B or W, rows, columns)


def rows_of_blocks(left: Jacobian, right: Jacobian, results: int) -> int:
    """How many points' rows of a Gram matrix may be held at once: an eighth of the memory budget."""
    row_bytes = results * left.function.num_outputs * right.num_rows * left.x.element_size()
    return max(1, min(left.num_points, memory.GRAM_BLOCK.bytes(left.x.device) // max(1, row_bytes)))


def points_formed(left: Jacobian, right: Jacobian, height: int) -> float:
    """How many points' gradients are formed for :func:`blocks` of so many points' rows, counted for each time."""
    n, repeats = left.num_points, -(-left.num_points // height)
    if left is not right:
        return n + repeats * right.num_points
    return n + (n * (repeats + 1) / 2 if repeats > 1 else 0)


def blocks(left: Jacobian, right: Jacobian, variances: Tensor, height: int) -> Iterator[Block]:
    """Blocks of J Σ J'ᵀ from the top to the bottom; of a symmetric one those on the diagonal and above."""
    outputs = left.function.num_outputs
    for start in range(0, left.num_points, height):
        part = left[slice(start, start + height)]
        rows = slice(start * outputs, start * outputs + part.num_rows)
        if left is not right:
            yield rows, slice(0, right.num_rows), part.gram(right, variances)
            continue
        yield rows, rows, part.gram(part, variances)
        if rows.stop < left.num_rows:
            beyond = left[slice(start + height, None)]
            yield rows, slice(rows.stop, left.num_rows), part.gram(beyond, variances)


def add_products(out: Tensor, blocks: Iterable[Block], rhs: Tensor, symmetric: bool) -> Tensor:
    """Adds the product of the matrix that consists of these blocks with rhs (B or 1, N', r) to `out` (B, N, r)."""
    for rows, columns, block in blocks:
        out[:, rows] += matmul(block, rhs[:, columns])
        if symmetric and rows != columns:
            out[:, columns] += matmul(block.mT, rhs[:, rows])
    return out
