"""From one task to related ones: a trained network adapted in closed form, beside what one would do instead.

A small network is trained on a function of five inputs. Related functions, of other coefficients, another phase and an
offset, are then learned from ten or twenty points each, by the ready model of this package and by its rivals. A second
experiment, with one input, is there to be looked at. Run it with `make demo`; it prints a table for each and writes a
figure.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import gpytorch
import matplotlib.pyplot as plt
import torch
from gpytorch.kernels import ConstantKernel, RBFKernel, ScaleKernel
from sine_transfer import predict_fine_tuned, train
from torch import Tensor, nn
from tqdm import tqdm

import ntk_gp
from ntk_gp import AdaptedGP, GainKernel, NetworkMean, NTKKernel

# ---- 1. The tasks ----


class Related:
    """10 c₁ sin(π x₁x₂ + φ) + 20 c₂ (x₃ − ½)² + 10 c₃ x₄ + 5 c₄ x₅ + b on the unit cube, after Friedman (1991).

    The source has c = 1, φ = b = 0. The targets' coefficients are its own times ½ to 2, their phases ±½, their offsets
    ±5. Noise has the standard deviation 1, that of the source's values is about 5.
    """

    dimension = 5
    noise = 1.0

    def __init__(self, is_source: bool = False):
        self.coefficients = torch.ones(4) if is_source else 2 ** (2 * torch.rand(4) - 1)
        self.phase, self.offset = (0.0, 0.0) if is_source else (torch.rand(1) - 0.5, 10 * torch.rand(1) - 5)

    def __call__(self, x: Tensor) -> Tensor:
        c = self.coefficients
        wave = 10 * c[0] * torch.sin(math.pi * x[:, 0] * x[:, 1] + self.phase)
        return wave + 20 * c[1] * (x[:, 2] - 0.5) ** 2 + 10 * c[2] * x[:, 3] + 5 * c[3] * x[:, 4] + self.offset

    def inputs(self, n: int) -> Tensor:
        return torch.rand(n, self.dimension)


class Sinusoid:
    """A sin(ωx + φ): the targets' amplitudes are the source's times ½ to 2, their phases its own ±½.

    An unrelated one has a frequency of its own. The source is known on [-7.5, 7.5], targets on [-5, 5].
    """

    dimension = 1
    noise = 0.05

    def __init__(self, is_source: bool = False, is_related: bool = True):
        scale, shift = (0.0, 0.0) if is_source else (2 * torch.rand(1) - 1, torch.rand(1) - 0.5)
        self.amplitude, self.frequency, self.phase = 2.0**scale, 1.2 if is_related else 2.6, shift
        self.reach = 7.5 if is_source else 5.0

    def __call__(self, x: Tensor) -> Tensor:
        return (self.amplitude * torch.sin(self.frequency * x + self.phase)).squeeze(-1)

    def inputs(self, n: int) -> Tensor:
        return self.reach * (2 * torch.rand(n, 1) - 1)


def observe(task: Related | Sinusoid, n: int) -> tuple[Tensor, Tensor]:
    x = task.inputs(n)
    return x, task(x) + task.noise * torch.randn(n)


# ---- 2. The network ----


def make_network(dimension: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dimension, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1), nn.Flatten(0)
    )


# ---- 3. What one would do: each takes the network and the labels, and returns a density for each new point ----


def unadapted(network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor) -> torch.distributions.Normal:
    """With the root mean square residual at the labels for an error bar."""
    residual = (network(x) - y).detach()
    return torch.distributions.Normal(network(x_new).detach(), residual.square().mean().sqrt())


def fine_tuned(
    network: nn.Sequential, x: Tensor, y: Tensor, x_new: Tensor, last_layer_only: bool = False
) -> torch.distributions.Normal:
    """By Adam from the trained weights. It passes through its labels: the error bar is that of five-fold validation."""

    return predict_fine_tuned(network, x, y, x_new, last_layer_only, steps=200)


class GP(gpytorch.models.ExactGP):
    """An ordinary model of GPyTorch's, for the rivals; its scales under priors like the ready model's."""

    def __init__(self, x: Tensor, y: Tensor, mean: gpytorch.means.Mean, kernel: gpytorch.kernels.Kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module, self.covar_module = mean, kernel
        ntk_gp.priors.scale_to_data(self)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def rbf_from_scratch(network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor):
    kernel = ScaleKernel(RBFKernel(ard_num_dims=x.shape[-1])) + ConstantKernel()
    return ntk_gp.averaged(GP(x, y, gpytorch.means.ZeroMean(), kernel), DRAWS).predict(x_new)


def rbf_on_the_network(network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor):
    kernel = GainKernel(network) + ScaleKernel(RBFKernel())
    return ntk_gp.averaged(GP(x, y, NetworkMean(network), kernel), DRAWS).predict(x_new)


def untrained_tangent_kernel(network: nn.Sequential, x: Tensor, y: Tensor, x_new: Tensor):
    """What the architecture alone knows."""
    untrained = make_network(x.shape[-1])
    kernel = ConstantKernel() + ScaleKernel(NTKKernel(untrained, normalize=True))
    return ntk_gp.averaged(GP(x, y, gpytorch.means.ZeroMean(), kernel), DRAWS).predict(x_new)


def recipe(network: nn.Module, x: Tensor, y: Tensor, x_new: Tensor):
    return AdaptedGP(x, y, network).predict(x_new, DRAWS)


DRAWS = 16  # of the hyperparameters, which all Gaussian processes here are averaged over

METHODS: dict[str, Callable] = {
    "network, unadapted": unadapted,
    "fine-tuning, all layers": fine_tuned,
    "fine-tuning, last layer": lambda *given: fine_tuned(*given, last_layer_only=True),
    "RBF from scratch (ARD)": rbf_from_scratch,
    "RBF on network and gain": rbf_on_the_network,
    "untrained network's NTK": untrained_tangent_kernel,
    "ntk_gp.AdaptedGP": recipe,
}


# ---- 4. Five inputs: the table ----


class Scores(NamedTuple):
    """Of one task: what each method's predictions were worth, in the order of the methods."""

    errors: list[float]  # mean squared, of the noiseless values, over the variance of these
    densities: list[float]  # mean negative log predictive density of noisy values
    covered: list[float]  # by central 95 % intervals


def score(task: Related, predictions: list, x_new: Tensor) -> Scores:
    truth = task(x_new)
    observed = truth + task.noise * torch.randn(len(x_new))
    inside = [
        (p.icdf(torch.tensor(0.025)) <= observed) & (observed <= p.icdf(torch.tensor(0.975))) for p in predictions
    ]
    return Scores(
        [((p.mean - truth).square().mean() / truth.var()).item() for p in predictions],
        [-p.log_prob(observed).mean().item() for p in predictions],
        [each.double().mean().item() for each in inside],
    )


def try_task(network: nn.Module, sizes: tuple[int, ...], seed: int) -> dict[int, Scores]:
    """A task related to the network's own, with so many labels."""
    torch.manual_seed(seed)
    task = Related()
    x, y = observe(task, max(sizes))
    x_new = task.inputs(500)
    return {n: score(task, [method(network, x[:n], y[:n], x_new) for method in METHODS.values()], x_new) for n in sizes}


def compare_on_related_tasks(
    sizes: tuple[int, ...], seeds: Iterable[int], steps: int, run: Callable
) -> dict[int, list[Scores]]:
    """One network, and a task for each seed."""
    network = train(make_network(5), *observe(Related(is_source=True), 1000), steps)
    seeds = list(seeds)
    results = run(partial(try_task, network, sizes), seeds)
    results = list(tqdm(results, desc="tasks with five inputs", total=len(seeds), disable=None))
    return {n: [result[n] for result in results] for n in sizes}


def table(scores: dict[int, list[Scores]]) -> str:
    """Medians over the tasks of the squared errors, means of the densities, with their standard errors."""
    lines = [f"{len(next(iter(scores.values())))} related tasks of five inputs; squared error relative to the variance"]
    for n, each in scores.items():
        lines.append(f"\n{f'{n} labels':26}{'median error':>18}{'mean NLPD':>18}{'in 95 % band':>14}")
        errors, densities, covered = (torch.tensor(column) for column in zip(*each, strict=True))
        for k, name in enumerate(METHODS):
            spread = 1.2533 * _standard_error(errors[:, k])  # of a median, if the tasks were normally distributed
            error = f"{errors[:, k].median():.3f} ± {spread:.3f}"
            density = f"{densities[:, k].mean():.2f} ± {_standard_error(densities[:, k]):.2f}"
            lines.append(f"  {name:24}{error:>18}{density:>18}{100 * covered[:, k].mean():13.0f}%")
    return "\n".join(lines)


def _standard_error(values: Tensor) -> Tensor:
    return values.std(unbiased=len(values) > 1) / math.sqrt(len(values))


# ---- 5. One input: the figure ----

GRID = torch.linspace(-7, 7, 281, dtype=torch.float64).unsqueeze(-1)


class Look(NamedTuple):
    """One task of one input, its labels, and what was made of them."""

    is_related: bool
    x: Tensor
    y: Tensor
    truth: Tensor
    mean: Tensor
    band: tuple[Tensor, Tensor]  # 95 %
    densities: Tensor  # negative logarithms, of noisy values
    tuned: Tensor
    weight: float  # of the adapted network, by its evidence, beside an RBF kernel from scratch

    @property
    def title(self) -> str:
        return "related" if self.is_related else "unrelated"


def look(network: nn.Module, seed: int, is_related: bool) -> Look:
    """A task of one input, with ten labels."""
    torch.manual_seed(seed)
    task = Sinusoid(is_related=is_related)
    x, y = observe(task, 10)
    model = AdaptedGP(x, y, network, source_inputs=(-7.5, 7.5))
    scratch = GP(x, y, gpytorch.means.ZeroMean(), ScaleKernel(RBFKernel()) + ConstantKernel())
    evidence = ntk_gp.compare({"adapted": model.averaged(DRAWS), "RBF from scratch": scratch}, DRAWS)
    prediction = model.predict(GRID, DRAWS)
    truth = task(GRID)
    densities = -prediction.log_prob(truth + task.noise * torch.randn(len(truth)))
    (weight,) = (row.weight for row in evidence if row.name == "adapted")
    tuned = fine_tuned(network, x, y, GRID).mean
    return Look(is_related, x, y, truth, prediction.mean, prediction.confidence_region(), densities, tuned, weight)


def look_at_sinusoids(seed: int, steps: int, run: Callable) -> tuple[nn.Module, list[Look]]:
    """Three related tasks and an unrelated one."""
    network = train(make_network(1), *observe(Sinusoid(is_source=True), 1000), steps)
    looks = run(partial(look, network), range(seed, seed + 4), [True, True, True, False])
    return network, list(tqdm(looks, desc="tasks with one input", total=4, disable=None))


def table_of_looks(looks: list[Look]) -> str:
    """In the range of the labels and beyond it, told apart."""
    inside = GRID.squeeze(-1).abs() <= 5
    lines = [f"{'one input':26}{'NLPD on [-5, 5]':>18}{'beyond':>12}   what the evidence says of the adapted network"]
    for each in looks:
        lines.append(
            f"  {each.title:24}{each.densities[inside].mean():18.2f}{each.densities[~inside].mean():12.2f}"
            f"   {100 * each.weight:.0f} %, against an RBF kernel from scratch"
        )
    return "\n".join(lines)


def figure(network: nn.Module, looks: list[Look]) -> plt.Figure:
    """A panel for each task: the truth, the labels, the network before and after, with its 95 % band."""
    fig, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, squeeze=False, layout="constrained")
    x = GRID.squeeze(-1)
    for axis, each in zip(axes.flat, looks, strict=True):
        axis.axvspan(-5, 5, color="0.96", zorder=0)
        axis.fill_between(x, *each.band, color="C0", alpha=0.2, lw=0, label="95 %")
        axis.plot(x, network(GRID).detach(), color="0.6", lw=1, label="network, as trained")
        axis.plot(x, each.tuned, color="C1", lw=1.2, ls="--", label="network, fine-tuned")
        axis.plot(x, each.truth, color="black", lw=1.2, ls=":", label="truth")
        axis.plot(x, each.mean, color="C0", lw=2, label="adapted")
        axis.plot(each.x.squeeze(-1), each.y, "ko", ms=5, label="the ten labels")
        axis.set_title(f"{each.title} (evidence for the adapted network: {100 * each.weight:.0f} %)", fontsize=10)
        reach = 1.8 * float(each.y.abs().max())
        axis.set(ylim=(-reach, reach), xlim=(-7, 7))
    fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return fig


def set_up() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # tensors this small lose more to threads than they gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="which networks and tasks to draw (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=6, help="how many tasks of five inputs (default: %(default)s)")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 20], help="how many labels (default: 10 20)")
    parser.add_argument("--steps", type=int, default=2000, help="of training the networks (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/adaptation.png"), help="default: %(default)s")
    arguments = parser.parse_args()

    set_up()
    torch.manual_seed(arguments.seed)
    start = time.perf_counter()
    seeds = range(1000 * arguments.seed, 1000 * arguments.seed + arguments.tasks)
    spawned = get_context("spawn")  # a process of threads is not to be forked
    count = min(arguments.tasks, os.cpu_count() or 1)
    with ProcessPoolExecutor(count, spawned, set_up) as processes:
        run = processes.map if count > 1 else map
        print(table(compare_on_related_tasks(tuple(arguments.labels), seeds, arguments.steps, run)), end="\n\n")
        network, looks = look_at_sinusoids(arguments.seed, arguments.steps, run)
    print(table_of_looks(looks), end="\n\n")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure(network, looks).savefig(arguments.output, dpi=150)
    print(f"{arguments.output} written; {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
