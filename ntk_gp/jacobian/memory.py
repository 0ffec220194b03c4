"""Where large matrices are put, and how they are made symmetric in place.

How much memory may be taken is decided in :mod:`ntk_gp.memory`; this is about taking it quickly.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
# Bytes from which on numpy asks for large pages.
_LARGE = 1 << 22
# Rows of the blocks in which a triangle is copied: both blocks stay in cache.
_BLOCK_ROWS = 512


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of any contents (what was in memory before), of the dtype and on the device of `like`.

    An operating system hands out memory in pages, and clears each when it is first written to. In pages of the usual 4
    KiB that takes as long as a fifth of the arithmetic of a Gram matrix. numpy asks for pages of 2 MiB where it
    allocates much, and torch does not: large tensors on a CPU (4 MiB and more) are made by numpy. Then one number in
    each page is written here, before any work begins: torch's threads each write a stretch of their own, whereas those
    that multiply would meet in one page, and could wait for one another twenty times as long as clearing it takes.
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
