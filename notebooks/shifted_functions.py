"""Bayesian optimisation of a function whose relatives are known: a network trained on one, adapted to another.

Standard functions, each in versions that differ in where the optimum lies, how wide it is, and in level and scale of
the values. A network is trained on many evaluations of one version; another is then to be maximised from a few. This is
what the notebook 09_bayesian_optimisation uses.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.optim import optimize_acqf
from botorch.test_functions import Ackley, Branin, Hartmann
from botorch.test_functions.base import BaseTestProblem
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from tqdm import tqdm

from ntk_gp import AdaptedGP, draw_functions

# ---- 1. The functions: all to be maximised on the unit cube ----


class Standard(NamedTuple):
    """:ivar function: To be minimised, and defined well beyond the box, for a shifted one sees what lies there.
    :ivar box: (low, high) of each input: the unit cube."""

    function: BaseTestProblem
    box: list[tuple[float, float]]


FUNCTIONS = {
    "Branin, 2": Standard(Branin(bounds=[(-20.0, 30.0)] * 2), [(-5.0, 10.0), (0.0, 15.0)]),
    "Ackley, 4": Standard(Ackley(4, bounds=[(-20.0, 20.0)] * 4), [(-5.0, 5.0)] * 4),
    "Hartmann, 6": Standard(Hartmann(6, bounds=[(-1.0, 2.0)] * 6), [(0.0, 1.0)] * 6),
}


class Version:
    """a (g(z* + r (x - x*)) - mean) / deviation + b: a standard function g with its optimum z* moved to x*.

    x* - z* is uniform in ±0.15 in each coordinate (and x* at least 0.05 from the faces), log r in ±0.2 for each
    coordinate, log a in ±0.7, and b standard normal; mean and deviation are those of g over the cube.
    """

    def __init__(self, name: str):
        self.standard, box = FUNCTIONS[name]
        self.dimension = len(box)
        self.low, high = torch.tensor(box).double().mT
        self.width = high - self.low
        self.centre = (torch.as_tensor(self.standard.optimizers[0]).double() - self.low) / self.width
        values = self._values(SobolEngine(self.dimension, scramble=True, seed=0).draw(4096, dtype=torch.float64))
        self.mean, self.deviation = values.mean(), values.std()
        self.optimum = (self.centre + 0.3 * torch.rand(self.dimension) - 0.15).clamp(0.05, 0.95)
        self.stretch = (0.4 * torch.rand(self.dimension) - 0.2).exp()
        self.scale, self.level = (1.4 * torch.rand(()) - 0.7).exp(), torch.randn(())
        self.best = self(self.optimum.unsqueeze(0)).item()

    def _values(self, z: Tensor) -> Tensor:
        return -self.standard.evaluate_true(self.low + self.width * z).double()

    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) to (n,)."""
        values = self._values(self.centre + self.stretch * (x - self.optimum))
        return self.scale * (values - self.mean) / self.deviation + self.level

    def regret(self, values: Tensor) -> Tensor:
        """How far below the optimum, in standard deviations of the function over the cube."""
        return ((self.best - values) / self.scale).clamp(min=0.0)


class Unrelated:
    """A draw from a Gaussian process with an RBF kernel of lengthscale 0.3 √d, by 500 random features."""

    def __init__(self, dimension: int):
        self.dimension = dimension
        self.frequencies = torch.randn(dimension, 500) / (0.3 * math.sqrt(dimension))
        self.phases, self.weights = 2 * math.pi * torch.rand(500), torch.randn(500)

    def __call__(self, x: Tensor) -> Tensor:
        return math.sqrt(2 / 500) * (x @ self.frequencies + self.phases).cos() @ self.weights


# ---- 2. The network ----


def train_network(source: Version | Unrelated, steps: int, points: int = 2000) -> nn.Module:
    """Least squares on evaluations of the source at random points, by Adam in float32."""
    x = torch.rand(points, source.dimension)
    x, y = x.float(), source(x).float()
    layers = [nn.Linear(source.dimension, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1)]
    network = nn.Sequential(*layers, nn.Flatten(0)).float()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(points, (256,))
        optimizer.zero_grad()
        (network(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.double()


# ---- 3. One more point to evaluate ----


def maximise(acquisition: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Where a function (b, 1, d) to (b,) is largest in the cube, (1, d): L-BFGS from the two best of 512 points.

    Half of these are spread over the cube, half lie around the best point so far, at distances of 1e-3 to 0.3.
    """
    d = x.shape[-1]
    distances = 10 ** (2.5 * torch.rand(256, 1) - 3)
    around = (x[y.argmax()] + distances * torch.randn(256, d)).clamp(0.0, 1.0)
    starts = torch.cat([torch.rand(256, d), around]).unsqueeze(-2)
    with torch.no_grad():
        starts = starts[acquisition(starts).topk(2).indices]
    bounds = torch.stack([torch.zeros(d), torch.ones(d)])
    return optimize_acqf(
        acquisition, bounds, q=1, num_restarts=2, batch_initial_conditions=starts, options={"maxiter": 4}
    )[0]


def expected_improvement(model, x: Tensor, y: Tensor) -> Tensor:
    return maximise(LogExpectedImprovement(model, best_f=y.max()), x, y)


def thompson(model: AdaptedGP, x: Tensor, y: Tensor) -> Tensor:
    """The maximum of a function drawn from the posterior, which is a weight vector and can be followed anywhere."""
    drawn = draw_functions(model, 1)
    return maximise(lambda z: drawn(z)[0].squeeze(-1), x, y)


def adapted(network: nn.Module, x: Tensor, y: Tensor, before: AdaptedGP | None, **options) -> AdaptedGP:
    """Hyperparameters are found anew after each of the first points, and then after every fourth."""
    if before is None or len(y) < 8 or len(y) % 4 == 0:
        return AdaptedGP(x, y, network, **options).fit()
    before.set_train_data(x, y, strict=False)
    return before


def single_task(network: nn.Module, x: Tensor, y: Tensor, before: SingleTaskGP | None) -> SingleTaskGP:
    """BoTorch's own default: an RBF kernel with a lengthscale for each input, its priors, standardised outcomes.

    It is fitted after every point; of the network it knows nothing.
    """
    model = SingleTaskGP(x, y.unsqueeze(-1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


class Method(NamedTuple):
    """:ivar make: A model of network, inputs and values.
    :ivar propose: The next input from model, inputs and values.
    :ivar begins_at_source: The first input is the network's optimum instead of a random one.
    """

    make: Callable
    propose: Callable
    begins_at_source: bool = False


RECIPE = "AdaptedGP, LogEI"
PLAIN = "SingleTaskGP, LogEI"
THOMPSON = "gain + NTK, Thompson"
METHODS = {
    RECIPE: Method(adapted, expected_improvement),
    THOMPSON: Method(partial(adapted, terms=("gain", "tangent")), thompson),
    "NTK alone, LogEI": Method(partial(adapted, terms="tangent"), expected_improvement),
    "gain + Matérn, LogEI": Method(partial(adapted, terms=("gain", "inputs")), expected_improvement),
    PLAIN: Method(single_task, expected_improvement),
    "SingleTaskGP, begun at source's": Method(single_task, expected_improvement, begins_at_source=True),
}
RANDOM, SOURCE = "random search", "source's optimum, evaluated"

# ---- 4. The experiment ----

FIRST = 3  # random inputs that every method begins with
FOUND = 1e-2  # a run ends where the regret is below


class Run(NamedTuple):
    """:ivar regret: The simple regret after 1, 2, ... evaluations.
    :ivar seconds: Of one core, for each proposal, the model's fit included.
    """

    regret: Tensor
    seconds: list[float]


def optimise(task: Version, network: nn.Module, method: Method, first: Tensor, evaluations: int) -> Run:
    x = first.clone()
    if method.begins_at_source:
        x[0] = optimum_of(network, first.shape[-1])
    y, seconds, model = task(x), [], None
    while len(y) < evaluations and task.regret(y).min() > FOUND:
        start = time.process_time()
        model = method.make(network, x, y, model)
        new = method.propose(model, x, y)
        seconds.append(time.process_time() - start)
        x, y = torch.cat([x, new]), torch.cat([y, task(new)])
    return Run(best_so_far(task.regret(y), evaluations), seconds)


def best_so_far(regret: Tensor, evaluations: int) -> Tensor:
    return nn.functional.pad(regret.cummin(0).values, (0, evaluations - len(regret)), value=float(regret.min()))


def optimum_of(network: nn.Module, dimension: int) -> Tensor:
    """Where the network is largest, (d,)."""
    x = torch.rand(4096, dimension)
    with torch.no_grad():
        y = network(x)
    for _ in range(4):  # of 8 steps each
        x = torch.cat([x, maximise(lambda z: network(z.squeeze(-2)), x, y)])
        y = network(x).detach()
    return x[y.argmax()]


def runs_of(seed: int, name: str, labels: list[str], evaluations: int, steps: int, related: bool) -> dict[str, Run]:
    """Every method's run, on a task, first inputs and a network that are drawn for this seed."""
    torch.manual_seed(seed)
    task, first = Version(name), torch.rand(evaluations, len(FUNCTIONS[name].box))
    network = train_network(Version(name) if related else Unrelated(task.dimension), steps)
    there = optimum_of(network, task.dimension).unsqueeze(0)
    runs = {
        label: Run(best_so_far(task.regret(task(x)), evaluations), [])
        for label, x in ((SOURCE, there), (RANDOM, first))
    }
    for label in labels:
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runs[label] = optimise(task, network, METHODS[label], first[:FIRST], evaluations)
    return runs


def set_up() -> None:
    """Of each process."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # tensors this small lose more to threads than they gain


def experiment(
    name: str, labels: list[str], seeds: range, evaluations: int, steps: int, related: bool = True
) -> dict[str, list[Run]]:
    """The runs of all seeds, as many at once as there are processors."""
    run = partial(runs_of, name=name, labels=labels, evaluations=evaluations, steps=steps, related=related)
    count = min(len(seeds), os.cpu_count() or 1)
    with ProcessPoolExecutor(count, get_context("spawn"), set_up) if count > 1 else nullcontext() as processes:
        each = processes.map(run, seeds) if processes else map(run, seeds)
        every = list(tqdm(each, name, len(seeds), mininterval=60))
    return {label: [runs[label] for runs in every] for label in every[0]}


# ---- 5. What came of it ----


def mean_and_error(runs: list[Run]) -> tuple[Tensor, Tensor]:
    """Of the regret after each number of evaluations, over seeds."""
    regret = torch.stack([run.regret for run in runs])
    return regret.mean(0), regret.std(0, correction=min(1, len(runs) - 1)) / math.sqrt(len(runs))


def table(name: str, runs: dict[str, list[Run]], at: list[int]) -> str:
    count = len(next(iter(runs.values())))
    title = f"{name}: simple regret, mean over {count} seeds ± s.e."
    lines = [f"{title:62}" + "".join(f"{f'n = {n}':>16}" for n in at) + "   s a step"]
    for label, some in runs.items():
        mean, error = mean_and_error(some)
        cells = "".join(f"{f'{mean[n - 1]:.3f} ± {error[n - 1]:.3f}':>16}" for n in at)
        seconds = [second for run in some for second in run.seconds]
        lines.append(f"  {label:60}{cells}" + (f"{sum(seconds) / len(seconds):11.2f}" if seconds else ""))
    return "\n".join(lines)


def won_and_lost(results: dict[str, dict[str, list[Run]]], one: str, other: str, at: int) -> tuple[int, int]:
    """In how many of all runs `one` has found what `other` has not surpassed, and the other way round."""
    pairs = [
        (max(a.regret[at - 1].item(), FOUND), max(b.regret[at - 1].item(), FOUND))
        for runs in results.values()
        for a, b in zip(runs[one], runs[other], strict=True)
    ]
    return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)


COLORS = {
    RECIPE: "C3", THOMPSON: "C1", "NTK alone, LogEI": "C4", "gain + Matérn, LogEI": "C2", PLAIN: "C0",
    "SingleTaskGP, begun at source's": "C9", RANDOM: "0.6", SOURCE: "0.2",
}  # fmt: skip


def figure(results: dict[str, dict[str, list[Run]]]):
    """A panel for each function: mean regret against evaluations, with a band of one standard error."""
    fig, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.8), squeeze=False, layout="constrained")
    for axis, (name, runs) in zip(axes.flat, results.items(), strict=True):
        for label, some in runs.items():
            mean, error = mean_and_error(some)
            n = torch.arange(1, len(mean) + 1)
            style = "--" if label in (RANDOM, SOURCE) else "-"
            axis.plot(n, mean.clamp(min=FOUND), color=COLORS[label], ls=style, lw=1.6, label=label)
            low, high = (mean - error).clamp(min=FOUND), (mean + error).clamp(min=FOUND)
            axis.fill_between(n, low, high, color=COLORS[label], alpha=0.15, lw=0)
        axis.set(yscale="log", title=name, xlabel="evaluations", xlim=(1, len(mean)))
    axes[0, 0].set_ylabel("simple regret")
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return fig
