"""Memory for large results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
_LARGE = 1 << 22


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and on the device of `like`.

    Large ones on a CPU come from numpy, which asks for huge pages: touching a matrix for the first time in small pages
    takes as long as a fifth of a Gram matrix's arithmetic.
    """
    dtype = _NUMPY_DTYPES.get(like.dtype)
    if like.device.type == "cpu" and dtype is not None and math.prod(shape) * like.element_size() >= _LARGE:
        return torch.from_numpy(np.empty(tuple(shape), dtype))
    return like.new_empty(tuple(shape))
