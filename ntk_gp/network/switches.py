"""Process-wide switches of torch that a computation needs in one position, whichever threads compute meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from .._compat import (
    attention_switches,
    is_cudnn_deterministic,
    is_cudnn_enabled,
    is_cudnn_tf32_allowed,
    is_onednn_enabled,
    set_cudnn_deterministic,
    set_cudnn_enabled,
    set_cudnn_tf32_allowed,
    set_onednn_enabled,
)

_lock = threading.Lock()


class Switch:
    """A context in which some process-wide settings have given values; entered by several threads, it is one context.

    The first to enter remembers what was set before, the last to leave sets that again: a thread that saved and
    restored a setting for itself alone would save what another one had set, and leave it so.

    :param settings: For each setting, a function that reads it, one that writes it, and its value inside.
    """

    def __init__(self, *settings: tuple[Callable[[], Any], Callable[[Any], Any], Any]):
        self._settings = settings
        self._users = 0
        self._before: list[Any] = []

    def __enter__(self) -> None:
        with _lock:
            current = [read() for read, _, _ in self._settings]
            if self._users == 0:
                self._before = current
            self._users += 1
            for (_, write, value), now in zip(self._settings, current, strict=True):
                if now != value:
                    write(value)

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._users -= 1
            if self._users == 0:
                for (read, write, value), before in zip(self._settings, self._before, strict=True):
                    if before != value and read() == value:
                        write(before)


# Fused attention has no forward-mode derivative and no second one, and the fast path of encoder layers none at all.
PLAIN_ATTENTION = Switch(
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    *((read, write, name == "math") for name, (read, write) in attention_switches.items()),
)
# Neither have oneDNN's recurrent kernels, nor cuDNN's.
WITHOUT_ONEDNN = Switch((is_onednn_enabled, set_onednn_enabled, False))
WITHOUT_CUDNN = Switch((is_cudnn_enabled, set_cudnn_enabled, False))
# The user may allow TF32 or not: two contexts, of which one is entered.
CUDNN = {
    tf32: Switch(
        (is_cudnn_deterministic, set_cudnn_deterministic, True),
        (is_cudnn_tf32_allowed, set_cudnn_tf32_allowed, tf32),
    )
    for tf32 in (False, True)
}
