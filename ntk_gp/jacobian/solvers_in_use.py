"""The solvers that someone still uses: a new one may start from what they have computed."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakSet


class SolversInUse:
    """A set of solvers that keeps none of them alive. Safe to use from several threads."""

    def __init__(self) -> None:
        self._solvers: WeakSet = WeakSet()
        self._lock = threading.Lock()

    def add(self, solver: Any) -> None:
        with self._lock:
            self._solvers.add(solver)

    def all(self) -> list:
        with self._lock:
            return list(self._solvers)
