"""Diagonals of Fisher information matrices, and their cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import memory
from .tangents import Tangents


def diagonal_cosines(
    one: tuple[Tangents, Tensor, Tensor | None], other: tuple[Tangents, Tensor, Tensor | None]
) -> Tensor:
    """The cosine between the diagonals of JᵀJ, layer by layer and for each set of points: (R, layers), the whole first.

    The rows of J are formed some points at a time, and once more for every so many sets as there is memory for. That is
    exact, and costs no more than a few of the random products by which diagonals are estimated elsewhere.

    :param one: J, how often each point counts (R, n), and, if J is to be the gradient of a squared loss, the residuals
        (n, C).
    :param other: The same of the other task.
    """
    tangents = one[0]
    vectors = 4  # of each set: two diagonals, a product of them, and a layer's part of it
    size = max(1, memory.BLOCK.bytes(tangents.x.device) // (vectors * 8 * tangents.function.num_parameters))
    pieces = []
    for some in range(0, len(one[1]), size):
        a, b = (diagonals(t, weights[some : some + size], residuals) for t, weights, residuals in (one, other))
        pieces.append(torch.stack([_by_layer(product, tangents) for product in (a * b, a.square(), b.square())]))
    products, *squares = torch.cat(pieces, dim=1)
    return products / (squares[0].sqrt() * squares[1].sqrt())


def diagonals(tangents: Tangents, weights: Tensor, residuals: Tensor | None) -> Tensor:
    """Σ_i w_i Σ_c J_ic², (R, P), for weights (R, n); or Σ_i w_i (Σ_c r_ic J_ic)² with the residuals r (n, C)."""
    out = weights.new_zeros(len(weights), tangents.function.num_parameters)
    for points, rows in tangents.rows():
        if residuals is None:
            squares = rows.square().sum(1)
        else:
            squares = (residuals[points].unsqueeze(1) @ rows).squeeze(1).square()
        out.addmm_(weights[:, points], squares)
    return out


def _by_layer(values: Tensor, tangents: Tangents) -> Tensor:
    """Sums over the parameters of each layer, the whole network first: (R, P) to (R, layers)."""
    return torch.stack([values[:, tangents.columns(layer)].sum(-1) for layer in tangents.numbers], dim=-1)
