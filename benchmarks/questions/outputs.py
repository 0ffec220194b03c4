"""What do the kernel matrices of ten outputs cost, beside one output's?"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ntk_gp import NTKKernel

from .. import report

WIDTH, OUTPUTS = 200, 10
# The options of a kernel, and of the one with one output that it is compared with.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a batch of them": ({"output": "batch"}, {"output": 0}),
    "all together": ({"output": "all"}, {"output": 0}),
    "all together, last layer": (
        {"output": "all", "parameters": "last_layer"},
        {"output": 0, "parameters": "last_layer"},
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=int, nargs="+", help="numbers of inputs (default: 100 300 1000)")


def run(arguments: argparse.Namespace) -> None:
    """In turns, in this process, at new inputs each time; medians."""
    torch.set_num_threads(max(arguments.threads))
    rows = []
    for dtype in (torch.float32, torch.float64):
        for n in arguments.points or ([20] if arguments.quick else [100, 300, 1000]):
            for form in FORMS:
                name = str(dtype).removeprefix("torch.")
                rows.append({"form": form, "n": n, "dtype": name} | _measured(form, n, dtype, arguments.repeats))
                report.write(arguments.output, "outputs", {"rows": rows}, _markdown(rows))


def _measured(form: str, n: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    hidden = [nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    network = nn.Sequential(*hidden, nn.Linear(WIDTH, OUTPUTS)).to(dtype)
    several, one = (NTKKernel(network, **options).to(dtype) for options in FORMS[form])
    taken: dict[str, list[float]] = {"several": [], "one": [], "copy": []}
    for turn in range(repeats + 1):
        x = torch.randn(n, 8, dtype=dtype) + turn
        with torch.no_grad():
            _timed(taken["one"], lambda x=x: one(x).to_dense())
            matrix = _timed(taken["several"], lambda x=x: several(x).to_dense())
            _timed(taken["copy"], matrix.clone)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _timed(seconds: list[float], compute: Callable[[], Tensor]) -> Tensor:
    start = time.perf_counter()
    result = compute()
    seconds.append(time.perf_counter() - start)
    return result


def _markdown(rows: list[dict]) -> str:
    header = ["kernel", "n", "dtype", "one output", "ten", "of one output's", "a copy of it, of one output's"]
    lines = [
        [
            row["form"],
            f"{row['n']:,}",
            row["dtype"],
            report.duration(row["one"]),
            report.duration(row["several"]),
            f"{row['several'] / row['one']:.1f}×",
            f"{row['copy'] / row['one']:.1f}×",
        ]
        for row in rows
    ]
    legend = (
        f"MLPs with two hidden layers of {WIDTH}: kernel matrices at new inputs, capture included. A batch has ten "
        "times the numbers of one output's matrix, all together a hundred times: what copying them takes is a floor."
    )
    return "\n\n".join(
        ["# Ten outputs beside one", report.machine_line(), legend, report.markdown_table(header, lines)]
    )
