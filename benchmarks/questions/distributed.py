"""How much faster are two ranks of one thread than one, and how many bytes go between them?"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.models import ExactGP
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.solvers import System
from ntk_gp.solvers.weight_space import WeightSpaceSolver

from .. import report

RANKS, WIDTH, COLUMNS, TEST_POINTS = 2, 50, 10, 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=int, help="n (default: 20000)")


def run(arguments: argparse.Namespace) -> None:
    """Both in turns in the same processes: the first rank alone while the other waits, then both."""
    n = arguments.points or (500 if arguments.quick else 20_000)
    with tempfile.TemporaryDirectory() as folder:
        rows = mp.get_context("spawn").SimpleQueue()
        store = (Path(folder) / "store").as_uri()
        mp.spawn(_rank, (store, n, arguments.repeats or 3, rows), nprocs=RANKS)
        found = rows.get()
    report.write(arguments.output, "distributed", {"rows": found}, _markdown(found, n))


class _Model(ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module):
        super().__init__(x, y, GaussianLikelihood().double())
        self.mean_module = NetworkMean(network)
        self.covar_module = ScaleKernel(NTKKernel(network)).double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class _Problem:
    """A network with P = 2,901 parameters, and n points in five dimensions."""

    def __init__(self, n: int):
        torch.manual_seed(0)
        layers = nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)
        self.network = nn.Sequential(*layers).double().eval()
        self.x, self.test_x = (torch.randn(count, 5, dtype=torch.float64) for count in (n, TEST_POINTS))
        self.y = self.x.sin().sum(-1) + 0.1 * torch.randn(n, dtype=torch.float64)
        self.v = torch.randn(1, n, COLUMNS, dtype=torch.float64)
        self.one = torch.ones(1, 1, dtype=torch.float64)
        self.linearization = NTKKernel(self.network)._linearization

    def operations(self) -> dict[str, Callable[[], Any]]:
        return {
            "Gram matrix, own rows": self.gram,
            f"K v, {COLUMNS} columns": self.products,
            "weight space": self.weight_space,
            f"posterior, {TEST_POINTS:,} test points": self.posterior,
        }

    def gram(self) -> Tensor:
        self.linearization.clear()
        jacobian = self.linearization.jacobian(self.x.unsqueeze(0))
        form = jacobian.gram if jacobian.shards.is_whole else jacobian.own_gram
        return form(jacobian, self.one)

    def products(self) -> Tensor:
        jacobian = self.linearization.jacobian(self.x.unsqueeze(0))
        return jacobian.kernel_matmul(jacobian, self.v, self.one)

    def weight_space(self) -> Tensor:
        self.linearization.clear()
        system = System(self.linearization, self.x.unsqueeze(0), self.one, torch.full_like(self.v[..., 0], 0.1))
        return WeightSpaceSolver(system).mean_weights(self.y.reshape(1, 1, -1))

    def posterior(self) -> Tensor:
        self.linearization.clear()  # which kernels of one network share
        model = _Model(self.x, self.y, self.network).eval()
        with torch.no_grad():
            posterior = model(self.test_x)
            return torch.cat([posterior.mean, posterior.variance])


def _rank(rank: int, store: str, n: int, repeats: int, rows: Any) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    problem, found = _Problem(n), []
    for name, operation in problem.operations().items():
        alone, together, sent = [], [], 0
        for _ in range(repeats):
            if rank == 0:
                alone.append(_seconds(operation))
            dist.barrier()
            with ntk_gp.settings.distributed() as group:
                before = group.traffic.total()
                together.append(_seconds(operation))
                sent = group.traffic.total() - before
            dist.barrier()
        row = {"operation": name, "n": n, "bytes": sent}
        for kind, seconds in (("alone", alone or [(0.0, 0.0)]), ("together", together)):
            row[kind], row[f"{kind}_cpu"] = (statistics.median(times) for times in zip(*seconds, strict=True))
        found.append(row)
        if rank == 0:
            print(_line(found[-1]), flush=True)
    if rank == 0:
        rows.put(found)
    dist.destroy_process_group()


def _seconds(operation: Callable[[], Any]) -> tuple[float, float]:
    """By the clock, and of this process's CPU: on a busy machine the latter says more."""
    gc.collect()
    start = time.perf_counter(), time.process_time()
    operation()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _line(row: dict) -> list[str]:
    ratio, cpu = (row[f"alone{kind}"] / row[f"together{kind}"] for kind in ("", "_cpu"))
    times = [f"{1e3 * row[key]:,.0f} ms" for key in ("alone", "together")]
    return [row["operation"], *times, f"{ratio:.2f}", f"{cpu:.2f}", f"{row['bytes'] / 1e6:,.2f} MB"]


def _markdown(rows: list[dict], n: int) -> str:
    header = ["operation", "1 rank", f"{RANKS} ranks", "times as fast", "times less CPU", "sent by each rank"]
    legend = (
        f"One thread each, in float64, n = {n:,}, a network 5-{WIDTH}-{WIDTH}-1; captures are counted, but for K v. "
        "Ranks are processes of one machine (gloo)."
    )
    table = report.markdown_table(header, [_line(row) for row in rows])
    return "\n\n".join(["# Ranks", report.machine_line(), legend, table])
