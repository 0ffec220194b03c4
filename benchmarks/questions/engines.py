"""How fast are Jacobian products and Gram matrices, engine by engine and beside the peers?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .. import networks, report
from ..harness import Column, Operation, Timing, measure
from ..reference import Reference

OURS = "structured"
GRAM = "Gram"
NEW_GRAM = "Gram of new inputs"
PACKAGE = "benchmarks.columns"
NEURAL_TANGENTS = (f"{PACKAGE}.neural_tangents", "NeuralTangentsColumn")

COLUMNS = [
    Column("structured", "ntk_gp", f"{PACKAGE}.ntk_gp", "EngineColumn", ("structured",)),
    Column("autodiff", "ntk_gp", f"{PACKAGE}.ntk_gp", "EngineColumn", ("autodiff",)),
    Column("torch.func", "ntk_gp", f"{PACKAGE}.torch_func", "TorchFuncColumn"),
    Column("curvlinops", "torch", f"{PACKAGE}.curvlinops", "CurvlinopsColumn"),
    Column("nt structured", "neural_tangents", *NEURAL_TANGENTS, ("STRUCTURED_DERIVATIVES",)),
    Column("nt contraction", "neural_tangents", *NEURAL_TANGENTS, ("JACOBIAN_CONTRACTION",)),
]


ALL = ("capture", "gram", "new_gram", "diagonal", "kernel_matmul", "jvp", "vjp")
GRAMS = ("gram", "new_gram")
NUM_COLUMNS = (1, 10, 100)  # r of the products K V
COMPARED_COLUMNS = 10  # of those with more


@dataclass(frozen=True)
class Case:
    """A network at n random inputs, and the kinds of rows."""

    network: str
    n: int
    operations: tuple[str, ...] = ALL


MLP = "5-200-200-1"
CASES = [
    Case(MLP, 1000, GRAMS),
    Case(MLP, 3000),
    Case(MLP, 8000, GRAMS),
    Case("5-50-50-1", 1000, GRAMS),
    Case("5-800-800-1", 1000, GRAMS),
    Case("5-200-2000-200-1", 1000),
    Case("5-200-200-10", 300),
    Case(networks.RESNET, 128),
    Case(networks.TRANSFORMER, 256),
]
QUICK_CASES = [
    Case(MLP, 200),
    Case(MLP, 400, GRAMS),
    Case("5-50-50-1", 200, GRAMS),
    Case("5-200-200-10", 30),
    Case(networks.RESNET, 4),
    Case(networks.TRANSFORMER, 16),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    titles = [column.title for column in COLUMNS]
    parser.add_argument("--columns", nargs="+", choices=titles, metavar="COLUMN", help=f"of {', '.join(titles)}")
    parser.add_argument("--networks", nargs="+", help="only the cases of these networks")
    parser.add_argument("--operations", nargs="+", choices=ALL, help="only these rows")


def run(arguments: argparse.Namespace) -> None:
    """Measures everything on each number of threads, then writes JSON, Markdown and a figure."""
    columns = [column for column in COLUMNS if arguments.columns is None or column.title in arguments.columns]
    cases = QUICK_CASES if arguments.quick else CASES
    cases = [case for case in cases if arguments.networks is None or case.network in arguments.networks]
    results = report.earlier(arguments, "engines")
    rates = results.setdefault("gemm_rates", {})
    rates |= {str(threads): report.gemm_rate(threads) for threads in arguments.threads}
    writing = results.setdefault("write_rates", {})
    writing |= {str(threads): report.write_rate(threads) for threads in arguments.threads}
    for threads, case in tqdm(list(product(arguments.threads, cases))):
        timing = Timing(threads, arguments.repeats, arguments.slowest, arguments.limit)
        rows = _measure(case, columns, timing, arguments.operations or ALL)
        tqdm.write("\n".join(report.line(row, OURS) for row in rows))
        results["rows"] = report.merged(results["rows"], rows)
        report.write(arguments.output, "engines", results, _markdown(**results))
    _figure(results["rows"], arguments.output / "engines.png")


def _measure(case: Case, columns: list[Column], timing: Timing, wanted: Sequence[str]) -> list[dict]:
    network = networks.build(case.network)
    arrays = _arrays(case, network)
    operations = [operation for operation in _operations(case, network, arrays) if operation.name in wanted]
    description = {"network": case.network, "parameters": [name for name, _ in network.named_parameters()]}
    common = {"network": case.network, "n": case.n, "P": networks.num_parameters(network)}
    return [
        common | row | {"useful_flops": _useful_flops(case) if row["operation"] in (GRAM, NEW_GRAM) else None}
        for row in measure(columns, description, arrays, operations, timing)
    ]


def _arrays(case: Case, network: nn.Module) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    x = normal(case.n, networks.input_size(case.network))
    with torch.no_grad():
        num_rows = network(torch.tensor(x[:1])).numel() * case.n
    state = {f"network.{name}": tensor.numpy() for name, tensor in network.state_dict().items()}
    tangent = normal(networks.num_parameters(network))
    return {
        "x": x,
        "rhs": normal(num_rows, max(NUM_COLUMNS)),
        "probe": normal(num_rows, 3),
        "tangent": tangent,
        **state,
    }


def _operations(case: Case, network: nn.Module, arrays: dict[str, np.ndarray]) -> list[Operation]:
    exact = Reference(network, torch.tensor(arrays["x"]))
    products = cache(lambda: [exact.kernel_matmul(arrays["rhs"][:, :COMPARED_COLUMNS])])
    operations = [
        Operation("capture", "capture"),
        Operation(GRAM, "gram", reference=lambda: [exact.kernel_matmul(arrays["probe"])], probe=True),
        Operation(NEW_GRAM, "new_gram", reference=lambda: [exact.kernel_matmul(arrays["probe"])], probe=True),
        Operation("diagonal", "diagonal", reference=lambda: [exact.diagonal()]),
        *(Operation(f"K V, r = {r}", "kernel_matmul", {"columns": r}, products) for r in NUM_COLUMNS),
        Operation("J u", "jvp", reference=lambda: [exact.jvp(arrays["tangent"])]),
        Operation("Jᵀ v", "vjp", reference=lambda: [exact.vjp(arrays["rhs"])]),
    ]
    return [operation for operation in operations if operation.name in case.operations]


def _useful_flops(case: Case) -> float | None:
    """2n²Σ(d_in + C²·d_out): a multiplication and an addition per entry of every layer's two factor products."""
    if not networks.is_mlp(case.network):
        return None
    sizes = networks.widths(case.network)
    num_outputs = sizes[-1]
    layers = list(pairwise(sizes))
    # The last layer's output gradient is the identity: its factor product needs no arithmetic.
    terms = sum(fan_in for fan_in, _ in layers) + num_outputs**2 * sum(fan_out for _, fan_out in layers[:-1])
    return 2.0 * case.n**2 * terms


def _markdown(rows: list[dict], gemm_rates: dict[str, float], write_rates: dict[str, float], **_: object) -> str:
    parts = ["# Engines", report.machine_line()]
    for threads, rate in ((int(number), rate) for number, rate in sorted(gemm_rates.items())):
        mine = [row for row in rows if row["threads"] == threads]
        parts += [f"## {threads} thread{'s' if threads > 1 else ''}", report.table(mine, OURS)]
        parts += [
            f"float32 GEMM: {rate / 1e9:.0f} Gflop/s.",
            _rates_table(mine, rate, write_rates.get(str(threads), math.inf)),
            _exponents_table(mine),
        ]
    return "\n\n".join(part for part in parts if part)


def _floor(row: dict, gemm_rate: float, write_rate: float) -> float:
    """Seconds that a Gram matrix takes at least: half of the useful arithmetic, for it is symmetric, and the passes of
    the capture, at the rate of large products, and each page of the result written once."""
    outputs = networks.widths(row["network"])[-1]
    passes = 2.0 * (1 + outputs) * row["n"] * row["P"]
    return (row["useful_flops"] / 2 + passes) / gemm_rate + 4.0 * (row["n"] * outputs) ** 2 / write_rate


def _rates_table(rows: list[dict], gemm_rate: float, write_rate: float) -> str:
    """The useful arithmetic of our Gram matrices per second, beside the GEMM rate; the floor's share of the time."""
    lines = []
    for row in rows:
        seconds = report.median(row, OURS)
        if row["useful_flops"] and seconds:
            rate = row["useful_flops"] / seconds
            share = f"{rate / gemm_rate:.0%}"
            of_floor = f"{_floor(row, gemm_rate, write_rate) / seconds:.0%}"
            case = [row["network"], f"{row['n']:,}", row["operation"], report.duration(seconds)]
            lines.append([*case, f"{rate / 1e9:.0f}", share, of_floor])
    titles = ["network", "n", "", "time", "useful Gflop/s", "of the GEMM rate", "share of the floor"]
    return report.markdown_table(titles, lines)


def _exponents_table(rows: list[dict]) -> str:
    """Fitted exponents of the Gram matrix's time beside those of its arithmetic."""
    lines = []
    for label, size, series in (
        ("n", itemgetter("n"), [row for row in rows if row["network"] == MLP]),
        ("width", _width, [row for row in rows if row["n"] == 1000 and _width(row)]),
    ):
        series = [row for row in series if row["operation"] == GRAM]
        sizes = [size(row) for row in series]
        model = report.exponent(sizes, [row["useful_flops"] for row in series])
        for column in report.titles(rows):
            fitted = report.exponent(sizes, [report.median(row, column) for row in series])
            if fitted is not None and model is not None:
                expected = f"{model:.2f}" if column == OURS else ""
                lines.append([column, label, f"{fitted:.2f}", expected])
    return report.markdown_table(["Gram", "exponent of", "fitted", "cost model"], lines)


def _width(row: dict) -> int | None:
    """The width of an MLP with two equal hidden layers."""
    sizes = networks.widths(row["network"]) if networks.is_mlp(row["network"]) else []
    return sizes[1] if len(sizes) == 4 and sizes[1] == sizes[2] and sizes[3] == 1 else None


def _figure(rows: list[dict], file: Path) -> None:
    """Time of the Gram matrix against n and against P, on the most threads."""
    most = max((row["threads"] for row in rows), default=0)
    grams = [row for row in rows if row["operation"] == GRAM and row["threads"] == most]
    series = {
        f"n ({MLP})": ("n", [row for row in grams if row["network"] == MLP]),
        "P (two hidden layers, n = 1000)": ("P", [row for row in grams if row["n"] == 1000 and _width(row)]),
    }
    report.figure(series, report.titles(rows), "Gram matrix, seconds", file)
