"""What does a step of fitting noise and outputscale cost, after the first?"""

from __future__ import annotations

import argparse

from .. import problems, report
from ..harness import Operation, Timing, measure
from .posterior import NETWORK, OURS

STEPS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of training inputs (default: 3000)")


def run(arguments: argparse.Namespace) -> None:
    """The usual training loop with Adam, from a new model each time: one step, and a hundred."""
    lines, rows = [], []
    for n in arguments.sizes or ([200] if arguments.quick else [3000]):
        case = problems.Case(NETWORK, n)
        operations = [Operation(f"{steps} steps", "fit", {"steps": steps}) for steps in (1, STEPS)]
        for threads in arguments.threads:
            timing = Timing(threads, arguments.repeats, arguments.slowest, arguments.limit)
            measured = measure([OURS], case.description(), case.arrays(), operations, timing)
            rows += [{"network": NETWORK, "n": n, **row} for row in measured]
            first, all_steps = (report.median(row, OURS.title) for row in measured)
            ratio = f"{all_steps / first:.2g}" if first and all_steps else report.remarks(measured[-1]["cells"][0])
            lines.append([f"{n:,}", str(threads), report.duration(first), report.duration(all_steps), ratio])
    table = report.markdown_table(["n", "threads", "first step", f"{STEPS} steps", "ratio"], lines)
    title = f"# Fitting noise and outputscale, network {NETWORK}"
    report.write(arguments.output, "fit", {"rows": rows}, f"{title}\n\n{report.machine_line()}\n\n{table}")
