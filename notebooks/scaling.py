"""One adaptation, measured in a process of its own: `python notebooks/scaling.py WIDTHS N`, or :func:`measure`.

WIDTHS are the network's layers, such as 5-200-200-1; N is the number of training points. With `--fast`, variances come
from `gpytorch.settings.fast_pred_var`, and are compared with exact ones at some test points. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from itertools import pairwise

import gpytorch
import numpy as np
import torch
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel, settings

NOISE = 0.01
TEST_POINTS = 50
CHECKED_POINTS = 4


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = NetworkMean(network)
        self.covar_module = NTKKernel(network)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def make_network(widths: list[int]) -> nn.Sequential:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def adapt(widths: str, n: int, fast: bool = False) -> dict:
    """Adapts a network at its initialisation to n points, predicts at 50 others, and says what that took.

    :param fast: Variances by `gpytorch.settings.fast_pred_var`.
    """
    torch.manual_seed(0)
    network = make_network([int(width) for width in widths.split("-")])
    x = torch.randn(n + TEST_POINTS, network[0].in_features)
    y = x.sin().sum(-1) + NOISE**0.5 * torch.randn(len(x))
    gp = AdaptedGP(x[:n], y[:n], network)
    gp.likelihood.noise = NOISE
    gp.eval()
    start = time.perf_counter()
    with torch.no_grad(), gpytorch.settings.fast_pred_var(fast):
        with gpytorch.settings.skip_posterior_variances():
            mean = gp(x[n:]).mean
        mean_seconds = time.perf_counter() - start
        variance = gp(x[n:]).variance
    seconds = time.perf_counter() - start
    solver = gp.prediction_strategy.solver
    report = getattr(solver, "report", None)
    measured = {
        "network": widths,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "n": n,
        "way": type(solver).__name__.removesuffix("Solver"),
        "mean_seconds": mean_seconds,
        "seconds": seconds,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "residual": None if report is None else report.residual,
        "rmse": (mean - x[n:].sin().sum(-1)).square().mean().sqrt().item(),
        "mean_standard_deviation": variance.sqrt().mean().item(),
    }
    return measured | fast_variances(gp, x[n:], variance) if fast else measured


def fast_variances(gp: AdaptedGP, x: Tensor, variance: Tensor) -> dict:
    """What the fast variances say of themselves, and how much larger than exact ones they are at some test points."""
    report = gp.prediction_strategy.fast_variance.report
    checked = slice(0, CHECKED_POINTS)
    with torch.no_grad(), settings.solve_tolerance(1e-6):
        exact = gp(x[checked]).variance
    excess = variance[checked] / exact - 1
    return {
        "rank": report.rank,
        "reported_error": report.error,
        "tolerance": report.tolerance,
        "excess": [excess.min().item(), excess.max().item()],
    }


def measure(widths: str, n: int, fresh: bool = True) -> dict:
    """:func:`adapt` in a new process, so that the peak of its memory is its own.

    :param fresh: If False, in this one: the peak is that of all that went before.
    """
    if not fresh:
        return adapt(widths, n)
    out = subprocess.run([sys.executable, __file__, widths, str(n)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of a straight line through the logarithms of the larger half of the sizes."""
    tail = slice(len(sizes) // 2, None) if len(sizes) > 3 else slice(None)
    return float(np.polyfit(np.log(sizes[tail]), np.log(values[tail]), 1)[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("widths")
    parser.add_argument("n", type=int)
    parser.add_argument("--fast", action="store_true")
    arguments = parser.parse_args()
    adapt("5-8-8-1", 20)  # what is imported and compiled at a first call is not of this size
    print(json.dumps(adapt(arguments.widths, arguments.n, arguments.fast)))
