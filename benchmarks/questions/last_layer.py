"""What do a step of fitting and first predictions cost in the last layer alone, beside Bayesian linear regression?"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import gpytorch
import torch
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel

from .. import report

NOISE, SCALE = 0.05, 0.7
STEPS = ("fit", "mean", "variance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of training inputs (default: 1000 3000)")
    parser.add_argument("--widths", type=int, nargs="+", help="features (default: 200 500)")


def run(arguments: argparse.Namespace) -> None:
    """In turns, in one process, at new inputs each time; the network was tried before."""
    rows = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.float64):
            for n in arguments.sizes or ([100] if arguments.quick else [1000, 3000]):
                for width in arguments.widths or ([20] if arguments.quick else [200, 500]):
                    row = {"n": n, "width": width, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
                    rows.append(row | _measured(n, width, dtype, arguments.repeats))
                    report.write(arguments.output, "last_layer", {"rows": rows}, _markdown(rows))


def _measured(n: int, width: int, dtype: torch.dtype, repeats: int) -> dict:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    network = network.to(dtype)
    x, x_test, y = torch.randn(n, 8, dtype=dtype), torch.randn(n, 8, dtype=dtype), torch.randn(n, dtype=dtype)
    model = _LastLayerGP(x, y, network)
    ours, regression = [], []
    for turn in range(repeats + 1):
        here, there = x + 1e-3 * turn, x_test + 1e-3 * turn
        ours.append(_of_model(model, here, y, there))
        regression.append(_of_regression(network, here, y, there))
    (_, mean, variance), (_, expected, expected_variance) = ours[-1], regression[-1]
    error = max(float((mean - expected).abs().max()), float((variance / expected_variance - 1).abs().max()))
    seconds = {
        name: [statistics.median(turn[0][step] for turn in turns[1:]) for step in range(3)]
        for name, turns in (("ours", ours), ("regression", regression))
    }
    return seconds | {"error": error}


class _LastLayerGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = NetworkMean(network)
        self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network, parameters="last_layer"))
        self.to(x.dtype)
        self.likelihood.noise, self.covar_module.outputscale = NOISE, SCALE

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


class _Clock:
    """Takes down how long each step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, step: Callable[[], Tensor]) -> Tensor:
        start = time.perf_counter()
        result = step()
        self.seconds.append(time.perf_counter() - start)
        return result


def _of_model(model: _LastLayerGP, x: Tensor, y: Tensor, x_test: Tensor) -> tuple[list[float], Tensor, Tensor]:
    """Seconds, mean and variance."""
    model.set_train_data(x, y, strict=False)
    model.train().zero_grad()
    mll, clock = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model), _Clock()

    def fit() -> Tensor:
        loss = -mll(model(x), y)
        loss.backward()
        return loss

    clock(fit)
    model.eval()
    with torch.no_grad():
        predictions = []

        def mean() -> Tensor:
            predictions.append(model(x_test))
            return predictions[0].mean

        return clock.seconds, clock(mean), clock(lambda: predictions[0].variance)


def _of_regression(network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor) -> tuple[list[float], Tensor, Tensor]:
    """The same written out: features once, and a P×P Cholesky factor in float64."""
    noise, scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (NOISE, SCALE))
    clock, known = _Clock(), {}

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            phi = network[:-1](x)
            value = network[-1](phi).squeeze(-1).double()
            return torch.cat([phi.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=-1), value

    def fit() -> Tensor:
        phi, value = features(x)
        residual = y.double() - value
        moment, projected = phi.mT @ phi, phi.mT @ residual
        precision = torch.eye(len(moment), dtype=torch.float64) + moment * (scale / noise)
        factor = torch.linalg.cholesky(precision)
        right = projected * (scale.sqrt() / noise)
        weights = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
        logdet = 2 * factor.diagonal().log().sum() + len(x) * noise.log()
        loss = (residual @ residual / noise - right @ weights + logdet) / (2 * len(x))
        loss.backward()
        known.update(factor=factor.detach(), weights=(weights * scale.sqrt()).detach())
        return loss

    def mean() -> Tensor:
        known["test"], value = features(x_test)
        return (value + known["test"] @ known["weights"]).to(x.dtype)

    def variance() -> Tensor:
        whitened = torch.linalg.solve_triangular(known["factor"], known["test"].mT, upper=False)
        return (whitened.square().sum(0) * SCALE).to(x.dtype)

    clock(fit)
    prediction = clock(mean)
    return clock.seconds, prediction, clock(variance)


def _markdown(rows: list[dict]) -> str:
    header = ["n", "width", "dtype", "threads", *(f"{step}, ours / regression" for step in STEPS), "all", "error"]
    lines = []
    for row in rows:
        pairs = list(zip(row["ours"], row["regression"], strict=True))
        cells = [f"{report.duration(one)} / {report.duration(other)}" for one, other in pairs]
        ratio = sum(row["ours"]) / sum(row["regression"])
        where = [f"{row['n']:,}", str(row["width"]), row["dtype"], str(row["threads"])]
        lines.append([*where, *cells, f"{ratio:.2f}", f"{row['error']:.1e}"])
    legend = (
        "One step of fitting noise and scale, then the mean, then the variance at n new inputs, of an MLP with two "
        "hidden layers; in turns with Bayesian linear regression on its features in plain torch, which has the "
        "network's value from the same pass. New inputs each time."
    )
    return "\n\n".join(["# The last layer alone", report.machine_line(), legend, report.markdown_table(header, lines)])
