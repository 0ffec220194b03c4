r"""Gram matrices from factors: tile by tile for factored terms, by per-point gradients for the others.

A tile is a block of about 256 × 256 rows, so that its Gram matrices of inputs and of output gradients stay in cache
while they are multiplied and added. Inside a tile rows are output-major (output·m + point): the input factor, which
the outputs share, then broadcasts over whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import settings
from ..terms import FeatureTerm, Term

# Rows of a tile: on a CPU two tiles fit in a core's cache, on a GPU one tile fills the device.
_TILE_ROWS = {"cpu": 256, "cuda": 4096}
# Wider dense features are streamed through whole rows of the Gram matrix instead of tiles.
_TILE_FEATURES = 1024
# Rows of the blocks in which a symmetric Gram matrix's triangle is formed by columns.
_BLOCK_ROWS = 512
# Per-point gradients formed at once: enough that one pass over the Gram matrix is cheap beside the product.
_MAX_COLUMNS = 1 << 16


@dataclass
class _Pass:
    """One sweep over some terms: `weights` (1 or B, G) scale the left factors, `coefficients` (W,) the result."""

    weights: Tensor
    coefficients: Tensor | None
    terms: list[int]


class Gram:
    """J Σ_w J'ᵀ of two lists of equal terms, C outputs.

    :param left: The terms of J, n points.
    :param right: The terms of J', n' points; the same list for a symmetric matrix.
    :param weights: Prior variances, (W, G).
    :param shape: (B, n, n', C).
    """

    def __init__(self, left: Sequence[Term], right: Sequence[Term], weights: Tensor, shape: tuple[int, int, int, int]):
        self.left = left
        self.right = right
        self.batch, self.n, self.m, self.outputs = shape
        self.symmetric = left is right
        self.weights = weights
        self.num_results = max(self.batch, weights.shape[0])
        self.tiled = [i for i, term in enumerate(left) if is_tiled(term)]
        self.streamed = [i for i in range(len(left)) if i not in set(self.tiled)]

    def dense(self) -> Tensor:
        """The matrix: (B or W, n·C, n'·C)."""
        C = self.outputs
        out = self.weights.new_empty(self.num_results, self.n, C, self.m, C)
        if self.tiled:
            for rows, columns, tile in self.tiles():
                if self.symmetric and rows == columns:
                    tile = tile.triu() + tile.triu(1).mT  # to the last bit
                tile = tile.unflatten(1, (C, -1)).unflatten(3, (C, -1))
                out[:, rows, :, columns] = tile.permute(0, 2, 1, 4, 3)
                if self.symmetric and not self.streamed and rows != columns:
                    out[:, columns, :, rows] = tile.permute(0, 4, 3, 2, 1)
        else:
            out.zero_()
        out = out.flatten(3).flatten(1, 2)
        self._add_streamed(out)
        return out

    def matmul(self, rhs: Tensor) -> Tensor:
        """The tiled terms' part of the matrix, times rhs (B or 1, n'·C, r): (B or W, n·C, r)."""
        C, r = self.outputs, rhs.shape[-1]
        out = rhs.new_zeros(self.num_results, self.n, C, r)
        rhs = rhs.unflatten(1, (self.m, C))
        for rows, columns, tile in self.tiles():
            _add_block(out, rows, tile @ rhs[:, columns].transpose(1, 2).flatten(1, 2))
            if self.symmetric and rows != columns:
                _add_block(out, columns, tile.mT @ rhs[:, rows].transpose(1, 2).flatten(1, 2))
        return out.flatten(1, 2)

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of points of both sides, and the tile, (B or W, C·m, C·m'), of the upper triangle if symmetric."""
        size = max(8, _TILE_ROWS.get(self.weights.device.type, 4096) // self.outputs)
        passes = self._passes(self.tiled)
        for i in range(0, self.n, size):
            rows = slice(i, min(self.n, i + size))
            factors = [_left_factors(self.left, sweep, rows) for sweep in passes]
            for j in range(i if self.symmetric else 0, self.m, size):
                columns = slice(j, min(self.m, j + size))
                yield rows, columns, self._tile(passes, factors, columns)

    def _tile(self, passes: list[_Pass], factors: list[dict], columns: slice) -> Tensor:
        if passes[0].coefficients is None:
            return self._sweep(factors[0], columns)
        total: Tensor | None = None
        for sweep, sweep_factors in zip(passes, factors, strict=True):
            assert sweep.coefficients is not None
            part = self._sweep(sweep_factors, columns) * sweep.coefficients[:, None, None]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _sweep(self, factors: dict, columns: slice) -> Tensor:
        total: Tensor | None = None
        for i, left in factors.items():
            term = self.right[i]
            if isinstance(term, FeatureTerm):
                block = left[0] @ term.block(columns).mT
                total = block if total is None else total.add_(block)
                continue
            count = term.num_products
            inputs = [term.input_factor(k, columns) for k in range(count)]
            outputs = [term.output_factor(k, columns) for k in range(count)]
            for k, l in term.pairs():
                a = term.input_product(left[k][0], inputs[l])
                g = left[k][1] @ outputs[l].mT
                total = _multiply_add(total, a, g, self.outputs)
        assert total is not None
        return total

    def _passes(self, terms: list[int]) -> list[_Pass]:
        """One sweep where each batch has one weighting; otherwise one for each group of parameters."""
        if self.weights.shape[0] in (1, self.batch):
            return [_Pass(self.weights, None, terms)]
        passes = []
        for group in range(self.weights.shape[1]):
            mine = [i for i in terms if any(view.group == group for view in self.left[i].views)]
            if mine:
                one = torch.zeros_like(self.weights[:1])
                one[:, group] = 1.0
                passes.append(_Pass(one, self.weights[:, group], mine))
        return passes

    def _add_streamed(self, out: Tensor) -> None:
        if not self.streamed:
            return
        item = self.weights.element_size() * self.batch * self.outputs * (2 * self.n + self.m)
        max_columns = max(1, min(_MAX_COLUMNS, settings.memory_budget.bytes(self.weights.device) // (8 * max(1, item))))
        for sweep in self._passes(self.streamed):
            for i in sweep.terms:
                left = self.left[i].columns(max_columns, sweep.weights)
                right = left if self.symmetric else self.right[i].columns(max_columns, sweep.weights)
                for features, scale in left:
                    other = features if self.symmetric else next(iter(right))[0]
                    self._add_features(out, features * scale.unsqueeze(1), other, sweep.coefficients)
        if self.symmetric:
            _mirror(out)

    def _add_features(self, out: Tensor, left: Tensor, right: Tensor, coefficients: Tensor | None) -> None:
        step = _BLOCK_ROWS if self.symmetric else max(1, out.shape[1])
        for i in range(0, out.shape[1], step):
            first = i if self.symmetric else 0
            target = out[:, i : i + step, first:]
            if coefficients is not None:
                target.add_(coefficients[:, None, None] * (left[:, i : i + step] @ right[:, first:].mT))
            elif target.shape[0] == 1:
                target[0].addmm_(left[0, i : i + step], right[0, first:].mT)
            else:
                target.baddbmm_(left[:, i : i + step], right[:, first:].mT.expand(len(target), -1, -1))


def is_tiled(term: Term) -> bool:
    """Whether a term takes part in tiles."""
    if isinstance(term, FeatureTerm):
        return term.features.shape[-1] <= _TILE_FEATURES
    return term.num_products > 0


def _left_factors(terms: Sequence[Term], sweep: _Pass, rows: slice) -> dict[int, list]:
    factors: dict[int, list] = {}
    for i in sorted(sweep.terms, key=lambda i: not isinstance(terms[i], FeatureTerm)):
        term = terms[i]
        if isinstance(term, FeatureTerm):
            factors[i] = [term.block(rows, sweep.weights)]
        else:
            factors[i] = [
                (term.input_factor(k, rows, sweep.weights), term.output_factor(k, rows))
                for k in range(term.num_products)
            ]
    return factors


def _multiply_add(total: Tensor | None, a: Tensor, g: Tensor, outputs: int) -> Tensor:
    """total + a ∘ g, a (1 or B, m, m') being the same for all pairs of outputs and g (B, C·m, C·m'); in place."""
    if outputs > 1:
        shape = (outputs, a.shape[-2], outputs, a.shape[-1])
        blocks = g.unflatten(1, shape[:2]).unflatten(3, shape[2:])
        if total is None:
            return (blocks * a[:, None, :, None]).flatten(3).flatten(1, 2)
        total.unflatten(1, shape[:2]).unflatten(3, shape[2:]).addcmul_(blocks, a[:, None, :, None])
        return total
    return g.mul_(a) if total is None and len(g) >= len(a) else a * g if total is None else total.addcmul_(a, g)


def _add_block(out: Tensor, points: slice, block: Tensor) -> None:
    """Adds output-major rows (B, C·m, r) to point-major ones (B, n, C, r)."""
    out[:, points] += block.unflatten(1, (out.shape[2], -1)).transpose(1, 2)


def _mirror(matrix: Tensor) -> None:
    """Copies the upper triangle (of blocks) to the lower one."""
    for i in range(0, matrix.shape[-1], _BLOCK_ROWS):
        end = i + _BLOCK_ROWS
        block = matrix[:, i:end, i:end]
        block.copy_(block.triu() + block.triu(1).mT)
        matrix[:, end:, i:end] = matrix[:, i:end, end:].mT
