"""Matrix products, and tanh, at the processor's full rate."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._compat import dual_level_number, is_onednn_enabled, is_transform_wrapper, onednn_linear

# Multiplications of a product that is worth the longer call, and the width of more than a single vector.
_WORTHWHILE = 1 << 18
_NARROW = 2
# Elements of a tanh that is worth three calls and two copies, and how many at once: the copies then stay in caches, and
# in memory that the system need not give anew every time.
_WORTHWHILE_TANH = 1 << 14
_PIECE = 1 << 18


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (…, m, k) and (…, k, n).

    PyTorch hands float32 products on a CPU to MKL, which uses vectors of half the processor's width where Intel did not
    make it. oneDNN, which comes with PyTorch too, uses all of it: twice the rate on AMD's processors with AVX-512. Its
    product has no derivatives, so it serves where none are recorded.
    """
    if min(left.dim(), right.dim()) >= 2 and left.stride(-2) == 1 and right.shape[-1] < left.shape[-2]:
        return matmul(right.mT, left.mT).mT  # both libraries are slow where a tall factor is transposed
    if _is_dual(left) or _is_dual(right) or not is_product_served(left, right):
        return left @ right
    return onednn_product(left, right)


def _is_dual(tensor: Tensor) -> bool:
    """Whether it carries a derivative in forward mode."""
    return dual_level_number() >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right + bias, by oneDNN, of matrices behind dimensions of one."""
    lead, columns = max(left.shape[:-2], right.shape[:-2], key=len), right.shape[-1]
    right = right.reshape(-1, columns)
    if not (right.is_contiguous() or right.mT.is_contiguous()):
        right = right.contiguous()  # with gaps between its rows, oneDNN would be a thousand times slower
    product = onednn_linear(left.reshape(-1, left.shape[-1]), right.mT, bias, "none", [], "")
    return product.reshape(*lead, left.shape[-2], columns)


def is_product_served(left: Tensor, right: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN takes this product, and the bias, and would be faster; what derivatives in forward mode
    they have is not asked."""
    return (
        min(left.dim(), right.dim()) >= 2
        and min(left.shape[-2], right.shape[-1]) >= _NARROW
        and left.shape[-2] * left.shape[-1] * right.shape[-1] >= _WORTHWHILE
        and left.shape[:-2].numel() == right.shape[:-2].numel() == 1
        and are_served(left, right, *(() if bias is None else (bias,)))
    )


def onednn_tanh(x: Tensor) -> Tensor:
    """tanh(x), by oneDNN: as accurate as PyTorch's, which takes five times as long with AVX-512."""
    pieces = [piece.to_mkldnn().tanh_().to_dense() for piece in x.view(-1).split(_PIECE)]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(x.shape)


def is_tanh_served(x: Tensor) -> bool:
    return x.numel() >= _WORTHWHILE_TANH and x.is_contiguous() and are_served(x)


def are_served(*tensors: Tensor) -> bool:
    """Whether oneDNN takes these tensors: no autograd graph reaches into it, and no transform."""
    recording = torch.is_grad_enabled()
    return (
        all(
            tensor.dtype == torch.float32
            and tensor.device.type == "cpu"
            and not (recording and tensor.requires_grad)
            and not _is_transformed(tensor)
            for tensor in tensors
        )
        and _has_onednn()
        and is_onednn_enabled()
    )


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it stands for many tensors, or for one with derivatives, in a transform of `torch.func`."""
    return is_transform_wrapper(tensor)


@cache
def _has_onednn() -> bool:
    """Whether oneDNN is there, can use more of the processor than MKL, and does what is expected of it."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with torch.inference_mode(False), torch.no_grad():
        left, right = (torch.eye(n, n + 1, dtype=torch.float32, device="cpu").add(0.5) for n in (2, 3))
        try:
            product = onednn_linear(left, right.mT, None, "none", [], "")
        except (AttributeError, RuntimeError):
            return False
    return torch.equal(product, left @ right)
