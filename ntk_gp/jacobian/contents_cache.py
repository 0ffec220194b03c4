"""Results kept for the inputs seen last, found again by what is in the inputs, not by where they are in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from .. import memory

# Where half of what may be kept is free, all that is held is counted at one insertion of so many.
_COUNTED_EVERY = 16


class ContentsCache:
    """Results keyed by the *contents* of tensors, the least recently used dropped first.

    Keys are compared with copies, so a tensor changed in place, or new memory at an old address, never meets a stale
    result. Safe to use from several threads: what one of them computes, the others wait for.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []  # the least recently used first
        self._lock = threading.Lock()  # never held while something is computed
        self._bytes = self._since_counted = 0  # at most what the entries held when they were last looked at

    @staticmethod
    def capacity(device: torch.device) -> int:
        """Bytes that may be kept."""
        return memory.CACHES.bytes(device)

    def get(
        self, kind: str, state: Callable[[], Hashable], tensors: tuple[Tensor, ...], compute: Callable[..., Any]
    ) -> Any:
        """The kept result for these tensors, or `compute` of copies of them.

        :param kind: Tells results of different kinds for the same tensors apart.
        :param state: Gives what the result depends on beside the tensors.
        :param compute: Its result must say in `nbytes` how many bytes it holds.
        :raises TypeError: If it does not: what is kept could outgrow the memory budget without a word.
        """
        label = (kind, state())
        while True:
            with self._lock:
                entry = self._entry(label, tensors)
                mine = entry is None
                if entry is None:
                    entry = _Entry(label, tensors)
                else:
                    self._entries.remove(entry)
                self._entries.append(entry)
            if mine:
                return self._fill(entry, compute)
            entry.done.wait()
            if not entry.failed:
                return entry.value

    def known(self, kind: str, state: Callable[[], Hashable], tensors: tuple[Tensor, ...]) -> Any:
        """The kept result for these tensors, or None; as for :meth:`get`."""
        label = (kind, state())
        with self._lock:
            entry = self._entry(label, tensors)
        return entry.value if entry is not None and entry.done.is_set() and not entry.failed else None

    def _entry(self, label: Hashable, tensors: tuple[Tensor, ...]) -> _Entry | None:
        alike = (known for known in reversed(self._entries) if known.label == label)
        return next((known for known in alike if known.is_of(tensors)), None)

    def _fill(self, entry: _Entry, compute: Callable[..., Any]) -> Any:
        try:
            value = compute(*entry.keys)
            entry.set(value)
        except BaseException:
            entry.failed = True  # whoever waits tries for itself
            with self._lock:
                self._entries.remove(entry)
            raise
        finally:
            entry.done.set()
        self._make_room(entry)
        return value

    def _make_room(self, newest: _Entry) -> None:
        capacity = self.capacity(newest.keys[0].device)
        with self._lock:
            if newest in self._entries:  # what it was made from is less recent than itself
                self._entries.remove(newest)
                if newest.nbytes <= capacity:
                    self._entries.append(newest)
            self._bytes += newest.nbytes
            self._since_counted += 1
            if 2 * self._bytes <= capacity and self._since_counted < _COUNTED_EVERY:
                return
            sizes = [entry.nbytes for entry in self._entries]  # solvers have grown meanwhile
            total = sum(sizes)
            while total > capacity:
                oldest = next(i for i, entry in enumerate(self._entries) if entry.done.is_set())
                self._entries.pop(oldest)
                total -= sizes.pop(oldest)
            self._bytes, self._since_counted = total, 0


class _Entry:
    """A result, or the promise of one, for tensors with these contents."""

    value: Any = None
    failed = False

    def __init__(self, label: tuple[str, Hashable], tensors: tuple[Tensor, ...]):
        self.label = label
        copies = {id(tensor): tensor.clone() for tensor in tensors}  # one of each: both sides of a matrix may be one
        self.keys = tuple(copies[id(tensor)] for tensor in tensors)
        self._key_bytes = sum(key.nbytes for key in copies.values())
        self.done = threading.Event()

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        return all(map(_same, self.keys, tensors))

    def set(self, value: Any) -> None:
        """Takes the result; whoever waits is told of it by `done`."""
        if not hasattr(value, "nbytes"):
            raise TypeError(
                f"A {type(value).__name__}, kept as {self.label[0]!r}, does not say in `nbytes` how many bytes it "
                "holds, and what is kept is counted against ntk_gp.settings.memory_budget. Give its class `nbytes`."
            )
        self.value = value

    @property
    def nbytes(self) -> int:
        """Once it is done; some results, such as solvers, hold more as they are used."""
        if not self.done.is_set():
            return 0
        return self._key_bytes + (0 if self.failed else self.value.nbytes)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)
