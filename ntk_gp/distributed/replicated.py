"""What is the same on all ranks: random numbers, and what the user gives to each of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import settings


def same_on_all_ranks(draw: Tensor) -> Tensor:
    """What the first rank has drawn, where ranks work together: their random numbers may have been seeded apart, and
    their processors may round otherwise. Derivatives are each rank's own."""
    group = settings.distributed.group()
    if group is None or group.size == 1:
        return draw
    own = draw.detach()
    first = group.broadcast(own.to(group.device, copy=True)).to(draw.device)
    if not draw.requires_grad:
        return first
    return draw + torch.where(first == own, torch.zeros_like(own), first - own)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers drawn within, on the CPU or this device, are the first rank's on all ranks that work together. The
    generators of the others are as they were afterwards, as if they had drawn nothing."""
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
