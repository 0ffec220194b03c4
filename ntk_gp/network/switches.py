"""Process-wide switches of torch that a computation needs in one position, whichever threads compute meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

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


def _attention_backend(name: str) -> tuple[Callable[[], bool], Callable[[bool], None], bool]:
    return getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"), name == "math"


_BACKENDS = [
    name
    for name in ("flash", "mem_efficient", "cudnn", "overrideable", "math")
    if hasattr(torch._C, f"_get_{name}_sdp_enabled") and hasattr(torch._C, f"_set_sdp_use_{name}")
]
# Fused attention has no forward-mode derivative and no second one, and the fast path of encoder layers none at all.
PLAIN_ATTENTION = Switch(
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),
    *map(_attention_backend, _BACKENDS),
)
# Neither have oneDNN's recurrent kernels, nor cuDNN's.
WITHOUT_ONEDNN = Switch((torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, False))
WITHOUT_CUDNN = Switch((torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False))
# The user may allow TF32 or not: two contexts, of which one is entered.
CUDNN = {
    tf32: Switch(
        (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic, True),
        (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, tf32),
    )
    for tf32 in (False, True)
}
