"""Functions that are known: a relation that changes somewhat (`Friedman`), and one that is another altogether
(`Unrelated`)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .tasks import QUICK_STEPS, Cell, Task, generator, standardised
from .training import STEPS, Trained, trained

NUM_TEST = 500
SOURCE, TARGET = 0, 1  # streams of random numbers

Function = Callable[[Tensor], Tensor]
Inputs = Callable[[int, torch.Generator], Tensor]


class Friedman:
    """Friedman's function with other coefficients: the source's structure, and all of its terms changed.

    .. math:: y = 10 c_1 \\sin(\\pi x_1 x_2 + \\varphi) + 20 c_2 (x_3 - 1/2)^2 + 10 c_3 x_4 + 5 c_4 x_5 + b + \\epsilon

    Inputs are uniform in the unit cube, noise has standard deviation 1 in source and targets (the source's function
    has about 5). Source: c = 1, φ = b = 0, with 2,000 points. Targets: log₂ c_i uniform in (-1, 1), φ in (-½, ½) and
    b in (-5, 5). Errors are from the function without noise.
    """

    seeds: Sequence[int] = range(4)
    targets = 5
    labels = (5, 10, 20, 50)
    noise = 1.0

    def cells(self, seeds: Sequence[int], quick: bool) -> list[Cell]:
        targets, labels = (1, self.labels[1:2]) if quick else (self.targets, self.labels)
        return [Cell(f"friedman {target}", seed, n) for seed in seeds for target in range(targets) for n in labels]

    def source(self, name: str) -> str:
        return "friedman"

    def train(self, name: str, seed: int, quick: bool) -> Trained:
        def source() -> tuple[Tensor, Tensor]:
            return _observe(_friedman(torch.ones(4), 0.0, 0.0), _unit_cube, 2000, self.noise, generator(SOURCE, seed))

        return trained(self.source(name), seed, source, QUICK_STEPS if quick else STEPS)

    def task(self, name: str, seed: int, quick: bool) -> Task:
        draws = generator(TARGET, seed, int(name.split()[1]))
        u = torch.rand(6, generator=draws, dtype=torch.float64)
        function = _friedman(2 ** (2 * u[:4] - 1), float(u[4] - 0.5), float(10 * u[5] - 5))
        return _task(self.train(name, seed, quick), function, _unit_cube, max(self.labels), self.noise, draws)


class Unrelated:
    """Targets that have nothing to do with the source but inputs of the same distribution.

    * `features`: draws from a Gaussian process with an RBF kernel in five dimensions (400 random features), inputs
      uniform in the cube [-1, 1]^5, lengthscale 1 in each, variance 1, noise 0.1.
    * `sinusoid`: A sin(wx + b) on [-5, 5], A in (0.1, 5), w in (0.5, 2) and b in (0, 2π), noise of 0.05 A.

    The source, of 2,000 points, is a draw like the targets. Errors are from the function without noise.
    """

    seeds: Sequence[int] = range(4)
    targets = 2
    labels = (10, 20, 50)

    def cells(self, seeds: Sequence[int], quick: bool) -> list[Cell]:
        targets, labels = (1, self.labels[:1]) if quick else (self.targets, self.labels)
        names = [f"{kind} {target}" for kind in _DRAWS for target in range(targets)]
        return [Cell(name, seed, n) for seed in seeds for name in names for n in labels]

    def source(self, name: str) -> str:
        return name.split()[0]

    def train(self, name: str, seed: int, quick: bool) -> Trained:
        kind = self.source(name)

        def source() -> tuple[Tensor, Tensor]:
            draws = generator(SOURCE, seed, zlib.crc32(kind.encode()))
            function, inputs, noise = _DRAWS[kind](draws)
            return _observe(function, inputs, 2000, noise, draws)

        return trained(kind, seed, source, QUICK_STEPS if quick else STEPS)

    def task(self, name: str, seed: int, quick: bool) -> Task:
        kind, target = name.split()
        draws = generator(TARGET, seed, zlib.crc32(kind.encode()), int(target))
        function, inputs, noise = _DRAWS[kind](draws)
        return _task(self.train(name, seed, quick), function, inputs, max(self.labels), noise, draws)


def _friedman(coefficients: Tensor, phase: float, offset: float) -> Function:
    def function(x: Tensor) -> Tensor:
        sine = torch.sin(math.pi * x[:, 0] * x[:, 1] + phase)
        terms = torch.stack([10 * sine, 20 * (x[:, 2] - 0.5) ** 2, 10 * x[:, 3], 5 * x[:, 4]], dim=-1)
        return terms @ coefficients.to(x) + offset

    return function


def _random_features(draws: torch.Generator) -> tuple[Function, Inputs, float]:
    num_features = 400
    frequencies = torch.randn(5, num_features, generator=draws, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(num_features, generator=draws, dtype=torch.float64)
    weights = math.sqrt(2 / num_features) * torch.randn(num_features, generator=draws, dtype=torch.float64)
    return lambda x: torch.cos(x @ frequencies + phases) @ weights, lambda n, g: 2 * _unit_cube(n, g) - 1, 0.1


def _sinusoid(draws: torch.Generator) -> tuple[Function, Inputs, float]:
    u = torch.rand(3, generator=draws, dtype=torch.float64)
    amplitude, frequency, phase = float(0.1 + 4.9 * u[0]), float(0.5 + 1.5 * u[1]), float(2 * math.pi * u[2])

    def inputs(n: int, draws: torch.Generator) -> Tensor:
        return 10 * torch.rand(n, 1, generator=draws, dtype=torch.float64) - 5

    return lambda x: amplitude * torch.sin(frequency * x[:, 0] + phase), inputs, 0.05 * amplitude


_DRAWS = {"features": _random_features, "sinusoid": _sinusoid}


def _unit_cube(n: int, draws: torch.Generator) -> Tensor:
    return torch.rand(n, 5, generator=draws, dtype=torch.float64)


def _observe(function: Function, inputs: Inputs, n: int, noise: float, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    x = inputs(n, draws)
    return x, function(x) + noise * torch.randn(n, generator=draws, dtype=torch.float64)


def _task(
    trained: Trained, function: Function, inputs: Inputs, pool: int, noise: float, draws: torch.Generator
) -> Task:
    test, labels = (_observe(function, inputs, n, noise, draws) for n in (NUM_TEST, pool))
    return standardised(trained, labels, test, function(test[0]))
