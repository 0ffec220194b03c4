r"""Centred alignment of kernel matrices over the same points.

With the weights p of the points, which add up to one, a matrix K over points and outputs is centred output by output,
:math:`\bar K = (I - 1 p^\top \otimes I_C) K (I - p 1^\top \otimes I_C)`. Alignment is the cosine between two such
matrices (Cortes, Mohri and Rostamizadeh, "Algorithms for Learning Kernels Based on Centered Alignment", JMLR 2012), and
linear CKA where they are inner products of features (Kornblith, Norouzi, Lee and Hinton, "Similarity of Neural Network
Representations Revisited", ICML 2019). For whatever weights, with μ = K p and M = pᵀK p,

.. math:: \langle \bar K, \bar K' \rangle_p
    = \sum_{ij} p_i p_j K_{ij} K'_{ij} - 2 \sum_i p_i \mu_i \mu'_i + M M' :

a few products of each matrix with all weights at once, and a block of its rows at a time.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import memory

# A centred kernel that is smaller than this part of the kernel counts as none: rounding takes up to 1e-6 of it.
_ROUNDING = 1e-10


class Centred(Protocol):
    """A kernel matrix over points and outputs, some of whose rows can be formed."""

    @property
    def num_points(self) -> int: ...

    @property
    def num_outputs(self) -> int: ...

    def gram(self, points: slice, layer: int) -> Tensor:
        """The rows of some points, (m, C, n, C)."""
        ...

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        """Means over the second point, (n, C, C), and over both, (C, C)."""
        ...


class Targets(NamedTuple):
    """The kernel matrix y yᵀ of targets (n, C)."""

    y: Tensor

    @property
    def num_points(self) -> int:
        return len(self.y)

    @property
    def num_outputs(self) -> int:
        return self.y.shape[1]

    def gram(self, points: slice, layer: int) -> Tensor:
        return torch.einsum("ic,jd->icjd", self.y[points], self.y)

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        mean = self.y.mean(0)
        return torch.einsum("ic,d->icd", self.y, mean), torch.outer(mean, mean)


def alignments(one: Centred, other: Centred, layer: int, weights: Tensor) -> Tensor:
    """The centred alignment of two kernel matrices over the same points, for each set of points: (R,).

    :param layer: The number of the layer whose kernels they are.
    :param weights: How often each point counts, (R, n).
    """
    p = weights / weights.sum(-1, keepdim=True)
    # Centred once for the data as they are: what each set is then centred by is small, and nothing cancels.
    means = [each.means(layer) for each in (one, other)]
    sums = _Sums(p, one.num_outputs)
    n = one.num_points
    size = _points_per_block(n, one.num_outputs, len(p), p.device)
    uncentred = p.new_zeros(2)
    for start in range(0, n, size):
        points = slice(start, min(n, start + size))
        blocks = []
        for k, (each, (mean, both)) in enumerate(zip((one, other), means, strict=True)):
            block = each.gram(points, layer)
            uncentred[k] += block.square().sum()
            columns = mean.permute(2, 0, 1)  # μ of the second point: (C, n, C), as seen from an output of the first
            blocks.append(block - mean[points].unsqueeze(2) - columns + both.unsqueeze(1))
        sums.add(points, blocks)
    products = sums.inner_products()
    floor = (uncentred * _ROUNDING**2 / n**2).unsqueeze(-1)
    squares = torch.where(products[1:] > floor, products[1:], torch.nan)
    return products[0] / squares.sqrt().prod(0)


class _Sums:
    """The three sums of the formula above, of two matrices with each other and with themselves, block by block."""

    _PAIRS = ((0, 1), (0, 0), (1, 1))

    def __init__(self, p: Tensor, outputs: int):
        self.p = p
        self.squares = p.new_zeros(3, len(p))
        self.cross = p.new_zeros(3, len(p))
        self.means = p.new_zeros(2, len(p), outputs, outputs)

    def add(self, points: slice, blocks: list[Tensor]) -> None:
        p = self.p
        mu = [torch.einsum("rj,icjd->ricd", p, block) for block in blocks]
        for k, (a, b) in enumerate(self._PAIRS):
            products = (blocks[a] * blocks[b]).sum((1, 3))
            self.squares[k] += ((p[:, points] @ products) * p).sum(-1)
            self.cross[k] += (p[:, points] * (mu[a] * mu[b]).sum((-1, -2))).sum(-1)
        for k in range(2):
            self.means[k] += torch.einsum("ri,ricd->rcd", p[:, points], mu[k])

    def inner_products(self) -> Tensor:
        """(3, R)."""
        both = torch.stack([(self.means[a] * self.means[b]).sum((-1, -2)) for a, b in self._PAIRS])
        return self.squares - 2 * self.cross + both


def _points_per_block(n: int, outputs: int, sets: int, device: torch.device) -> int:
    """How many points' rows are held at once: of two matrices, centred and not, and their means for all sets."""
    per_point = 8 * outputs**2 * (5 * n + 3 * sets)
    return max(1, memory.GRAM_BLOCK.bytes(device) // per_point)
