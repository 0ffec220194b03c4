"""Embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...replacements.elementary import embedding_bag
from ..terms import OneHotTerm, ParameterView, Term
from .registry import UnsupportedUse, Use, register_decomposition, register_rule


def embedding(
    use: Use,
    input: Tensor,
    weight: ParameterView,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Iterable[Term]:
    """z_t = row i_t of W; the row of the padding index has no gradient."""
    use.decline_points_in_last(1)
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise UnsupportedUse("an embedding that renormalises or rescales")
    indices = input.reshape(input.shape[0], -1)
    g = use.gradients.reshape(*use.gradients.shape[:2], indices.shape[1], -1)
    if padding_idx is not None:
        g = g * (indices != padding_idx % weight.shape[0])[:, None, :, None]
    return [OneHotTerm(weight, indices.unsqueeze(0), g.unsqueeze(0))]


def positional_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Positions 0, 1, … that are the same for every input pick a slice of the embedding: a raw parameter.

    What is done with the slice has its own rule, or else shows as a use that no rule knows.
    """
    plain = padding_idx is None and max_norm is None and not scale_grad_by_freq and not sparse
    count = input.numel()
    if not plain or not 0 < count <= weight.shape[0] or input.shape not in ((count,), (1, count)):
        return NotImplemented
    if not torch.equal(input.reshape(-1), torch.arange(count, dtype=input.dtype, device=input.device)):
        return NotImplemented
    return weight[:count].view(*input.shape, -1)


def bag_of_embeddings(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """An embedding, and what is done with its rows."""
    if max_norm is not None or scale_grad_by_freq or input.numel() == 0:
        return NotImplemented
    return embedding_bag(input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, *args, **kwargs)


register_rule(F.embedding, embedding, parameters=("weight",))
register_decomposition(F.embedding_bag, bag_of_embeddings)
register_decomposition(F.embedding, positional_embedding)
