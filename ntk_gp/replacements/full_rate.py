"""Layers of the network at the processor's full rate, in values and in forward mode."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._compat import is_any_autocast_enabled
from .mode import ReplacingMode
from .onednn import is_product_served, is_tanh_served, onednn_product, onednn_tanh


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, x_tangent = forward_ad.unpack_dual(input)
    w, w_tangent = forward_ad.unpack_dual(weight)
    b, b_tangent = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if x.dim() != 2 or not is_product_served(x, w.mT, b) or is_any_autocast_enabled():
        return nn.functional.linear(input, weight, bias)
    value = onednn_product(x, w.mT, b)
    tangents = []
    if w_tangent is not None:
        tangents.append(onednn_product(x, w_tangent.mT, b_tangent))
    elif b_tangent is not None:
        tangents.append(b_tangent.expand_as(value))
    if x_tangent is not None:
        tangents.append(onednn_product(x_tangent, w.mT))
    return forward_ad.make_dual(value, sum(tangents[1:], tangents[0])) if tangents else value


def _tanh(input: Tensor) -> Tensor:
    x, tangent = forward_ad.unpack_dual(input)
    if not is_tanh_served(x):
        return torch.tanh(input)
    value = onednn_tanh(x)
    return value if tangent is None else forward_ad.make_dual(value, torch.ops.aten.tanh_backward(tangent, value))


class FullRateLayers(ReplacingMode):
    """Linear layers and tanh by oneDNN, where it serves (see :mod:`.onednn`); a layer's other operations as they are.

    PyTorch's tanh takes as long as a layer's product. Neither has derivatives in oneDNN, so those of forward mode are
    written out, for dual numbers of :mod:`torch.autograd.forward_ad`.
    """

    table: ClassVar = {
        nn.functional.linear: _linear,
        torch.tanh: _tanh,
        Tensor.tanh: _tanh,
    }
