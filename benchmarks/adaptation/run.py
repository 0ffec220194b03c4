"""Computes cells in processes of one thread each, and appends what each method scored to a file of JSON lines.

What the file has is not computed again, so that a run that was cut goes on where it was, and a new method adds its
lines. A method that failed has a line with its error, and is tried again by the next run. Of two lines for the same the
last counts.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import peers
from .methods import METHODS
from .predictions import scores
from .real import Real
from .synthetic import Friedman, Unrelated
from .tasks import Cell, Experiment, Task

EXPERIMENTS = ("friedman", "unrelated", "real")
PEER = "torch"  # the environment that has laplace-torch

Line = dict  # task, seed, n and method, with its scores and seconds, or its error


class Plan(NamedTuple):
    """What every process needs to know."""

    experiment: str
    data: str | Path | None
    quick: bool

    def open(self) -> Experiment:
        if self.experiment == "real":
            return Real(self.data)
        return {"friedman": Friedman, "unrelated": Unrelated}[self.experiment]()


def run(
    plan: Plan, seeds: Sequence[int] | None, methods: Sequence[str], processes: int, file: Path, again: bool = False
) -> None:
    """Computes what the file lacks of the plan's cells.

    :param methods: Names of those that are there in this environment.
    :param again: Compute these methods also where they are in the file.
    """
    experiment = plan.open()
    cells = experiment.cells(experiment.seeds if seeds is None else seeds, plan.quick)
    finished = set() if again else {(_cell(line), line["method"]) for line in read(file) if "error" not in line}
    todo = [(cell, [name for name in methods if (cell, name) not in finished]) for cell in cells]
    todo = [(cell, names) for cell, names in todo if names]
    if not todo:
        print(f"{plan.experiment}: {len(cells)} cells are complete in {file}", flush=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.read_bytes().endswith(b"\n"):
        file.write_text(file.read_text() + "\n")  # a run was cut within a line
    with _processes(processes) as pool, file.open("a") as output:
        for _ in pool.imap_unordered(
            partial(_train, plan), _one_for_each_network(experiment, [cell for cell, _ in todo])
        ):
            pass  # first, so that no two processes train the same
        started = time.perf_counter()
        for number, lines in enumerate(pool.imap_unordered(partial(_compute, plan), todo), start=1):
            output.writelines(json.dumps(line) + "\n" for line in lines)
            output.flush()
            _report_progress(plan.experiment, number, len(todo), time.perf_counter() - started, lines)


def estimate(plan: Plan, seeds: Sequence[int] | None, methods: Sequence[str], processes: int) -> None:
    """Prints the seconds of each method on the first task, with its fewest and its most labels, and of a whole run."""
    experiment = plan.open()
    seeds = experiment.seeds if seeds is None else seeds
    cells = experiment.cells(seeds, plan.quick)
    numbers = sorted({cell.n for cell in cells})
    with _InThisProcess():
        start = time.perf_counter()
        task = experiment.task(cells[0].task, cells[0].seed, plan.quick)
        training = time.perf_counter() - start
        evaluate(task, cells[0], methods[0])  # what is done once in a process is no part of a cell
        seconds = {
            (name, n): evaluate(task, cells[0]._replace(n=n), name).get("seconds", float("nan"))
            for name in methods
            for n in (numbers[0], numbers[-1])
        }
    for name in methods:
        print(f"{name:34}" + "".join(f"  n = {n}: {seconds[name, n]:6.2f} s" for n in (numbers[0], numbers[-1])))
    fewest, most = (sum(seconds[name, n] for name in methods) for n in (numbers[0], numbers[-1]))
    networks = len(_one_for_each_network(experiment, cells))
    total = sum(fewest + (most - fewest) * (cell.n - numbers[0]) / max(numbers[-1] - numbers[0], 1) for cell in cells)
    minutes = (total + training * networks) / processes / 60
    print(
        f"{plan.experiment}: {len(cells)} cells of {fewest:.1f} to {most:.1f} s, {networks} networks "
        f"(the first, or reading it: {training:.1f} s): about {minutes:.0f} min on {processes} processes."
    )


def run_peers(names: Sequence[str], options: Sequence[str]) -> None:
    """Methods that need the peers' environment, in its Python, where it was set up.

    :param options: Of the command line, without those for methods.
    """
    python = peers.interpreter(PEER)
    if python is None:
        print(f"Left out: {'; '.join(names)}. {peers.SETUP_HINT}", flush=True)
        return
    command = [str(python), "-W", "ignore", "-m", "benchmarks.adaptation", *options, "--methods", *names]
    subprocess.run([*command, "--no-report"], check=True, cwd=peers.ROOT)


def read(file: Path) -> list[Line]:
    """The last line for each cell and method; a last line that was cut is left out."""
    lines: dict[tuple, Line] = {}
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[(_cell(line), line["method"])] = line
    return list(lines.values())


def evaluate(task: Task, cell: Cell, name: str) -> Line:
    """One method's scores and seconds on one cell, or why it has none."""
    line: Line = {**cell._asdict(), "method": name}
    torch.manual_seed(zlib.crc32(repr((cell, name)).encode()))
    start = time.perf_counter()
    try:
        prediction = METHODS[name].predict(task.network, task.x[: cell.n], task.y[: cell.n], task.x_test)
        seconds = time.perf_counter() - start
        return {**line, **scores(prediction, task.y_test, task.truth), "seconds": round(seconds, 3)}
    except Exception as error:  # one method's failure is a result, and the others go on
        traceback.print_exc()
        return {**line, "error": f"{type(error).__name__}: {error}"[:500]}


def _compute(plan: Plan, job: tuple[Cell, Sequence[str]]) -> list[Line]:
    cell, names = job
    task = plan.open().task(cell.task, cell.seed, plan.quick)
    return [evaluate(task, cell, name) for name in names]


def _train(plan: Plan, cell: Cell) -> None:
    plan.open().train(cell.task, cell.seed, plan.quick)


def _cell(line: Line) -> Cell:
    return Cell(line["task"], line["seed"], line["n"])


def _one_for_each_network(experiment: Experiment, cells: Iterable[Cell]) -> list[Cell]:
    return list({(experiment.source(cell.task), cell.seed): cell for cell in cells}.values())


class _InThisProcess:
    """Instead of a pool of one: what is set is set back."""

    def __enter__(self) -> _InThisProcess:
        self.before = torch.get_num_threads(), torch.get_default_dtype()
        _set_up()
        return self

    def __exit__(self, *_: object) -> None:
        threads, dtype = self.before
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)

    def imap_unordered(self, function: Callable, jobs: Iterable) -> Iterator:
        return map(function, jobs)


def _processes(number: int) -> Any:
    if number == 1:
        return _InThisProcess()
    return multiprocessing.get_context("spawn").Pool(number, _set_up)


def _set_up() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)


def _report_progress(name: str, number: int, total: int, seconds: float, lines: Sequence[Line]) -> None:
    left = seconds / number * (total - number) / 60
    cell = _cell(lines[0])
    failed = "".join(f"; {line['method']} failed" for line in lines if "error" in line)
    print(
        f"{name} {number}/{total}, about {left:.0f} min left: {cell.task}, seed {cell.seed}, n = {cell.n}{failed}",
        flush=True,
    )
