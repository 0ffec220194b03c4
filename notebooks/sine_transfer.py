"""From one sinusoid to others: a trained network adapted to new tasks with ten points each.

A small network is trained on one sinusoid. For each of four others, of unrelated amplitude, frequency and phase, we see
ten points, and predict on [-7, 7] with a Gaussian process whose kernel is the network's neural tangent kernel (Maddox
et al., "Fast Adaptation with Linearized Neural Networks", AISTATS 2021). Run it with `make demo`; it prints a table
per task and writes a figure.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import gpytorch
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ntk_gp import NetworkMean, NTKKernel

# ---- 1. The model: GPyTorch's ExactGP, with the network in it ----


class AdaptedGP(gpytorch.models.ExactGP):
    """An ordinary GPyTorch model; with a mean and a kernel made from a network, that network adapted to (x, y)."""

    def __init__(self, x, y, mean, kernel):
        super().__init__(
            x, y, gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive())
        )
        self.mean_module = mean
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def make_gp(
    x: Tensor,
    y: Tensor,
    mean: gpytorch.means.Mean,
    *kernels: gpytorch.kernels.Kernel,
    noise_share: float = 0.01,
    prior_width: float = 2.0,
) -> AdaptedGP:
    """A GP whose kernel is a sum, each term with an outputscale, started from the data and under weak priors.

    A network's tangent kernel has a scale of its own: its diagonal is the squared norm of the gradient, in the hundreds
    for this network. So noise and outputscales start where, together, they are as large as what the mean leaves
    unexplained, the noise at `noise_share` of it. Log-normal priors around these values, `prior_width` e-folds wide,
    keep the fit sane.
    """
    with torch.no_grad():
        unexplained = (y - mean(x)).square().mean()
        signal = (1 - noise_share) * unexplained / len(kernels)
        scales = [signal / kernel(x, diag=True).mean() for kernel in kernels]
    terms = []
    for kernel, scale in zip(kernels, scales, strict=True):
        prior = gpytorch.priors.LogNormalPrior(scale.log(), prior_width)
        terms.append(gpytorch.kernels.ScaleKernel(kernel, outputscale_prior=prior))
        terms[-1].outputscale = scale
    gp = AdaptedGP(x, y, mean, sum(terms[1:], start=terms[0]))
    noise = noise_share * unexplained
    gp.likelihood.register_prior("noise_prior", gpytorch.priors.LogNormalPrior(noise.log(), prior_width), "noise")
    gp.likelihood.noise = noise
    return gp


def fit(gp: AdaptedGP, steps: int = 150) -> AdaptedGP:
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


class Prediction(NamedTuple):
    mean: Tensor  # (n,)
    variance: Tensor  # (n,), of an observation

    def mse(self, y: Tensor) -> float:
        return (self.mean - y).square().mean().item()

    def nlpd(self, y: Tensor) -> float:
        """Mean negative log predictive density: lower is better; an error far outside its error bar costs dearly."""
        return -torch.distributions.Normal(self.mean, self.variance.sqrt()).log_prob(y).mean().item()


@torch.no_grad()
def predict_gp(gp: AdaptedGP, x: Tensor) -> Prediction:
    observed = gp.likelihood(gp(x))
    return Prediction(observed.mean, observed.variance)


def predict_fine_tuned(
    network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor, last_layer_only: bool, folds: int = 5
) -> Prediction:
    """Fine-tunes on (x, y). A network has no error bars of its own: it gets one variance, from cross-validation.

    (The residuals on the points it was fitted to would say nearly zero.)
    """
    errors = torch.empty_like(y)
    for fold in range(folds):
        held_out = torch.arange(len(y)) % folds == fold
        tuned = fine_tune(network, x[~held_out], y[~held_out], last_layer_only)
        errors[held_out] = (tuned(x[held_out]) - y[held_out]).detach()
    mean = fine_tune(network, x, y, last_layer_only)(x_new).detach()
    return Prediction(mean, errors.square().mean().expand_as(mean))


# ---- 4. The experiment ----


def adapt(network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor) -> dict[str, tuple[Prediction, float]]:
    """Every method's prediction at x_new from the observations (x, y), and the seconds it took."""

    def unadapted():
        mean = network(x_new).detach()
        return Prediction(mean, (network(x) - y).detach().square().mean().expand_as(mean))

    def gp(mean, *kernels):
        return predict_gp(fit(make_gp(x, y, mean, *kernels)), x_new)

    methods = {
        "network, unadapted": unadapted,
        "fine-tuning, all layers": lambda: predict_fine_tuned(network, x, y, x_new, last_layer_only=False),
        "fine-tuning, last layer": lambda: predict_fine_tuned(network, x, y, x_new, last_layer_only=True),
        "GP from scratch (RBF)": lambda: gp(gpytorch.means.ConstantMean(), gpytorch.kernels.RBFKernel()),
        "NTK-GP, network mean": lambda: gp(NetworkMean(network), NTKKernel(network)),
        "NTK-GP, constant mean": lambda: gp(gpytorch.means.ConstantMean(), NTKKernel(network)),
        "NTK + RBF, constant mean": lambda: gp(
            gpytorch.means.ConstantMean(), NTKKernel(network), gpytorch.kernels.RBFKernel()
        ),
    }
    results = {}
    for name, method in methods.items():
        start = time.perf_counter()
        results[name] = (method(), time.perf_counter() - start)
    return results


class Adaptation(NamedTuple):
    """One task, what was seen of it, and what each method made of that."""

    task: Task
    x: Tensor
    y: Tensor
    predictions: dict[str, tuple[Prediction, float]]


GRID = torch.linspace(-7, 7, 281, dtype=torch.float64).unsqueeze(-1)


def run(
    seed: int = 0, num_tasks: int = 4, num_points: int = 10, steps: int = 2000
) -> tuple[Task, nn.Module, list[Adaptation]]:
    """Trains a network on one task and adapts it to others. Returns the task, the network and the adaptations."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    source = draw_task()
    network = train(make_network(), *source.sample(1000), steps)
    adaptations = []
    for _ in tqdm(range(num_tasks), desc="tasks", disable=None):
        task = draw_task()
        x, y = task.sample(num_points)
        adaptations.append(Adaptation(task, x, y, adapt(network, x, y, GRID)))
    return source, network, adaptations


def table(adaptation: Adaptation) -> str:
    task = adaptation.task
    truth = task(GRID)
    lines = [
        f"y = {task.amplitude:.2f} sin({task.frequency:.2f} x + {task.phase:.2f})",
        f"  {'on [-7, 7]':26}{'MSE':>10}{'NLPD':>10}{'seconds':>10}",
    ]
    for name, (prediction, seconds) in adaptation.predictions.items():
        lines.append(f"  {name:26}{prediction.mse(truth):10.4f}{prediction.nlpd(truth):10.2f}{seconds:10.2f}")
    return "\n".join(lines)


def figure(source: Task, network: nn.Module, adaptations: list[Adaptation], method: str = "NTK-GP, constant mean"):
    """A panel per task: the truth, the ten points, the network, fine-tuning, and the posterior with its 95 % band."""
    rows = math.ceil(len(adaptations) / 2)
    fig, axes = plt.subplots(rows, 2, figsize=(10, 3 * rows), sharex=True, squeeze=False, layout="constrained")
    x = GRID.squeeze(-1)
    for axis, adaptation in zip(axes.flat, adaptations, strict=False):
        truth = adaptation.task(GRID)
        posterior = adaptation.predictions[method][0]
        tuned = adaptation.predictions["fine-tuning, all layers"][0]
        band = 1.96 * posterior.variance.sqrt()
        axis.axvspan(-5, 5, color="0.96", zorder=0)
        axis.fill_between(x, posterior.mean - band, posterior.mean + band, color="C0", alpha=0.2, lw=0, label="95 %")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="which network and tasks to draw (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=4, help="how many tasks to adapt to (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/sine_transfer.png"), help="default: %(default)s")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # tensors this small lose more to threads than they gain
    start = time.perf_counter()
    source, network, adaptations = run(arguments.seed, arguments.tasks)
    for adaptation in adaptations:
        print(table(adaptation), end="\n\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure(source, network, adaptations).savefig(arguments.output, dpi=150)
    print(f"{arguments.output} written; {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
