"""How far does it go: a million points, hundreds of thousands of parameters, and a published scaling experiment?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .. import networks, problems, report
from ..harness import Operation, Timing, measure
from ..problems import NOISE, Case
from ..reference import Problem
from .posterior import OURS

LARGEST_CLOSED_FORM = 12_000
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Part:
    """One experiment at several sizes.

    :param title: The heading.
    :param cases: From small to large.
    :param operation: "posterior" (mean and exact variance), "love" (fast variance) or "mean" (to `TOLERANCE`).
    :param published: Seconds of others, by their heading, for the same sizes.
    """

    title: str
    cases: tuple[Case, ...]
    operation: str
    published: tuple[tuple[str, tuple[float, ...]], ...] = ()


# Predictive mean at 50 points on a GPU of 2020 (Maddox et al., AISTATS 2021, figure on scaling).
PUBLISHED = (
    ("function space, GPU of 2020 (unconverged from 10k on)", (0.85, 33, 320)),
    ("parameter space", (3.4, 6, 93)),
)
PARTS = {
    "points": Part(
        "Many points: exact mean and variance",
        tuple(Case("5-40-40-1", n) for n in (1000, 10_000, 100_000, 1_000_000)),
        "posterior",
    ),
    "parameters": Part("Many parameters: mean and LOVE variance", (Case("5-540-540-1", 100_000),), "love"),
    "published": Part(
        "Predictive mean at 50 points, beside published times",
        tuple(Case("5-200-2000-200-1", n, 50) for n in (1000, 10_000, 100_000)),
        "mean",
        PUBLISHED,
    ),
}
QUICK = {
    "points": Part(PARTS["points"].title, (Case("5-8-8-1", 500, 50), Case("5-8-8-1", 2000, 50)), "posterior"),
    "parameters": Part(PARTS["parameters"].title, (Case("5-60-60-1", 500, 50),), "love"),
    "published": Part(PARTS["published"].title, (Case("5-20-200-20-1", 300, 50),), "mean"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", help="only these numbers of points")


def run(arguments: argparse.Namespace) -> None:
    """Each size once, in a process of its own: seconds, peak memory, and the error where a closed form can be had."""
    parts = QUICK if arguments.quick else PARTS
    timing = Timing(max(arguments.threads), 0, arguments.slowest, arguments.limit)
    rows = report.earlier(arguments, "large")["rows"]
    for name in arguments.parts:
        cases = [case for case in parts[name].cases if arguments.sizes is None or case.n in arguments.sizes]
        for case in tqdm(cases, desc=name):
            rows = report.merged(rows, [{"part": name, **_measure(case, parts[name].operation, timing)}])
            report.write(arguments.output, "large", {"rows": rows}, _markdown(parts, rows))


def _markdown(parts: dict[str, Part], rows: list[dict]) -> str:
    sections = ["# Large problems", report.machine_line()]
    for name, part in parts.items():
        mine = [row for row in rows if row["part"] == name]
        sections += [f"## {part.title}", _table(part, mine)] if mine else []
    return "\n\n".join(sections)


def _measure(case: Case, operation: str, timing: Timing) -> dict:
    arrays = case.arrays()
    network = problems.trained(case.network)
    expected = _expected(Problem(network, arrays), case, operation)
    options = {"noise": NOISE, **({"tolerance": TOLERANCE} if operation == "mean" else {})}
    operations = [Operation(operation, operation, options, lambda: expected)]
    (row,) = measure([OURS], case.description(), arrays, operations, timing)
    return {"network": case.network, "P": networks.num_parameters(network), "n": case.n, **row}


def _expected(problem: Problem, case: Case, operation: str) -> Sequence[np.ndarray]:
    """Mean and variance, or the mean alone, by whichever closed form is affordable; nothing where none is."""
    if case.n <= LARGEST_CLOSED_FORM:
        posterior = problem.closed_form(NOISE)
    elif networks.num_parameters(problem.network) <= LARGEST_CLOSED_FORM:
        posterior = problem.weight_space(NOISE)
    else:
        return []
    return posterior[:1] if operation == "mean" else posterior


def _table(part: Part, rows: list[dict]) -> str:
    lines, sizes = [], [case.n for case in part.cases]
    for row in rows:
        (cell,) = row["cells"]
        errors = report.errors(cell, 1 if part.operation == "mean" else 2)
        costs = [report.duration(cell["median"]), report.size(cell["peak_bytes"])]
        published = [f"{seconds[sizes.index(row['n'])]:g} s" for _, seconds in part.published]
        lines.append(
            [row["network"], f"{row['n']:,}", f"{row['P']:,}", *costs, *errors, *published, report.remarks(cell)]
        )
    headings = ["error of mean"] if part.operation == "mean" else ["error of mean", "of variance"]
    header = ["network", "n", "P", "time", "peak memory", *headings, *(title for title, _ in part.published), ""]
    seconds = [report.median(row, OURS.title) for row in rows]
    slope = report.exponent([row["n"] for row in rows], seconds)
    text = f"\n\nFitted exponent of the time in n: {slope:.2f}." if slope is not None else ""
    return report.markdown_table(header, lines) + text
