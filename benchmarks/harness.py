"""The parent's side: worker processes, each in its own environment, timed in turns so that ratios are fair."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from . import peers

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# Processes keep what they have freed: to get a page from the system can take longer than to compute what is on it.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


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
    errors: list[float | None] = field(default_factory=list)  # of every result, see `relative_error`
    scores: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None  # of the process so far
    warnings: list[str] = field(default_factory=list)
    note: str = ""  # why the cell is blank

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


class Worker:
    """One process, started and prepared anew if an operation was the end of it.

    :param column: What it runs.
    :param threads: Of every BLAS and OpenMP pool, and cores that the process may use.
    :param limit: A request that takes more seconds ends the process.
    """

    def __init__(self, column: Column, threads: int, limit: float):
        self.column = column
        self.threads = threads
        self.limit = limit
        self.python = peers.interpreter(column.environment)
        self.process: subprocess.Popen | None = None
        self.preparation: dict = {}

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
            if request["action"] != "prepare":
                self.ask(**self.preparation)
        if request["action"] == "prepare":
            self.preparation = request
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], self.limit)
            if not ready:
                return self._kill()
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

    def _kill(self) -> dict:
        self.process.kill()
        self.process.wait()
        self.process = None
        return {"failed": f"took more than {self.limit:g} s"}

    def _start(self) -> subprocess.Popen:
        command = [self.python, "-m", "benchmarks.worker", self.column.module, self.column.class_name]
        environment = {**os.environ, **KEEP_MEMORY, **dict.fromkeys(THREAD_VARIABLES, str(self.threads))}
        return subprocess.Popen(
            [*command, *self.column.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=peers.ROOT,
            env=environment,
        )


@dataclass(frozen=True)
class Operation:
    """One row of a table.

    :param title: As in the table.
    :param name: The columns' method.
    :param options: Its keyword arguments.
    :param reference: Computes what the results are compared with.
    :param score: Judges the results by other measures than their difference from a reference.
    :param probe: The result is a matrix, and the reference is its product with the case's probe vectors.
    """

    title: str
    name: str
    options: dict = field(default_factory=dict)
    reference: Callable[[], Sequence[np.ndarray]] | None = None
    score: Callable[[Sequence[np.ndarray]], dict[str, float]] | None = None
    probe: bool = False


@dataclass(frozen=True)
class Timing:
    """How the cells are timed.

    :param threads: Of every process, one after the other.
    :param repeats: Timings of each cell; with 0, the first call's is the only one.
    :param slowest: A cell whose first call took longer than this many seconds has that as its only timing.
    :param limit: A call that takes more seconds is given up.
    """

    threads: int
    repeats: int
    slowest: float
    limit: float = 900.0


def measure(
    columns: Sequence[Column],
    description: dict,
    arrays: dict[str, np.ndarray],
    operations: Sequence[Operation],
    timing: Timing,
) -> list[dict]:
    """Times operations on one case in every column: new processes, and one call of each in turn.

    :param description: What the columns' `prepare` is told, beside the arrays.
    :return: A row for each operation: its title, the number of threads and the cells.
    """
    workers = [Worker(column, timing.threads, timing.limit) for column in columns]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "case.npz"
        np.savez(file, **arrays)
        skip = {worker: _reason(worker.ask(action="prepare", case=description, file=str(file))) for worker in workers}
        for operation in operations:
            cells = _cells(workers, operation, timing, skip, Path(name))
            cells = [asdict(cell) | {"median": cell.median} for cell in cells]
            rows.append({"operation": operation.title, "threads": timing.threads, "cells": cells})
    for worker in workers:
        worker.close()
    return rows


def _cells(
    workers: Sequence[Worker], operation: Operation, timing: Timing, skip: dict[Worker, str], folder: Path
) -> list[Cell]:
    reference = operation.reference() if operation.reference is not None else []
    cells = {worker: Cell(worker.column.title, note=skip[worker]) for worker in workers}
    for worker, cell in cells.items():
        if not cell.note:
            _warm(worker, cell, operation, folder / "result.npz", reference)
    for _ in range(timing.repeats):
        for worker, cell in cells.items():
            if not cell.note and cell.first <= timing.slowest:
                reply = worker.ask(action="time")
                cell.note = _reason(reply)
                cell.seconds += [reply["seconds"]] if not cell.note else []
    for cell in cells.values():
        if not cell.note and not cell.seconds:
            cell.seconds = [cell.first]
    return list(cells.values())


def _warm(worker: Worker, cell: Cell, operation: Operation, file: Path, reference: Sequence[np.ndarray]) -> None:
    reply = worker.ask(
        action="warm", operation=operation.name, options=operation.options, save=str(file), probe=operation.probe
    )
    cell.note = _reason(reply)
    if cell.note:
        return
    cell.first, cell.warnings, cell.peak_bytes = reply["first"], reply["warnings"], reply["peak_bytes"]
    with np.load(file) as stored:
        results = [stored[name].astype(np.float64) for name in stored.files]
    if reference:
        cell.errors = [relative_error(*pair) for pair in zip(results, reference, strict=True)]
    if operation.score is not None:
        cell.scores = operation.score(results)


def _reason(reply: dict) -> str:
    """Why a cell has no value, or an empty string."""
    return reply.get("blank") or reply.get("failed") or ""


def relative_error(result: np.ndarray, expected: np.ndarray) -> float | None:
    """The largest difference relative to the largest expected value; None for a result that is not claimed (NaN).

    Where all expected values are positive (a variance, a diagonal), each difference is relative to its own. Where one
    of the two has fewer columns, those that both have are compared.
    """
    if result.ndim == 2:
        columns = min(result.shape[1], expected.shape[1])
        result, expected = result[:, :columns], expected[:, :columns]
    if result.shape != expected.shape:
        raise ValueError(f"A result has shape {result.shape}, but {expected.shape} was expected.")
    if np.isnan(result).all():
        return None
    scale = expected if (expected > 0).all() else np.abs(expected).max()
    return float(np.max(np.abs(result - expected) / scale))
