"""What do a step of fitting and a prediction cost for sums and products, beside one Cholesky factorisation?"""

from __future__ import annotations

import argparse

from .. import problems, report
from ..harness import Column, Operation, Timing, measure
from .posterior import NETWORK

KERNELS = ("NTK + RBF", "NTK + Matérn", "NTK × RBF", "NTK, a variance for each layer")
OURS = Column("ntk_gp", "ntk_gp", "benchmarks.columns.sums", "SumColumn")
FIGURES = ("cholesky", "first", "later", "peak")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of training inputs (default: 3000)")


def run(arguments: argparse.Namespace) -> None:
    """Each computation in turns with a factorisation of as many rows in float64, in one process."""
    rows = report.earlier(arguments, "sums")["rows"]
    for n in arguments.sizes or ([200] if arguments.quick else [3000]):
        for dtype in ("float32", "float64"):
            case = problems.Case(NETWORK, n, num_test=1000, dtype=dtype)
            operations = [
                Operation(
                    f"{kernel}: {name}",
                    name,
                    {"kernel": kernel, "repeats": arguments.repeats},
                    score=lambda results: dict(zip(FIGURES, results[0].tolist(), strict=True)),
                )
                for name in ("step", "prediction")
                for kernel in KERNELS
            ]
            for threads in arguments.threads:
                timing = Timing(threads, 0, arguments.slowest, arguments.limit)
                measured = measure([OURS], case.description(), case.arrays(), operations, timing)
                rows = report.merged(rows, [{"network": NETWORK, "n": n, "dtype": dtype, **row} for row in measured])
                report.write(arguments.output, "sums", {"rows": rows}, _markdown(rows))


def _markdown(rows: list[dict]) -> str:
    header = ["n", "dtype", "threads", "computation", "Cholesky", "first", "later", "later / Cholesky", "peak / 8 N²"]
    lines = [[f"{row['n']:,}", row["dtype"], str(row["threads"]), row["operation"], *_cells(row)] for row in rows]
    legend = (
        "A step of fitting (the usual training loop with Adam), and mean and variance at 1,000 new inputs, after the "
        "first; in turns with a Cholesky factorisation in float64 of as many rows. The peak of memory is what a later "
        "one takes beside what is kept between them, in matrices of N² float64 numbers."
    )
    title = f"# Sums and products, network {NETWORK}"
    return "\n\n".join([title, report.machine_line(), legend, report.markdown_table(header, lines)])


def _cells(row: dict) -> list[str]:
    (cell,) = row["cells"]
    if cell["note"]:
        return [cell["note"], "", "", "", ""]
    figures = cell["scores"]
    times = [report.duration(figures[name]) for name in FIGURES[:3]]
    return [*times, f"{figures['later'] / figures['cholesky']:.1f}", f"{figures['peak']:.1f}"]
