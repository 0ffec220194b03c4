"""Functions with derivatives inside, traced: for `torch.export`, and in operations that have the derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode_temporarily

from .network.elementary import ElementaryOperations


class TraceableOperations(ElementaryOperations):
    """The same, and attention as products and a softmax: whichever fused kernel a tracer finds has no forward mode.

    That a mode is active at all keeps encoder layers from their fast path, which has no derivatives.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (
            t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3, output_size=query.shape[-3])
            for t in (key, value)
        )
    scores = query @ key.mT * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return nn.functional.dropout(scores.softmax(-1), dropout_p, training=dropout_p > 0.0) @ value


def traced_through(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
    """The function of these tensors while `torch.export` records: what it records has no derivatives left to take.

    The function is traced by itself first. The exporter, which looks on from above autograd, would record the calls to
    `torch.func` as they are, of which no saved program or ONNX graph can be made.
    """
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx  # takes a while to import

    with ExitStack() as stack:
        for _ in _get_current_function_mode_stack():
            stack.enter_context(_pop_mode_temporarily())
        stack.enter_context(disable_proxy_modes_tracing())
        try:
            graph = make_fx(function, decomposition_table=_DECOMPOSITIONS)(*args)
        except Exception as error:
            raise RuntimeError(
                f"The network cannot be exported: its derivative cannot be traced ({error}). Serve the module as it "
                "is (torch.save, or its state_dict), or write the part of the network that is named there differently."
            ) from error
    return graph(*args)


def _zeros_like_tangent(self: Tensor, other: Tensor, *, self_num_batch_dims: int = 0) -> Tensor:
    return other.new_zeros((*self.shape[:self_num_batch_dims], *other.shape))


# What forward mode leaves in a graph that exporters do not know.
_DECOMPOSITIONS: dict = {torch.ops.aten._new_zeros_with_same_feature_meta.default: _zeros_like_tangent}
