"""Activations with parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ..terms import ParameterView, Term
from .registry import Use, register_rule


def prelu(use: Use, input: Tensor, weight: ParameterView) -> Iterable[Term]:
    """z = max(a, 0) + w min(a, 0), w one number or one for each channel (the dimension after the points)."""
    values = use.gradients * input.clamp(max=0.0).unsqueeze(1)
    if weight.numel() == 1:
        return use.features(weight, values.flatten(2).sum(2))
    use.decline_points_not_first()
    channel_dim = 2 + use.split
    others = [dim for dim in range(2, values.dim()) if dim != channel_dim]
    return use.features(weight, values.sum(others) if others else values)


register_rule(F.prelu, prelu, parameters=("weight",))
