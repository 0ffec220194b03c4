"""What does a step of fitting noise and outputscale cost, after the first, and with a gain or a constant added?"""

from __future__ import annotations

import argparse

from .. import problems, report
from ..harness import Operation, Timing, measure
from .posterior import NETWORK, OURS

STEPS = 100

# What is added to the kernel.
SUMS: dict[str, tuple[str, ...]] = {
    "NTK": (),
    "NTK + constant": ("constant",),
    "NTK + gain": ("gain",),
    "NTK + gain + constant": ("gain", "constant"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of training inputs (default: 800 and 3000)")


def run(arguments: argparse.Namespace) -> None:
    """The usual training loop with Adam, from a new model each time: one step, and a hundred."""
    lines, rows = [], []
    for n in arguments.sizes or ([200] if arguments.quick else [800, 3000]):
        case = problems.Case(NETWORK, n)
        operations = [
            Operation(f"{steps} steps, {name}", "fit", {"steps": steps, "beside": beside})
            for name, beside in SUMS.items()
            for steps in (1, STEPS)
        ]
        for threads in arguments.threads:
            timing = Timing(threads, arguments.repeats, arguments.slowest, arguments.limit)
            measured = measure([OURS], case.description(), case.arrays(), operations, timing)
            rows += [{"network": NETWORK, "n": n, **row} for row in measured]
            lines += _lines(n, threads, measured)
    header = ["n", "threads", "kernel", "first step", f"{STEPS} steps", "a further step", "of NTK alone"]
    table = report.markdown_table(header, lines)
    title = f"# Fitting noise and outputscale, network {NETWORK}"
    report.write(arguments.output, "fit", {"rows": rows}, f"{title}\n\n{report.machine_line()}\n\n{table}")


def _lines(n: int, threads: int, measured: list[dict]) -> list[list[str]]:
    """One for each kernel: a further step is what 99 of them take beyond the first."""
    lines, alone = [], None
    for name, first_row, all_row in zip(SUMS, measured[::2], measured[1::2], strict=True):
        first, all_steps = (report.median(row, OURS.title) for row in (first_row, all_row))
        step = (all_steps - first) / (STEPS - 1) if first and all_steps else None
        alone = step if alone is None else alone
        ratio = f"{step / alone:.2f}×" if step and alone else report.remarks(all_row["cells"][0])
        times = [report.duration(time) for time in (first, all_steps, step)]
        lines.append([f"{n:,}", str(threads), name, *times, ratio])
    return lines
