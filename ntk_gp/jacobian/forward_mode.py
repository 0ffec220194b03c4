"""Forward-mode derivatives, from several threads at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp

from .. import settings
from .._compat import dual_level_number, innermost_transform
from ..network import NetworkFunction, normal_tensor
from ..replacements.full_rate import FullRateLayers


class DualLevel:
    """PyTorch's level of dual numbers, of which the process has one.

    Dual numbers belong to tensors, so that threads which hold some of their own can share it: the first to come opens
    it, the last to leave closes it. `torch.func.jvp` opens one itself, and has to be alone.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._level = forward_ad.dual_level()
        self._sharing: dict[int, int] = {}  # threads, and how many times each has entered
        self._owner: int | None = None
        self._depth = 0
        self._waiting = 0  # threads that want to be alone: no others are let in before them

    @contextmanager
    def shared(self) -> Iterator[None]:
        """For dual numbers made here, in this thread."""
        thread = threading.get_ident()
        with self._condition:
            self._condition.wait_for(lambda: thread in self._sharing or not (self._is_taken(thread) or self._waiting))
            if not self._sharing:
                self._level.__enter__()
            self._sharing[thread] = self._sharing.get(thread, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing[thread] -= 1
                if self._sharing[thread] == 0:
                    del self._sharing[thread]
                if not self._sharing:
                    self._level.__exit__(None, None, None)
                    self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For what opens a level itself, in this thread."""
        thread = threading.get_ident()
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not (self._is_taken(thread) or self._sharing.keys() - {thread}))
            self._waiting -= 1
            self._owner = thread
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if self._depth == 0:
                    self._owner = None
                    self._condition.notify_all()

    def _is_taken(self, thread: int) -> bool:
        return self._owner not in (None, thread)

    def is_of_others(self) -> bool:
        """Whether a level is open that was not opened here: the user's own."""
        return dual_level_number() >= 0 and not self._sharing


dual_level = DualLevel()


def value_and_tangent(
    at: Callable[..., Tensor], parameters: dict[str, Tensor], tangents: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What `torch.func.jvp` gives: by itself where other derivatives are taken as well, and otherwise from dual numbers
    without its bookkeeping, and with faster linear layers.

    :param at: A function of the parameters, and of `mode`: a context for what a network calls, if there is one.
    """
    transformed = innermost_transform() is not None or dual_level.is_of_others()
    if transformed or torch.is_grad_enabled():
        with dual_level.alone():
            value, tangent = jvp(at, (parameters,), (tangents,))  # type: ignore[misc]
            return value, tangent
    with dual_level.shared():
        duals = {name: forward_ad.make_dual(tensor, tangents[name]) for name, tensor in parameters.items()}
        out = at(duals, mode=FullRateLayers())
        value, tangent = forward_ad.unpack_dual(out)
    return value, torch.zeros_like(value) if tangent is None else tangent


def value_and_product(function: NetworkFunction, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """f, (m, C), and J u, (m, C), for u (P,), at the points x (m, d) of a network that has forward mode."""
    tangents = function.split(tangent)
    pieces = []
    with function.tracing(), torch.no_grad():
        for chunk in settings.progress(normal_tensor(x).split(function.points_per_pass()), "Network"):
            pieces.append(value_and_tangent(partial(function, x=chunk), function.parameters, tangents))
    values, products = pieces[0] if len(pieces) == 1 else (torch.cat(part) for part in zip(*pieces, strict=True))
    return values, products
