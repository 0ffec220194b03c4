r"""Gram matrices from factors: tile by tile for factored terms, by per-point gradients for the others.

A tile is a block of about 500 × 500 entries, so that its Gram matrices of inputs and of output gradients stay in cache
while they are multiplied and added. Inside a tile rows are output-major (output·m + point): the input factor, which
the outputs share, then broadcasts over whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import memory, settings
from ...replacements.onednn import matmul
from ..memory import empty, mirror_upper_triangle
from ..terms import FeatureTerm, Term
from ..terms.base import once

# Bytes of a tile: on a CPU its products stay in cache, on a GPU one tile fills the device.
_TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
# Wider dense features are streamed through whole rows of the Gram matrix instead of tiles.
_TILE_FEATURES = 1024
# Most rows of the blocks in which a symmetric Gram matrix's triangle is formed by columns.
_BLOCK_ROWS = 512
# Per-point gradients formed at once: enough that one pass over the Gram matrix is cheap beside the product.
_MAX_COLUMNS = 1 << 16


@dataclass
class _Pass:
    """One sweep over some terms: `variances` (1 or B, G) scale the left factors, `coefficients` (W,) the result."""

    variances: Tensor
    coefficients: Tensor | None
    terms: list[int]


class Gram:
    """J Σ_w J'ᵀ of two lists of equal terms, C outputs.

    :param left: The terms of J, n points.
    :param right: The terms of J', n' points; the same list for a symmetric matrix.
    :param variances: Prior variances, (W, G).
    :param shape: (B, n, n', C).
    """

    def __init__(
        self, left: Sequence[Term], right: Sequence[Term], variances: Tensor, shape: tuple[int, int, int, int]
    ):
        self.left = left
        self.right = right
        self.batch, self.n, self.m, self.outputs = shape
        self.symmetric = left is right
        self.variances = variances
        self.num_results = max(self.batch, variances.shape[0])
        self.tiled = [i for i, term in enumerate(left) if is_tiled(term)]
        self.streamed = [i for i in range(len(left)) if i not in set(self.tiled)]

    def dense(self) -> Tensor:
        """The matrix: (B or W, n·C, n'·C)."""
        C = self.outputs
        out = empty((self.num_results, self.n * C, self.m * C), self.variances)
        if not self.tiled:
            out.zero_()
        elif C == 1:
            self._fill(out)
        else:
            self._fill_by_outputs(out.unflatten(1, (self.n, C)).unflatten(3, (self.m, C)))
        self._add_streamed(out)
        return out

    def _fill(self, out: Tensor) -> None:
        """One output: tiles are added up in the matrix itself."""
        for rows, columns, tile in self.tiles(out, "Gram matrix"):
            if self.symmetric and rows == columns:
                tile.copy_(tile.triu() + tile.triu(1).mT)  # symmetric to the last bit
            elif self.symmetric and not self.streamed:
                out[:, columns, rows] = tile.mT

    def _fill_by_outputs(self, out: Tensor) -> None:
        """Several outputs: tiles are output-major, and the matrix (B, n, C, n', C) is point-major."""
        C = self.outputs
        for rows, columns, tile in self.tiles(label="Gram matrix"):
            if self.symmetric and rows == columns:
                tile = tile.triu() + tile.triu(1).mT
            tile = tile.unflatten(1, (C, -1)).unflatten(3, (C, -1))
            out[:, rows, :, columns] = tile.permute(0, 2, 1, 4, 3)
            if self.symmetric and not self.streamed and rows != columns:
                out[:, columns, :, rows] = tile.permute(0, 4, 3, 2, 1)

    def matmul(self, rhs: Tensor) -> Tensor:
        """The tiled terms' part of the matrix, times rhs (B or 1, n'·C, r): (B or W, n·C, r)."""
        C, r = self.outputs, rhs.shape[-1]
        out = rhs.new_zeros(self.num_results, self.n, C, r)
        rhs = rhs.unflatten(1, (self.m, C))
        for rows, columns, tile in self.tiles():
            _add_block(out, rows, matmul(tile, rhs[:, columns].transpose(1, 2).flatten(1, 2)))
            if self.symmetric and rows != columns:
                _add_block(out, columns, matmul(tile.mT, rhs[:, rows].transpose(1, 2).flatten(1, 2)))
        return out.flatten(1, 2)

    def tiles(self, out: Tensor | None = None, label: str = "") -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of points of both sides, and the tile, (B or W, C·m, C·m'), of the upper triangle if symmetric.

        :param out: The whole matrix, of one output, for tiles that are views of it.
        :param label: Of the progress bar; none where this is a step of something longer.
        """
        size = max(8, _tile_rows(self.variances) // self.outputs)
        passes = self._passes(self.tiled)
        blocks = [slice(j, min(self.m, j + size)) for j in range(0, self.m, size)]
        right = _RightFactors(self.right, self.tiled, keep=self.outputs == 1)
        starts = range(0, self.n, size)
        for i in settings.progress(starts, label) if label else starts:
            rows = slice(i, min(self.n, i + size))
            left = [_left_factors(self.left, sweep, rows) for sweep in passes]
            for columns in blocks[i // size :] if self.symmetric else blocks:
                target = None if out is None else out[:, rows, columns]
                diagonal = self.symmetric and rows == columns
                yield rows, columns, self._tile(passes, left, right[columns], target, diagonal)

    def _tile(
        self, passes: list[_Pass], left: list[dict], right: dict, target: Tensor | None, diagonal: bool
    ) -> Tensor:
        if passes[0].coefficients is None:
            return self._sweep(left[0], right, target, diagonal)
        total: Tensor | None = None
        for sweep, factors in zip(passes, left, strict=True):
            assert sweep.coefficients is not None
            part = self._sweep(factors, right, None, diagonal) * sweep.coefficients[:, None, None]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total if target is None else target.copy_(total)

    def _sweep(
        self, left: dict[int, list], right: dict[int, list], target: Tensor | None, diagonal: bool = False
    ) -> Tensor:
        """The sum of the terms' products, in `target` where there is one.

        :param diagonal: The tile is on the diagonal of a symmetric matrix: what a position has with a later one is the
            transpose of what that has with it.
        """
        total: Tensor | None = None
        later: Tensor | None = None
        for i, factors in left.items():
            term = self.right[i]
            if isinstance(term, FeatureTerm):
                total = _add(total, matmul(factors[0], right[i][0]), target)
                continue
            for k, l in term.pairs():
                if diagonal and l < k:
                    continue
                g = matmul(factors[k][1], right[i][l][1])
                if factors[k][0] is None:
                    total = _add(total, g, target)
                    continue
                a = term.input_product(factors[k][0], right[i][l][0])
                if diagonal and l > k:
                    later = _multiply_add(later, a, g, self.outputs, None)
                else:
                    total = _multiply_add(total, a, g, self.outputs, target)
        assert total is not None
        return total if later is None else total.add_(later).add_(later.mT)

    def _passes(self, terms: list[int]) -> list[_Pass]:
        """One sweep where each batch has one weighting; otherwise one for each group of parameters."""
        # By groups what all batches have in common stays one; each group's terms are in its own sweep.
        if len(self.variances) == 1 or (len(self.variances) == self.batch and not self._has_common_factors(terms)):
            return [_Pass(self.variances, None, terms)]
        passes = []
        for group in range(self.variances.shape[1]):
            mine = [i for i in terms if any(view.group == group for view in self.left[i].views)]
            if mine:
                one = torch.zeros_like(self.variances[:1])
                one[:, group] = 1.0
                passes.append(_Pass(one, self.variances[:, group], mine))
        return passes

    def _has_common_factors(self, terms: list[int]) -> bool:
        """Whether some factors are the same for all batches."""
        tensors = (getattr(self.left[i], name, None) for i in terms for name in self.left[i].tensors)
        return any(tensor is not None and once(tensor) is not tensor for tensor in tensors)

    def _add_streamed(self, out: Tensor) -> None:
        if not self.streamed:
            return
        item = self.variances.element_size() * self.batch * self.outputs * (2 * self.n + self.m)
        max_columns = max(1, min(_MAX_COLUMNS, memory.COLUMNS.bytes(self.variances.device) // max(1, item)))
        one_group = self.variances.shape[1] == 1  # then the result is scaled, which is smaller than the features
        for sweep in self._passes(self.streamed):
            coefficients = self.variances[:, 0] if one_group else sweep.coefficients
            for i in sweep.terms:
                left = self.left[i].columns(max_columns, sweep.variances)
                right = left if self.symmetric else self.right[i].columns(max_columns, sweep.variances)
                for features, scale in left:
                    other = features if self.symmetric else next(iter(right))[0]
                    scaled = features if one_group else features * scale.unsqueeze(1)
                    self._add_features(out, scaled, other, coefficients)
        if self.symmetric:
            mirror_upper_triangle(out)

    def _add_features(self, out: Tensor, left: Tensor, right: Tensor, coefficients: Tensor | None) -> None:
        step = max(64, min(_BLOCK_ROWS, out.shape[1] // 4)) if self.symmetric else max(1, out.shape[1])
        for i in range(0, out.shape[1], step):
            first = i if self.symmetric else 0
            block = matmul(left[:, i : i + step], right[:, first:].mT)
            out[:, i : i + step, first:].add_(block if coefficients is None else coefficients[:, None, None] * block)


def is_tiled(term: Term) -> bool:
    """Whether a term takes part in tiles."""
    if isinstance(term, FeatureTerm):
        return term.features.shape[-1] <= _TILE_FEATURES
    return term.num_products > 0


class _RightFactors:
    """The factors of blocks of points on the right, transposed; kept where they are views that cost no memory."""

    def __init__(self, terms: Sequence[Term], tiled: Sequence[int], keep: bool):
        self._terms = {i: terms[i] for i in tiled}
        self._kept: dict[int, dict[int, list]] | None = {} if keep else None

    def __getitem__(self, points: slice) -> dict[int, list]:
        if self._kept is None:
            return self._factors(points)
        if points.start not in self._kept:
            self._kept[points.start] = self._factors(points)
        return self._kept[points.start]

    def _factors(self, points: slice) -> dict[int, list]:
        factors: dict[int, list] = {}
        for i, term in self._terms.items():
            if isinstance(term, FeatureTerm):
                factors[i] = [term.block(points).mT]
            else:
                factors[i] = [(a, g.mT) for a, g in term.factors(points)]
        return factors


def _left_factors(terms: Sequence[Term], sweep: _Pass, rows: slice) -> dict[int, list]:
    factors: dict[int, list] = {}
    for i in sorted(sweep.terms, key=lambda i: not isinstance(terms[i], FeatureTerm)):
        term = terms[i]
        if isinstance(term, FeatureTerm):
            factors[i] = [term.block(rows, sweep.variances)]
        else:
            factors[i] = term.factors(rows, sweep.variances)
    return factors


def _tile_rows(like: Tensor) -> int:
    """Of a square tile of that dtype on that device: a multiple of what vectors and caches come in."""
    available = _TILE_BYTES.get(like.device.type, _TILE_BYTES["cuda"])
    return math.isqrt(available // like.element_size()) // 32 * 32


def _add(total: Tensor | None, block: Tensor, target: Tensor | None) -> Tensor:
    if total is not None:
        return total.add_(block)
    return block if target is None else target.copy_(block)


def _multiply_add(total: Tensor | None, a: Tensor, g: Tensor, outputs: int, target: Tensor | None) -> Tensor:
    """total + a ∘ g, a (1 or B, m, m') being the same for all pairs of outputs and g (B, C·m, C·m'); in place."""
    if outputs > 1:
        shape = (outputs, a.shape[-2], outputs, a.shape[-1])
        blocks = g.unflatten(1, shape[:2]).unflatten(3, shape[2:])
        if total is None:
            return (blocks * a[:, None, :, None]).flatten(3).flatten(1, 2)
        total.unflatten(1, shape[:2]).unflatten(3, shape[2:]).addcmul_(blocks, a[:, None, :, None])
        return total
    if total is not None:
        return total.addcmul_(a, g)
    return a * g if target is None else torch.mul(a, g, out=target)


def _add_block(out: Tensor, points: slice, block: Tensor) -> None:
    """Adds output-major rows (B, C·m, r) to point-major ones (B, n, C, r)."""
    out[:, points] += block.unflatten(1, (out.shape[2], -1)).transpose(1, 2)
