"""Memory for large results."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
_LARGE = 1 << 22
_BLOCK_ROWS = 512


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and on the device of `like`.

    Large ones on a CPU come from numpy, which asks for huge pages: touching a matrix for the first time in small pages
    takes as long as a fifth of a Gram matrix's arithmetic. Each page is touched here, by threads that are far apart:
    those that meet in the same huge page for the first time can wait for one another twenty times as long as its
    clearing takes.
    """
    dtype = _NUMPY_DTYPES.get(like.dtype)
    if like.device.type == "cpu" and dtype is not None and math.prod(shape) * like.element_size() >= _LARGE:
        tensor = torch.from_numpy(np.empty(tuple(shape), dtype))
        tensor.view(-1)[:: mmap.PAGESIZE // tensor.element_size()].zero_()
        return tensor
    return like.new_empty(tuple(shape))


def mirror_upper_triangle(matrix: Tensor) -> None:
    """Makes (B, n, n) symmetric to the last bit: the upper triangle over the lower one, block by block, in place."""
    for start in range(0, matrix.shape[-1], _BLOCK_ROWS):
        end = start + _BLOCK_ROWS
        corner = matrix[:, start:end, start:end]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        matrix[:, end:, start:end] = matrix[:, start:end, end:].mT
