"""From one sinusoid to others: a trained network adapted to new tasks with ten points each.

A small network is trained on one sinusoid. For each of some others, of unrelated amplitude, frequency and phase, we see
ten points, and predict on [-7, 7] with a Gaussian process whose kernel is the network's neural tangent kernel (Maddox
et al., "Fast Adaptation with Linearized Neural Networks", AISTATS 2021), and with what one would use instead. This is
what the notebook 01_sine_transfer uses.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import gpytorch
import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import ConstantKernel, RBFKernel, ScaleKernel
from gpytorch.means import ConstantMean, ZeroMean
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from tqdm import tqdm

import ntk_gp
from ntk_gp import AdaptedGP, NetworkMean, NTKKernel

# ---- 1. The models: GPyTorch's ExactGP, with the network in it ----


class GP(gpytorch.models.ExactGP):
    """An ordinary GPyTorch model; with a mean and a kernel made from a network, that network adapted to (x, y).

    Noise and outputscales start in the scale of the data, under weak priors: `scale_to_data`, and its arguments.
    """

    def __init__(self, x: Tensor, y: Tensor, mean: gpytorch.means.Mean, kernel: gpytorch.kernels.Kernel, **scaling):
        super().__init__(
            x, y, gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive())
        )
        self.mean_module, self.covar_module = mean, kernel
        ntk_gp.priors.scale_to_data(self, **scaling)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def optimise(gp: gpytorch.models.ExactGP, steps: int = 150) -> gpytorch.models.ExactGP:
    """GPyTorch's usual training loop, for the hyperparameters. The network's weights are not among them."""
    gp.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimizer = torch.optim.Adam(gp.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -mll(gp(*gp.train_inputs), gp.train_targets)
        loss.backward()
        optimizer.step()
    return gp.eval()


# ---- 2. The tasks: sinusoids y = A sin(wx + b) + noise ----


class Task(NamedTuple):
    amplitude: float
    frequency: float
    phase: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.amplitude * torch.sin(self.frequency * x.squeeze(-1) + self.phase)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """n noisy observations on [-5, 5]."""
        x = 10 * torch.rand(n, 1) - 5
        return x, self(x) + 0.01 * self.amplitude * torch.randn(n)


def draw_task() -> Task:
    amplitude, frequency, phase = torch.rand(3).tolist()
    return Task(0.1 + 4.9 * amplitude, 0.5 + 1.5 * frequency, 2 * math.pi * phase)


# ---- 3. The network, and the usual ways to adapt it ----


def make_network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1), nn.Flatten(0))


def train(network: nn.Module, x: Tensor, y: Tensor, steps: int, layers: nn.Module | None = None) -> nn.Module:
    """Least squares by Adam; `layers` are those to train (default: all)."""
    optimizer = torch.optim.Adam((layers or network).parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network


def fine_tune(network: nn.Module, x: Tensor, y: Tensor, last_layer_only: bool, steps: int = 300) -> nn.Module:
    network = copy.deepcopy(network)
    return train(network, x, y, steps, layers=network[-2] if last_layer_only else None)


@torch.no_grad()
def predict(gp: gpytorch.models.ExactGP, x: Tensor) -> Normal:
    """Of observations, at the present hyperparameters."""
    observed = gp.likelihood(gp(x))
    return Normal(observed.mean, observed.stddev)


def mse(prediction: Distribution, y: Tensor) -> float:
    return (prediction.mean - y).square().mean().item()


def nlpd(prediction: Distribution, y: Tensor) -> float:
    """Mean negative log predictive density: lower is better; an error far outside its error bar costs dearly."""
    return -prediction.log_prob(y).mean().item()


def predict_fine_tuned(
    network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor, last_layer_only: bool, folds: int = 5, steps: int = 300
) -> Normal:
    """Fine-tunes on (x, y). A network has no error bars of its own: it gets one variance, from cross-validation.

    (The residuals on the points it was fitted to would say nearly zero.)
    """
    errors = torch.empty_like(y)
    for fold in range(folds):
        held_out = torch.arange(len(y)) % folds == fold
        tuned = fine_tune(network, x[~held_out], y[~held_out], last_layer_only, steps)
        errors[held_out] = (tuned(x[held_out]) - y[held_out]).detach()
    mean = fine_tune(network, x, y, last_layer_only, steps)(x_new).detach()
    return Normal(mean, errors.square().mean().sqrt())


# ---- 4. The experiment ----


class Adaptation(NamedTuple):
    """One task, what was seen of it, and what each method made of that."""

    task: Task
    x: Tensor
    y: Tensor
    predictions: dict[str, tuple[Distribution, float]]  # and the seconds they took
    evidence: ntk_gp.averaging.Comparison  # of the adapted network and an RBF kernel from scratch


RECIPE = "AdaptedGP (the recipe)"


def adapt(
    network: nn.Module, task: Task, x: Tensor, y: Tensor, x_new: Tensor, draws: int = 32, effort: float = 1.0
) -> Adaptation:
    """Every method's prediction at x_new from the observations (x, y); averages are over so many draws.

    :param effort: A part of the steps of fine-tuning and of fitting hyperparameters.
    """
    tuning, fitting = round(300 * effort), round(150 * effort)

    def unadapted():
        return Normal(network(x_new).detach(), (network(x) - y).detach().square().mean().sqrt())

    def gp(mean, kernel):
        return predict(optimise(GP(x, y, mean, kernel), fitting), x_new)

    recipe = AdaptedGP(x, y, network)
    scratch = GP(x, y, ZeroMean(), ScaleKernel(RBFKernel()) + ConstantKernel())
    averages = {}

    def averaged(model):
        averages[model] = model.averaged(draws) if model is recipe else ntk_gp.averaged(model, draws, seed=0)
        return averages[model].predict(x_new)

    methods: dict[str, Callable[[], Distribution]] = {
        "network, unadapted": unadapted,
        "fine-tuning, all layers": lambda: predict_fine_tuned(network, x, y, x_new, False, steps=tuning),
        "fine-tuning, last layer": lambda: predict_fine_tuned(network, x, y, x_new, True, steps=tuning),
        "NTK-GP, network mean": lambda: gp(NetworkMean(network), ScaleKernel(NTKKernel(network))),
        "NTK-GP, constant mean": lambda: gp(ConstantMean(), ScaleKernel(NTKKernel(network))),
        "NTK-GP, constant mean, averaged": lambda: averaged(GP(x, y, ConstantMean(), ScaleKernel(NTKKernel(network)))),
        "NTK + RBF, constant mean": lambda: gp(
            ConstantMean(), ScaleKernel(NTKKernel(network)) + ScaleKernel(RBFKernel())
        ),
        RECIPE: lambda: averaged(recipe.fit()),
        "RBF from scratch": lambda: gp(ConstantMean(), ScaleKernel(RBFKernel())),
        "RBF from scratch, averaged": lambda: averaged(scratch),
    }
    predictions = {}
    for name, method in methods.items():
        start = time.perf_counter()
        predictions[name] = (method(), time.perf_counter() - start)
    evidence = ntk_gp.compare({"AdaptedGP": averages[recipe], "RBF from scratch": averages[scratch]})
    return Adaptation(task, x, y, predictions, evidence)


GRID = torch.linspace(-7, 7, 281, dtype=torch.float64).unsqueeze(-1)


def run(
    seed: int = 0, num_tasks: int = 4, num_points: int = 10, steps: int = 2000, draws: int = 32, effort: float = 1.0
) -> tuple[Task, nn.Module, list[Adaptation]]:
    """Trains a network on one task and adapts it to others. Returns the task, the network and the adaptations."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    source = draw_task()
    network = train(make_network(), *source.sample(1000), steps)
    adaptations = []
    for _ in tqdm(range(num_tasks), desc="tasks", disable=None):
        task = draw_task()
        adaptations.append(adapt(network, task, *task.sample(num_points), GRID, draws, effort))
    return source, network, adaptations


def table(adaptation: Adaptation) -> str:
    task = adaptation.task
    truth = task(GRID)
    lines = [
        f"y = {task.amplitude:.2f} sin({task.frequency:.2f} x + {task.phase:.2f})",
        f"  {'on [-7, 7]':32}{'MSE':>10}{'NLPD':>10}{'seconds':>10}",
    ]
    for name, (prediction, seconds) in adaptation.predictions.items():
        lines.append(f"  {name:32}{mse(prediction, truth):10.4f}{nlpd(prediction, truth):10.2f}{seconds:10.2f}")
    return "\n".join(lines)


def figure(source: Task, network: nn.Module, adaptations: list[Adaptation], method: str = RECIPE):
    """A panel per task: the truth, the ten points, the network, fine-tuning, and the posterior with its 95 % band."""
    rows = math.ceil(len(adaptations) / 2)
    fig, axes = plt.subplots(rows, 2, figsize=(10, 3 * rows), sharex=True, squeeze=False, layout="constrained")
    x = GRID.squeeze(-1)
    for axis, adaptation in zip(axes.flat, adaptations, strict=False):
        truth = adaptation.task(GRID)
        posterior = adaptation.predictions[method][0]
        tuned = adaptation.predictions["fine-tuning, all layers"][0]
        low, high = (posterior.icdf(torch.tensor(probability)) for probability in (0.025, 0.975))
        axis.axvspan(-5, 5, color="0.96", zorder=0)
        axis.fill_between(x, low, high, color="C0", alpha=0.2, lw=0, label="95 %")
        axis.plot(x, network(GRID).detach(), color="0.6", lw=1, label="network, as trained")
        axis.plot(x, tuned.mean, color="C1", lw=1.2, ls="--", label="network, fine-tuned")
        axis.plot(x, truth, color="black", lw=1.2, ls=":", label="truth")
        axis.plot(x, posterior.mean, color="C0", lw=2, label=method)
        axis.plot(adaptation.x.squeeze(-1), adaptation.y, "ko", ms=5, label="the ten points")
        reach = 2.2 * float(truth.abs().max())
        axis.set(ylim=(-reach, reach), xlim=(-7, 7))
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    fig.suptitle(
        f"Trained on y = {source.amplitude:.1f} sin({source.frequency:.2f} x + {source.phase:.1f}), "
        "adapted to other tasks with ten points each"
    )
    return fig
