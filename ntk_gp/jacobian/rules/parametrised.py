"""Weights that are computed from parameters in functions of their own, taken apart into arithmetic.

What is done with their parts, the structured engine finds out: see :mod:`ntk_gp.jacobian.maps`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._compat import weight_norm
from .registry import register_decomposition


def normalised_weight(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖, with norms over all dimensions but one."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def normalise(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Tensor | None = None) -> Tensor:
    """x / max(‖x‖, ε)."""
    if out is not None:
        return NotImplemented
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


register_decomposition(weight_norm, normalised_weight)
register_decomposition(F.normalize, normalise)
