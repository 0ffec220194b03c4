"""Multi-head attention, taken apart into linear layers around the attention itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import register_decomposition


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    **options: Any,
) -> Any:
    """Projections, then the attention alone, then the output projection.

    Attention with masks and the like is torch's own, with identities in the projections' place.
    """
    if bias_k is not None or bias_v is not None:
        return NotImplemented
    size = embed_dim_to_check
    if not use_separate_proj_weight and query is key and key is value:
        assert in_proj_weight is not None
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        biases: tuple = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if not use_separate_proj_weight:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    others = [value for name, value in options.items() if name != "average_attn_weights"]
    is_plain = all(value is None or value is False for value in (key_padding_mask, attn_mask, *others))
    if is_plain and not (need_weights or add_zero_attn or (training and dropout_p > 0)):
        return F.linear(_attend(q, k, v, num_heads), out_proj_weight, out_proj_bias), None
    eye = torch.eye(size, dtype=q.dtype, device=q.device)
    attended, attention = F.multi_head_attention_forward(
        q, k, v, size, num_heads, None, None, None, None, add_zero_attn, dropout_p, eye, None, training,
        key_padding_mask, need_weights, attn_mask, True, eye, eye, eye, **options,
    )  # fmt: skip
    return F.linear(attended, out_proj_weight, out_proj_bias), attention


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of (length, *batch, width) each."""
    heads = (t.unflatten(-1, (num_heads, -1)).movedim(0, -2) for t in (q, k, v))  # (*batch, head, length, width of one)
    return F.scaled_dot_product_attention(*heads).movedim(-2, 0).flatten(-2)


register_decomposition(F.multi_head_attention_forward, multi_head_attention)
