"""Matrix products at the processor's full rate."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# Multiplications of a product that is worth the longer call, and the width of more than a few vectors.
_WORTHWHILE = 1 << 18
_NARROW = 16


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (…, m, k) and (…, k, n).

    PyTorch hands float32 products on a CPU to MKL, which uses vectors of half the processor's width where Intel did not
    make it. oneDNN, which comes with PyTorch too, uses all of it: twice the rate on AMD's processors with AVX-512. Its
    product has no derivatives, so it serves where none are recorded.
    """
    if forward_ad._current_level >= 0 or not _is_served(left, right):
        return left @ right
    return _product(left, right)


class FullRateLayers(TorchFunctionMode):
    """Linear layers by the same products, with their derivatives in a level of :mod:`torch.autograd.forward_ad`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _linear(*args, **kwargs) if function is nn.functional.linear else function(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, x_tangent = forward_ad.unpack_dual(input)
    w, w_tangent = forward_ad.unpack_dual(weight)
    b, b_tangent = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    if not _is_layer_served(x, w, b):
        return nn.functional.linear(input, weight, bias)
    value = _product(x, w.mT, b)
    tangents = []
    if w_tangent is not None:
        tangents.append(_product(x, w_tangent.mT, b_tangent))
    elif b_tangent is not None:
        tangents.append(b_tangent.expand_as(value))
    if x_tangent is not None:
        tangents.append(_product(x_tangent, w.mT))
    return forward_ad.make_dual(value, sum(tangents[1:], tangents[0])) if tangents else value


def _is_layer_served(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dim() == 2
        and not torch.is_autocast_enabled("cpu")
        and _is_served(x, weight.mT)
        and (bias is None or (bias.dtype == x.dtype and not (torch.is_grad_enabled() and bias.requires_grad)))
    )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right + bias, by oneDNN."""
    lead, columns = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), right.shape[-1]
    right = right.reshape(-1, columns)
    if not (right.is_contiguous() or right.mT.is_contiguous()):
        right = right.contiguous()  # with gaps between its rows, oneDNN would be a thousand times slower
    product = torch.ops.mkldnn._linear_pointwise(left.reshape(-1, left.shape[-1]), right.mT, bias, "none", [], "")
    return product.reshape(*lead, left.shape[-2], columns)


def _is_served(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and min(left.dim(), right.dim()) >= 2
        and min(left.shape[-2], right.shape[-1]) >= _NARROW
        and left.shape[-2] * left.shape[-1] * right.shape[-1] >= _WORTHWHILE
        and left.shape[:-2].numel() == right.shape[:-2].numel() == 1
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and not _is_transformed(left)
        and not _is_transformed(right)
        and _has_onednn()
        and torch._C._get_mkldnn_enabled()
    )


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it stands for many tensors, or for one with derivatives, in a transform of `torch.func`."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@cache
def _has_onednn() -> bool:
    """Whether oneDNN is there, can use more of the processor than MKL, and does what is expected of it."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with torch.inference_mode(False), torch.no_grad():
        left, right = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(3, 4)
        try:
            product = torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")
        except (AttributeError, RuntimeError):
            return False
    return torch.equal(product, left @ right)
