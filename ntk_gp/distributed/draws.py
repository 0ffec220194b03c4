"""Random numbers that are the same on all ranks."""

from __future__ import annotations

from torch import Tensor

from .. import settings


def same_on_all_ranks(draw: Tensor) -> Tensor:
    """What the first rank has drawn, where ranks work together: their random numbers may have been seeded apart."""
    group = settings.distributed.group()
    if group is None or group.size == 1:
        return draw
    return group.broadcast(draw.to(group.device)).to(draw.device)
