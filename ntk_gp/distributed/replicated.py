"""What is the same on all ranks: random numbers, and what the user gives to each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import settings


def same_on_all_ranks(draw: Tensor) -> Tensor:
    """What the first rank has drawn, where ranks work together: their random numbers may have been seeded apart."""
    group = settings.distributed.group()
    if group is None or group.size == 1:
        return draw
    return group.broadcast(draw.to(group.device)).to(draw.device)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """What is drawn within, on the CPU or this device, is what the first rank draws, on all ranks that work together;
    the random numbers of the others go on from where they were."""
    group = settings.distributed.group()
    if group is None or group.size == 1:
        yield
        return
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    state = same_on_all_ranks(torch.get_rng_state())
    device_state = None if accelerator is None else same_on_all_ranks(accelerator.get_rng_state(device))
    if group.rank == 0:
        yield
        return
    with torch.random.fork_rng([] if accelerator is None else [device], device_type=device.type):
        torch.set_rng_state(state)
        if accelerator is not None:
            accelerator.set_rng_state(device_state, device)
        yield


def must_agree(what: str, *values: Tensor) -> None:
    """Raises on all ranks that work together where they were given other values.

    :param what: What these are called.
    """
    group = settings.distributed.group()
    if group is not None:
        group.agree(what, *values)
