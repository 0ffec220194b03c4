"""Is every posterior right, or its doubt spoken, across noise levels, sizes and dtypes?"""

from __future__ import annotations

import argparse
from itertools import product

from tqdm import tqdm

from .. import problems, report
from ..harness import Operation, Timing, measure
from ..reference import Problem
from .posterior import OURS

NETWORK = "5-48-48-1"  # P = 2,689, between the sizes: function space and weight space both get their turn
NOISES = tuple(10.0**-power for power in range(1, 9))
SIZES = (500, 1000, 2000, 5000, 10_000, 20_000)
QUICK_SIZES = (300,)
PROMISE = {"float32": 5e-3, "float64": 1e-8}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of training inputs (default: {SIZES})")


def run(arguments: argparse.Namespace) -> None:
    """One line per size and dtype, one cell per noise: time, the larger error, and whether the package warned."""
    timing = Timing(max(arguments.threads), 1, arguments.slowest, arguments.limit)
    rows = report.earlier(arguments, "condition")["rows"]
    for n, dtype in tqdm(list(product(arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES), PROMISE))):
        case = problems.Case(NETWORK, n, dtype=dtype)
        arrays = case.arrays()
        expected = Problem(problems.trained(NETWORK), arrays).spectral(list(NOISES))
        operations = [
            Operation(f"{noise:g}", "posterior", {"noise": noise}, lambda answer=answer: answer)
            for noise, answer in zip(NOISES, expected, strict=True)
        ]
        measured = measure([OURS], case.description(), arrays, operations, timing)
        rows = report.merged(rows, [{"n": n, "dtype": dtype, **row} for row in measured])
        report.write(arguments.output, "condition", {"network": NETWORK, "rows": rows}, _markdown(rows))


def _markdown(rows: list[dict]) -> str:
    cells: dict[tuple[int, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row["n"], row["dtype"]), []).append(_cell(row["cells"][0], PROMISE[row["dtype"]]))
    header = ["n", "dtype", *(f"noise {noise:g}" for noise in NOISES)]
    lines = [[f"{n:,}", dtype, *texts] for (n, dtype), texts in cells.items()]
    said = sorted({text for row in rows for text in row["cells"][0]["warnings"]})
    promises = " or ".join(f"{error:g} ({dtype})" for dtype, error in PROMISE.items())
    legend = (
        f"Network {NETWORK}: time, and the larger error of mean and variance at 500 inputs. **Bold**: beyond the "
        f"promise of {promises} without a word; !: with a warning."
    )
    parts = ["# Across the condition range", report.machine_line(), legend, report.markdown_table(header, lines)]
    return "\n\n".join([*parts, *(f"- {text}" for text in said)])


def _cell(cell: dict, promise: float) -> str:
    if cell["note"]:
        return f"raised: {cell['note']}"
    error = max(cell["errors"])
    mark = "!" if cell["warnings"] else ""
    text = f"{report.duration(cell['median'])}, {error:.0e}{mark}"
    return text if error <= promise or mark else f"**{text}**"
