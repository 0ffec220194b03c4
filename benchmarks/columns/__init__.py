"""One file per column: how a package, ours or a peer, does each operation.

A column has `prepare(case, arrays)`, `synchronize(result)`, `to_numpy(result)`, and a method per operation it can do.
Such a method takes the case's arrays (and options) and returns the call to be timed, a function without arguments. One
that raises `NotImplementedError` leaves its cell blank.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest(*calls: Callable) -> Callable:
    """The quickest of several ways to the same result, each tried once to compile and once to time."""
    return min(calls, key=_seconds)


def _seconds(call: Callable) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
