"""How often one file of the package calls another while a small model predicts.

    python -m benchmarks.handovers [--pairs 25]

A call from a function of one file of `ntk_gp` to a function of another is a hand-over. Between rooms are those whose
files are in different top-level folders of the package, or are such files themselves. Counted are a model's first mean
and variance, after it was made, and its second ones, at new inputs: what a small prediction costs is little else.

Calls by way of other libraries (GPyTorch's of a kernel's `forward`, say) are not counted. Resuming a generator is no
call.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType
from typing import Any

import gpytorch
import torch
from torch import Tensor, nn

import ntk_gp

Pairs = Counter[tuple[str, str]]

_PACKAGE = str(Path(ntk_gp.__file__).parent)


class PlainGP(gpytorch.models.ExactGP):
    """A user's model of one network: its mean, and its kernel with one scale."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = ntk_gp.NetworkMean(network)
        self.covar_module = gpytorch.kernels.ScaleKernel(ntk_gp.NTKKernel(network))

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def make_model(points: int = 100) -> PlainGP:
    """A 5-50-50-1 network's model of so many points, ready to predict."""
    network = nn.Sequential(nn.Linear(5, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    x = torch.randn(points, 5)
    model = PlainGP(network, x, torch.randn(points))
    model.eval()
    return model


def predict(model: PlainGP, points: int = 10) -> None:
    """A mean and a variance at new inputs."""
    x = torch.randn(points, 5)
    with torch.no_grad():
        posterior = model(x)
        posterior.mean, posterior.variance  # noqa: B018 -- both are computed when they are asked for


@contextmanager
def counted() -> Iterator[Pairs]:
    """Counts the hand-overs of what runs inside, by caller and called file."""
    pairs: Pairs = Counter()
    files: dict[str, str | None] = {}

    def file_of(frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        if name not in files:
            files[name] = str(Path(name).relative_to(_PACKAGE)) if name.startswith(_PACKAGE) else None
        return files[name]

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or frame.f_back is None or _goes_on(frame):
            return
        called, caller = file_of(frame), file_of(frame.f_back)
        if called is not None and caller is not None and called != caller:
            pairs[caller, called] += 1

    sys.setprofile(look)
    try:
        yield pairs
    finally:
        sys.setprofile(None)


def _goes_on(frame: FrameType) -> bool:
    """Whether this is a generator that has been left at a `yield`."""
    return bool(frame.f_code.co_flags & CO_GENERATOR) and frame.f_lineno != frame.f_code.co_firstlineno


def room_of(file: str) -> str:
    """The top-level folder or file of the package."""
    return Path(file).parts[0]


def between_rooms(pairs: Pairs) -> int:
    """How many of these hand-overs leave a room."""
    return sum(count for (caller, called), count in pairs.items() if room_of(caller) != room_of(called))


def measure(compute: Callable[[], None]) -> Pairs:
    """The hand-overs of one computation."""
    with counted() as pairs:
        compute()
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="how many of the most frequent pairs to print")
    number = parser.parse_args().pairs
    torch.manual_seed(0)
    predict(make_model())  # what is done once in a process is not a prediction's
    model = make_model()
    for which in ("first", "second"):
        pairs = measure(lambda: predict(model))
        print(f"{which} mean and variance: {pairs.total()} between files, {between_rooms(pairs)} between rooms")
        for (caller, called), count in pairs.most_common(number):
            print(f"  {count:5d}  {caller} -> {called}")


if __name__ == "__main__":
    main()
