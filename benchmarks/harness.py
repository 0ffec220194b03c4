"""The parent's side: worker processes, each in its own environment, timed in turns so that ratios are fair."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import peers

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Column:
    """One column of a table: a class, in a module that is imported in the environment of a peer."""

    title: str
    environment: str
    module: str
    class_name: str
    arguments: tuple[str, ...] = ()


@dataclass
class Cell:
    """What one column did in one row."""

    column: str
    seconds: list[float] = field(default_factory=list)
    first: float | None = None  # seconds of the first call, with whatever is compiled then
    error: float | None = None  # largest difference from the reference, relative to its largest value
    peak_bytes: int | None = None  # of the process so far
    warnings: list[str] = field(default_factory=list)
    note: str = ""  # why the cell is blank

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


class Worker:
    """One process, started anew for the next case if it was killed in the last one.

    :param column: What it runs.
    :param threads: Of every BLAS and OpenMP pool, and cores that the process may use.
    """

    def __init__(self, column: Column, threads: int):
        self.column = column
        self.threads = threads
        self.python = peers.interpreter(column.environment)
        self.process: subprocess.Popen | None = None

    @property
    def missing(self) -> str:
        """Why this worker cannot be started, or an empty string."""
        return "" if self.python else f"{self.column.environment} is not set up. {peers.SETUP_HINT}"

    def ask(self, **request) -> dict:
        """Sends a request and waits for its reply; a process that ends instead has failed."""
        if self.missing:
            return {"blank": self.missing}
        if self.process is None:
            self.process = self._start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.process = None
        reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return {"failed": f"the process ended with {reason}"}

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None

    def _start(self) -> subprocess.Popen:
        command = [self.python, "-m", "benchmarks.worker", self.column.module, self.column.class_name]
        environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(self.threads))}
        return subprocess.Popen(
            [*command, *self.column.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=peers.ROOT,
            env=environment,
        )


class Workers:
    """One worker per column, together as a context manager."""

    def __init__(self, columns: Iterable[Column], threads: int):
        self.workers = [Worker(column, threads) for column in columns]
        for reason in dict.fromkeys(worker.missing for worker in self.workers if worker.missing):
            print(reason)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception) -> None:
        for worker in self.workers:
            worker.close()

    def prepare(self, case: dict, file: Path) -> dict[str, str]:
        """Sets a case up everywhere: for each column an empty string, or why it takes no part."""
        replies = {
            worker.column.title: worker.ask(action="prepare", case=case, file=str(file)) for worker in self.workers
        }
        return {title: reply.get("blank") or reply.get("failed") or "" for title, reply in replies.items()}

    def measure(
        self,
        operation: str,
        options: dict,
        reference: list[np.ndarray] | None,
        folder: Path,
        *,
        repeats: int,
        slowest: float,
        skip: dict[str, str],
        probe: bool = False,
    ) -> list[Cell]:
        """Times one operation in every column, one call of each in turn, `repeats` times.

        :param reference: What the results are compared with.
        :param folder: Where the results are stored meanwhile.
        :param slowest: A column whose first call took longer than this many seconds is timed once more only.
        :param skip: Columns that take no part, and why.
        :param probe: The result is a matrix, and the reference is its product with the case's probe vectors.
        """
        cells = []
        active = []
        for worker in self.workers:
            title = worker.column.title
            cell = Cell(title, note=skip.get(title, ""))
            cells.append(cell)
            if cell.note:
                continue
            result = folder / f"{title}.npz"
            reply = worker.ask(action="warm", operation=operation, options=options, save=str(result), probe=probe)
            cell.note = reply.get("blank") or reply.get("failed") or ""
            if cell.note:
                continue
            cell.first, cell.warnings, cell.peak_bytes = reply["first"], reply["warnings"], reply["peak_bytes"]
            cell.error = relative_error(result, reference)
            result.unlink()
            active.append((worker, cell))
        for turn in range(repeats):
            for worker, cell in active:
                if turn == 0 or cell.first <= slowest:
                    reply = worker.ask(action="time")
                    if "seconds" in reply:
                        cell.seconds.append(reply["seconds"])
                    else:
                        cell.note = reply["failed"]
        return cells


def relative_error(file: Path, reference: list[np.ndarray] | None) -> float | None:
    """The largest difference of any stored result from its reference, relative to the reference's largest value.

    Where the reference has fewer columns, or the result, those that both have are compared.
    """
    if not reference:
        return None
    with np.load(file) as stored:
        results = [stored[name].astype(np.float64) for name in stored.files]
    return max(_difference(result, expected) for result, expected in zip(results, reference, strict=True))


def _difference(result: np.ndarray, expected: np.ndarray) -> float:
    if result.ndim == 2:
        columns = min(result.shape[1], expected.shape[1])
        result, expected = result[:, :columns], expected[:, :columns]
    if result.shape != expected.shape:
        raise ValueError(f"A result has shape {result.shape}, but {expected.shape} was expected.")
    return float(np.abs(result - expected).max() / np.abs(expected).max())
