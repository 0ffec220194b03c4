"""`python -m benchmarks.before_after BEFORE [AFTER]`: is one checkout of the package slower than another?

Both are folders with a package `ntk_gp` in them. Each turn runs the same cells once in a process of each, the order
changing with every turn. Printed are the medians of the ratios after / before, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

# This file runs as a script beside either package, so that it imports nothing of ours.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

# Widths of the hidden layers, outputs, and numbers of inputs.
CAPTURES = (((50, 50), 1, (10, 100, 1000, 3000)), ((200, 200), 1, (10, 100, 1000, 3000)), ((800, 800), 1, (1000,)))
OUTPUTS = (((200, 200), 10, (10, 100, 1000)),)
GRAM_FROM = 1000
TRAINING = (100, 1000)
TEST = (1, 100, 1000)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.before_after", description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=Path.cwd())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=7)
    arguments = parser.parse_args()
    ratios: dict[str, list[float]] = defaultdict(list)
    for turn in range(arguments.turns):
        folders = [arguments.before, arguments.after]
        seconds = {folder: _measured(folder, arguments.threads) for folder in (folders[::-1] if turn % 2 else folders)}
        for name in seconds[folders[0]]:
            ratios[name].append(seconds[folders[1]][name] / seconds[folders[0]][name])
    for name, values in ratios.items():
        print(f"{name:38s} {statistics.median(values):.2f}  ({min(values):.2f} to {max(values):.2f})")


def _measured(folder: Path, threads: int) -> dict[str, float]:
    """Seconds of every cell, by the package in this folder."""
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)), "PYTHONPATH": str(folder.resolve())}
    command = [sys.executable, Path(__file__).resolve(), "--cells"]
    result = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def _cells() -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, what is timed, and how many times, with the package that is imported here."""
    import torch

    from ntk_gp.jacobian.structured import StructuredEngine
    from ntk_gp.network import FrozenNetwork

    torch.manual_seed(0)
    for widths, outputs, sizes in CAPTURES + OUTPUTS:
        network = FrozenNetwork(_mlp(5, *widths, outputs), output="all")
        engine, variances = StructuredEngine(network), torch.ones(1, 1)
        for n in sizes:
            x = torch.randn(1, n, 5)
            cell = f"{widths[0]} wide, C={outputs}, n={n}"
            yield f"capture, {cell}", lambda engine=engine, x=x: engine.linearize(x), 15
            if n >= GRAM_FROM and outputs == 1:

                def gram(engine=engine, x=x, variances=variances) -> torch.Tensor:
                    jacobian = engine.linearize(x)
                    return jacobian.gram(jacobian, variances)

                yield f"Gram, {cell}", gram, 5
    yield from _model_cells()


def _model_cells() -> Iterator[tuple[str, Callable[[], object], int]]:
    import gpytorch
    import torch

    from ntk_gp import NetworkMean, NTKKernel

    network = _mlp(5, 50, 50, 1)

    class AdaptedGP(gpytorch.models.ExactGP):
        def __init__(self, x: torch.Tensor, y: torch.Tensor):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module = NetworkMean(network)
            self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network))

        def forward(self, x: torch.Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def predict(model: AdaptedGP, n: int) -> None:
        model.eval()
        with torch.no_grad():
            prediction = model(torch.randn(n, 5))
            prediction.mean, prediction.variance  # noqa: B018

    for n in TRAINING:
        x = torch.randn(n, 5)
        y = network(x).squeeze(-1).detach()
        model = AdaptedGP(x, y)
        for m in TEST:
            yield f"serve, n={n}, {m} new inputs", lambda model=model, m=m: predict(model, m), 25
        yield f"posterior of a new model, n={n}", lambda n=n, y=y: predict(AdaptedGP(torch.randn(n, 5), y), 100), 7
        fitted = AdaptedGP(x, y).train()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(fitted.likelihood, fitted)

        def step(model=fitted, mll=mll, x=x, y=y) -> None:
            model.zero_grad()
            (-mll(model(x), y)).backward()

        yield f"fit, a step, n={n}", step, 15


def _mlp(*sizes: int):
    from torch import nn

    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(pairwise(sizes)):
        layers += ([nn.Tanh()] if i else []) + [nn.Linear(d_in, d_out)]
    return nn.Sequential(*layers)


def _median(call: Callable[[], object], repeats: int) -> float:
    call(), call()  # what is found out once, and caches
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    if sys.argv[1:] == ["--cells"]:
        print(json.dumps({name: _median(call, repeats) for name, call, repeats in _cells()}))
    else:
        main()
