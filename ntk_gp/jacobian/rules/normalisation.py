"""Scale and shift of normalisation layers: their gradients are the normalised input times g, and g."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..terms import ParameterView, Term
from .registry import Use, register_rule

Parameter = ParameterView | None


def layer_norm(
    use: Use,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Iterable[Term]:
    use.keep_last(len(normalized_shape))
    normalised = F.layer_norm(input, normalized_shape, None, None, eps)
    scaled, shifted = use.gradients * normalised.unsqueeze(1), use.gradients
    return use.features(weight, use.sum_to(weight, scaled)) + use.features(bias, use.sum_to(bias, shifted))


def rms_norm(
    use: Use, input: Tensor, normalized_shape: Sequence[int], weight: Parameter = None, eps: float | None = None
) -> Iterable[Term]:
    use.keep_last(len(normalized_shape))
    scaled = use.gradients * F.rms_norm(input, normalized_shape, None, eps).unsqueeze(1)
    return use.features(weight, use.sum_to(weight, scaled))


def group_norm(
    use: Use, input: Tensor, num_groups: int, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5
) -> Iterable[Term]:
    flat = input.flatten(0, 1) if use.split else input
    return _by_channel(use, F.group_norm(flat, num_groups, None, None, eps).view_as(input), weight, bias)


def batch_norm(
    use: Use,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Parameter = None,
    bias: Parameter = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterable[Term]:
    flat = input.flatten(0, 1) if use.split else input
    normalised = F.batch_norm(flat, running_mean, running_var, None, None, training, momentum, eps)
    return _by_channel(use, normalised.view_as(input), weight, bias)


def instance_norm(
    use: Use,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Parameter = None,
    bias: Parameter = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterable[Term]:
    flat = input.flatten(0, 1) if use.split else input
    normalised = F.instance_norm(flat, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return _by_channel(use, normalised.view_as(input), weight, bias)


def _by_channel(use: Use, normalised: Tensor, weight: Parameter, bias: Parameter) -> Iterable[Term]:
    """Layers whose parameters belong to channels, the dimension after the points (and windows)."""
    use.keep_first()
    channel_dim = 2 + use.split
    others = [dim for dim in range(2, use.gradients.dim()) if dim != channel_dim]

    def by_channel(values: Tensor) -> Tensor:
        return values.sum(others) if others else values

    return [
        *use.features(weight, by_channel(use.gradients * normalised.unsqueeze(1))),
        *use.features(bias, by_channel(use.gradients)),
    ]


register_rule(F.layer_norm, layer_norm)
register_rule(torch.layer_norm, layer_norm)
register_rule(F.group_norm, group_norm)
register_rule(F.batch_norm, batch_norm)
register_rule(F.instance_norm, instance_norm)
if hasattr(F, "rms_norm"):  # torch 2.4
    register_rule(F.rms_norm, rms_norm, parameters=("weight",))
