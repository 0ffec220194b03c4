"""Elementary stand-ins for the operations whose second derivatives torch gets wrong, or does not have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from .mode import ReplacingMode


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    out = _standardise(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats:
        return nn.functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    out = _standardise(input, tuple(range(2, input.dim())), eps)
    channels = (-1, *[1] * (input.dim() - 2))
    out = out if weight is None else out * weight.view(channels)
    return out if bias is None else out + bias.view(channels)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return (input + 3.0).clamp(0.0, 6.0) / 6.0


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding, (bags, longest, d), with a weight for each entry, and a sum, a mean or a maximum of each bag."""
    kept = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % weight.shape[0]
    if offsets is not None:
        places, exists = _places(offsets, input.shape[0], include_last_offset)
        input, kept = input[places], kept[places] & exists
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[places]
    rows = nn.functional.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq, sparse)
    if mode == "max":
        largest = rows.masked_fill(~kept.unsqueeze(-1), -torch.inf).max(1).values
        return torch.where(kept.any(1, keepdim=True), largest, 0.0)
    scale = kept.to(weight.dtype)
    if mode == "mean":
        scale = scale / scale.sum(1, keepdim=True).clamp(min=1.0)
    scale = scale if per_sample_weights is None else scale * per_sample_weights
    return (rows * scale.unsqueeze(-1)).sum(1)


def _places(offsets: Tensor, total: int, include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """Where the entries of each bag are in the list of all, (bags, longest), and whether they are there."""
    starts = offsets[:-1] if include_last_offset else offsets
    ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_full((1,), total)])
    longest = int((ends - starts).max()) if len(starts) else 0
    places = starts.unsqueeze(1) + torch.arange(longest, dtype=offsets.dtype, device=offsets.device)
    exists = places < ends.unsqueeze(1)
    return places.clamp(max=max(0, total - 1)), exists


class ElementaryOperations(ReplacingMode):
    """Some fused operations as compositions of elementary ones, which can be differentiated any number of times.

    Layer and instance norm lose terms, without a word, when their first derivative in forward mode or under vmap is
    differentiated once more (https://github.com/pytorch/pytorch/issues/196700,
    https://github.com/pytorch/pytorch/issues/196699); the others have no such derivative and raise.
    """

    table: ClassVar = {
        nn.functional.embedding_bag: embedding_bag,
        nn.functional.glu: _glu,
        nn.functional.hardsigmoid: _hardsigmoid,
        torch.cdist: _cdist,
        nn.functional.layer_norm: _layer_norm,
        torch.layer_norm: _layer_norm,
        nn.functional.instance_norm: _instance_norm,
        torch.instance_norm: _instance_norm,
    }
