"""How fast and how exact are posterior mean and variance, beside GPyTorch and laplace-torch?"""

from __future__ import annotations

import argparse

from tqdm import tqdm

from .. import networks, problems, report
from ..harness import Column, Operation, Timing, measure
from ..reference import Problem

GP = "benchmarks.columns.gp"
LAPLACE = ("torch", "benchmarks.columns.laplace", "LaplaceColumn")
OURS = Column("ntk_gp", "ntk_gp", GP, "PosteriorColumn")

COLUMNS = [
    OURS,
    Column("explicit J, Cholesky", "ntk_gp", GP, "ExplicitJacobianColumn", ("cholesky",)),
    Column("explicit J, GPyTorch's defaults", "ntk_gp", GP, "ExplicitJacobianColumn", ("default",)),
    Column("laplace-torch, BackPACK", *LAPLACE, ("backpack",)),
    Column("laplace-torch, curvlinops", *LAPLACE, ("curvlinops",)),
]
NETWORK = "5-200-200-1"
SIZES = (3000, 10_000)
QUICK_SIZES = (200,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of training inputs (default: {SIZES})")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64"])


def run(arguments: argparse.Namespace) -> None:
    """Measures the whole way from a trained network and data to predictions at 500 inputs."""
    sizes = arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES)
    cases = [problems.Case(NETWORK, n, dtype=dtype) for n in sizes for dtype in arguments.dtypes]
    rows = report.earlier(arguments, "posterior")["rows"]
    for case in tqdm(cases):
        problem = Problem(problems.trained(case.network), case.arrays())
        expected = problem.closed_form(problems.NOISE)
        operation = Operation("posterior", "posterior", {"noise": problems.NOISE}, lambda expected=expected: expected)
        for threads in arguments.threads:
            timing = Timing(threads, arguments.repeats, arguments.slowest, arguments.limit)
            (row,) = measure(COLUMNS, case.description(), case.arrays(), [operation], timing)
            rows = report.merged(rows, [{"network": case.network, "n": case.n, "dtype": case.dtype, **row}])
            report.write(arguments.output, "posterior", {"rows": rows}, _markdown(rows))


def _markdown(rows: list[dict]) -> str:
    header = ["network", "n", "dtype", "threads", "", "time", "first call", "error of mean", "of variance", "peak", ""]
    table = report.markdown_table(header, [line for row in rows for line in _lines(row)])
    title = f"# Posterior mean and variance at 500 inputs, noise {problems.NOISE}"
    details = f"P = {networks.num_parameters(networks.build(NETWORK)):,}. Errors are against a float64 closed form."
    return f"{title}\n\n{report.machine_line()} {details}\n\n{table}"


def _lines(row: dict) -> list[list[str]]:
    ours = report.median(row, OURS.title)
    return [
        [
            row["network"],
            f"{row['n']:,}",
            row["dtype"],
            str(row["threads"]),
            cell["column"],
            report.cell_text(cell, ours),
            report.duration(cell["first"]),
            *report.errors(cell, 2),
            report.size(cell["peak_bytes"]),
            report.remarks(cell),
        ]
        for cell in row["cells"]
    ]
