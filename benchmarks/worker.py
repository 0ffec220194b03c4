"""The process behind one column of a table: sets a case up and times its operations, as it is asked to.

Started by `harness.Worker` as `python -m benchmarks.worker MODULE CLASS [ARGUMENT...]`, in the environment of the peer.
Requests and replies are lines of JSON; arrays travel as npz files. Nothing here needs more than NumPy.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHORTEST_MEASUREMENT = 0.02  # seconds; quicker calls are repeated and averaged
LONGEST_WARMING = 1.0  # seconds; a call that takes longer does not suffer from the others' turn before it

FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class Session:
    """What one worker knows: its column, set up for one case, and the operation that is being timed.

    :param build: Makes the column; what it raises is a reply like any other.
    """

    def __init__(self, build: Callable[[], Any]):
        self.build = build
        self.column: Any = None
        self.arrays: dict[str, np.ndarray] = {}
        self.call = None
        self.number = 1
        self.first = 0.0

    def prepare(self, case: dict, file: str) -> dict:
        """Sets the case up, with the weights and inputs from an npz file."""
        self.call = None
        self.column = self.build()
        with np.load(file) as arrays:
            self.arrays = dict(arrays)
        self.column.prepare(case, self.arrays)
        return {}

    def warm(self, operation: str, options: dict, save: str, probe: bool) -> dict:
        """Runs an operation once, compilation included, and stores its results for the comparison.

        :param probe: Store a matrix as its product with the probe vectors: every entry takes part, at a line's cost.
        """
        method = getattr(self.column, operation, None)
        if method is None:
            return {"blank": f"no {operation}"}
        self.call = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call = method(self.arrays, **options)
            first, result = self._once(call)
        self.first = first
        results = self.column.to_numpy(result)
        np.savez(save, *(matrix @ self.arrays["probe"] for matrix in results) if probe else results)
        del result, results
        self.call = call
        self.number = max(1, int(SHORTEST_MEASUREMENT / first)) if first < SHORTEST_MEASUREMENT else 1
        spoken = [warning for warning in caught if not issubclass(warning.category, FOR_DEVELOPERS)]
        messages = sorted({str(warning.message).splitlines()[0] for warning in spoken})
        return {"first": first, "warnings": messages, "peak_bytes": _peak_bytes()}

    def time(self) -> dict:
        """Seconds that one more run takes, after one that is not timed: caches and cores were another's meanwhile."""
        if self.first < LONGEST_WARMING:
            self.column.synchronize(self.call())
        start = time.perf_counter()
        for _ in range(self.number):
            result = self.call()
        self.column.synchronize(result)
        return {"seconds": (time.perf_counter() - start) / self.number}

    def _once(self, call: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        self.column.synchronize(result)
        return time.perf_counter() - start, result


def serve(session: Session, requests: Any, replies: Any) -> None:
    for line in requests:
        request = json.loads(line)
        action = request.pop("action")
        try:
            reply = getattr(session, action)(**request)
        except NotImplementedError as reason:
            reply = {"blank": str(reason)}
        except Exception as error:  # whatever a peer raises is the table's to show, and the next case's turn
            reply = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


def _peak_bytes() -> int:
    """The most memory that this process has had; `getrusage` begins with the peak of the one that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    module, name, *arguments = sys.argv[1:]
    # Whatever a library prints must not reach the pipe of the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
    session = Session(lambda: getattr(importlib.import_module(module), name)(*arguments))
    serve(session, sys.stdin, replies)


if __name__ == "__main__":
    main()
