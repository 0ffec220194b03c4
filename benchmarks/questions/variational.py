"""What does a step of a variational model cost with learned inducing points, over fixed ones?"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel

from .. import problems, report

NETWORK, POINTS, BATCH, WARM = "5-50-50-1", 4096, 256, 15


class SparseGP(gpytorch.models.ApproximateGP):
    def __init__(self, network: nn.Module, inducing_points: Tensor, learned: bool):
        distribution = CholeskyVariationalDistribution(len(inducing_points))
        super().__init__(VariationalStrategy(self, inducing_points, distribution, learn_inducing_locations=learned))
        self.mean_module = NetworkMean(network)
        self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network, normalize=True))

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--inducing", type=int, nargs="+", help="numbers of inducing points (default: 20 and 50)")


def run(arguments: argparse.Namespace) -> None:
    """Both in turns, in this process: CPU seconds of one thread, medians."""
    torch.set_num_threads(1)
    steps = 5 if arguments.quick else 40
    rows = [_row(count, steps) for count in arguments.inducing or [20, 50]]
    lines = [
        [str(row["inducing"]), report.duration(row["fixed"]), report.duration(row["learned"]), f"{row['ratio']:.2f}×"]
        for row in rows
    ]
    table = report.markdown_table(["inducing points", "fixed", "learned", "of fixed"], lines)
    title = f"# A step of a variational model, network {NETWORK}, minibatches of {BATCH}"
    report.write(arguments.output, "variational", {"rows": rows}, f"{title}\n\n{report.machine_line()}\n\n{table}")


def _row(count: int, steps: int) -> dict:
    ways = [_stepper(count, learned) for learned in (False, True)]
    for _ in range(WARM):
        for step in ways:
            step()
    seconds: list[list[float]] = [[], []]
    for _ in range(steps):
        for step, taken in zip(ways, seconds, strict=True):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    fixed, learned = map(statistics.median, seconds)
    return {"inducing": count, "fixed": fixed, "learned": learned, "ratio": learned / fixed}


def _stepper(count: int, learned: bool) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(POINTS, 5, generator=generator)
    y = x.sin().sum(-1)
    model, likelihood = (
        SparseGP(problems.trained(NETWORK), x[:count], learned),
        gpytorch.likelihoods.GaussianLikelihood(),
    )
    elbo = gpytorch.mlls.VariationalELBO(likelihood, model, len(x))
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=1e-2)

    def step() -> None:
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        (-elbo(model(x[rows]), y[rows])).backward()
        optimizer.step()

    return step
