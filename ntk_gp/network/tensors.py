"""Tensors in another dtype, or outside the modes that they were made or are used in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor


def convert_each(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | None = None
) -> dict[str, Tensor]:
    """Tensors by their names, each as :func:`convert` gives it."""
    return {name: convert(tensor, dtype, device) for name, tensor in tensors.items()}


def convert(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A real floating-point tensor in this dtype, a complex one in the complex dtype that goes with it, or itself."""
    if tensor.is_complex():
        return tensor.to(device=device, dtype=torch.promote_types(dtype, torch.complex32))
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


full_precision: Callable[[str], torch.autocast] = partial(torch.autocast, enabled=False)
"""A context outside the user's autocast, which would round the factors of products to half precision; for a type of
device."""


def normal_tensor(x: Tensor) -> Tensor:
    """`x`, as a tensor that autograd can record even if it was made under `torch.inference_mode`."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
