"""How fast are Jacobian products and Gram matrices, engine by engine and beside the peers?"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import networks, report
from ..harness import Cell, Column, Workers
from ..reference import Reference

OURS = "structured"
COMPARED_COLUMNS = 10  # of the products with more
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


@dataclass(frozen=True)
class Operation:
    """One kind of row.

    :param title: As in the tables.
    :param name: The columns' method.
    :param options: Its keyword arguments.
    """

    title: str
    name: str
    options: tuple[tuple[str, int], ...] = ()


GRAM = Operation("Gram", "gram")
PRODUCTS = [Operation(f"K V, r = {r}", "kernel_matmul", (("columns", r),)) for r in (1, 10, 100)]
ALL = [
    Operation("capture", "capture"),
    GRAM,
    Operation("diagonal", "diagonal"),
    *PRODUCTS,
    Operation("J u", "jvp"),
    Operation("Jᵀ v", "vjp"),
]


@dataclass(frozen=True)
class Case:
    """A network at n random inputs."""

    network: str
    n: int
    operations: tuple[Operation, ...] = tuple(ALL)


MLP = "5-200-200-1"
CASES = [
    Case(MLP, 1000, (GRAM,)),
    Case(MLP, 3000),
    Case(MLP, 8000, (GRAM,)),
    Case("5-50-50-1", 1000, (GRAM,)),
    Case("5-800-800-1", 1000, (GRAM,)),
    Case("5-200-2000-200-1", 1000),
    Case("5-200-200-10", 300),
    Case(networks.RESNET, 128),
    Case(networks.TRANSFORMER, 256),
]
QUICK_CASES = [
    Case(MLP, 200),
    Case(MLP, 400, (GRAM,)),
    Case("5-50-50-1", 200, (GRAM,)),
    Case("5-200-200-10", 30),
    Case(networks.RESNET, 4),
    Case(networks.TRANSFORMER, 16),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    titles = [column.title for column in COLUMNS]
    parser.add_argument("--columns", nargs="+", choices=titles, metavar="COLUMN", help=f"of {', '.join(titles)}")
    parser.add_argument("--networks", nargs="+", help="only the cases of these networks")
    parser.add_argument("--operations", nargs="+", choices=sorted({o.name for o in ALL}), help="only these rows")


def run(arguments: argparse.Namespace) -> None:
    """Measures everything on each number of threads, then writes JSON, Markdown and a figure."""
    columns = [column for column in COLUMNS if arguments.columns is None or column.title in arguments.columns]
    rows, rates = [], {}
    for threads in arguments.threads:
        rates[threads] = report.gemm_rate(threads)
        rows += _measure(columns, threads, arguments)
    results = {"rates": {str(threads): rate for threads, rate in rates.items()}, "rows": rows}
    report.write(arguments.output, "engines", results, _markdown(rows, rates))
    _figure(rows, arguments.output / "engines.png")


def _measure(columns: list[Column], threads: int, arguments: argparse.Namespace) -> list[dict]:
    cases = QUICK_CASES if arguments.quick else CASES
    cases = [case for case in cases if arguments.networks is None or case.network in arguments.networks]
    rows = []
    with Workers(columns, threads) as workers, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in tqdm(cases, desc=f"{threads} threads"):
            network = networks.build(case.network)
            arrays = _arrays(case, network)
            np.savez(folder / "case.npz", **arrays)
            description = {"network": case.network, "parameters": [name for name, _ in network.named_parameters()]}
            skip = workers.prepare(description, folder / "case.npz")
            reference = _references(network, arrays)
            for operation in case.operations:
                if arguments.operations is not None and operation.name not in arguments.operations:
                    continue
                cells = workers.measure(
                    operation.name,
                    dict(operation.options),
                    reference(operation),
                    folder,
                    repeats=arguments.repeats,
                    slowest=arguments.slowest,
                    skip=skip,
                    probe=operation == GRAM,
                )
                rows.append(_row(case, network, operation, threads, cells))
                tqdm.write(report.line(rows[-1], OURS))
    return rows


def _arrays(case: Case, network: torch.nn.Module) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    x = normal(case.n, networks.input_size(case.network))
    with torch.no_grad():
        num_rows = network(torch.tensor(x[:1])).numel() * case.n
    state = {f"network.{name}": tensor.numpy() for name, tensor in network.state_dict().items()}
    tangent = normal(networks.num_parameters(network))
    return {"x": x, "rhs": normal(num_rows, 100), "probe": normal(num_rows, 3), "tangent": tangent, **state}


def _references(network: torch.nn.Module, arrays: dict[str, np.ndarray]) -> Any:
    """What each operation's result must equal, computed once per case where several rows share it."""
    exact = Reference(network, torch.tensor(arrays["x"]))
    product = cache(lambda: exact.kernel_matmul(arrays["rhs"][:, :COMPARED_COLUMNS]))
    known = {
        "gram": lambda: exact.kernel_matmul(arrays["probe"]),
        "diagonal": exact.diagonal,
        "kernel_matmul": product,
        "jvp": lambda: exact.jvp(arrays["tangent"]),
        "vjp": lambda: exact.vjp(arrays["rhs"]),
    }
    return lambda operation: [known[operation.name]()] if operation.name in known else None


def _row(case: Case, network: torch.nn.Module, operation: Operation, threads: int, cells: list[Cell]) -> dict:
    return {
        "network": case.network,
        "n": case.n,
        "P": networks.num_parameters(network),
        "operation": operation.title,
        "threads": threads,
        "useful_flops": _useful_flops(case, operation),
        "cells": [asdict(cell) | {"median": cell.median} for cell in cells],
    }


def _useful_flops(case: Case, operation: Operation) -> float | None:
    """2n²Σ(d_in + C²·d_out): a multiplication and an addition per entry of every layer's two factor products."""
    if operation != GRAM or not networks.is_mlp(case.network):
        return None
    sizes = networks.widths(case.network)
    num_outputs = sizes[-1]
    layers = list(pairwise(sizes))
    # The last layer's output gradient is the identity: its factor product needs no arithmetic.
    terms = sum(fan_in for fan_in, _ in layers) + num_outputs**2 * sum(fan_out for _, fan_out in layers[:-1])
    return 2.0 * case.n**2 * terms


def _markdown(rows: list[dict], rates: dict[int, float]) -> str:
    parts = ["# Engines", report.machine_line()]
    for threads, rate in rates.items():
        mine = [row for row in rows if row["threads"] == threads]
        parts += [f"## {threads} thread{'s' if threads > 1 else ''}", report.table(mine, OURS)]
        parts += [f"float32 GEMM: {rate / 1e9:.0f} Gflop/s.", _rates_table(mine, rate), _exponents_table(mine)]
    return "\n\n".join(part for part in parts if part)


def _rates_table(rows: list[dict], gemm_rate: float) -> str:
    """The useful arithmetic of our Gram matrices per second, and its share of the GEMM rate."""
    lines = []
    for row in rows:
        seconds = report.median(row, OURS)
        if row["useful_flops"] and seconds:
            rate = row["useful_flops"] / seconds
            share = f"{rate / gemm_rate:.0%}"
            lines.append([row["network"], f"{row['n']:,}", report.duration(seconds), f"{rate / 1e9:.0f}", share])
    return report.markdown_table(["network", "n", "Gram", "useful Gflop/s", "of the GEMM rate"], lines)


def _exponents_table(rows: list[dict]) -> str:
    """Fitted exponents of the Gram matrix's time beside those of its arithmetic."""
    lines = []
    for label, size, series in (
        ("n", itemgetter("n"), [row for row in rows if row["network"] == MLP]),
        ("width", _width, [row for row in rows if row["n"] == 1000 and _width(row)]),
    ):
        series = [row for row in series if row["operation"] == GRAM.title]
        sizes = [size(row) for row in series]
        model = report.exponent(sizes, [row["useful_flops"] for row in series])
        for column in _titles(rows):
            fitted = report.exponent(sizes, [report.median(row, column) for row in series])
            if fitted is not None and model is not None:
                expected = f"{model:.2f}" if column == OURS else ""
                lines.append([column, label, f"{fitted:.2f}", expected])
    return report.markdown_table(["Gram", "exponent of", "fitted", "cost model"], lines)


def _width(row: dict) -> int | None:
    """The width of an MLP with two equal hidden layers."""
    sizes = networks.widths(row["network"]) if networks.is_mlp(row["network"]) else []
    return sizes[1] if len(sizes) == 4 and sizes[1] == sizes[2] and sizes[3] == 1 else None


def _titles(rows: list[dict]) -> list[str]:
    return [cell["column"] for cell in rows[0]["cells"]] if rows else []


def _figure(rows: list[dict], file: Path) -> None:
    """Time of the Gram matrix against n and against P, on the most threads."""
    most = max((row["threads"] for row in rows), default=0)
    grams = [row for row in rows if row["operation"] == GRAM.title and row["threads"] == most]
    series = {
        f"n ({MLP})": ("n", [row for row in grams if row["network"] == MLP]),
        "P (two hidden layers, n = 1000)": ("P", [row for row in grams if row["n"] == 1000 and _width(row)]),
    }
    report.figure(series, _titles(rows), "Gram matrix, seconds", file)
