"""Peak memory of computations whose factors do not fit in the memory budget, and what they give with more of it.

`python -m tests.peak_memory` measures every case at a tenth of the default budget; `--budget BYTES` at another one.
Linux only: the peak is the kernel's own count for the process (VmHWM), PyTorch's and NumPy's memory alike.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.jacobian.structured import ChunkedJacobian, StructuredEngine

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Transformer(nn.Module):
    """A sequence of 16 positions; the embedding of the positions is used in the decoder, too."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Linear(4, width)
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.encoder(self.embedding(x.unflatten(-1, (16, 4)))).mean(1)
        return (encoded @ self.embedding.weight).sum(-1)


def mlp(width: int, outputs: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs))


def cnn(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(-1, (3, 16, 16)),
        nn.Conv2d(3, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * channels, 1),
    )


@dataclass(frozen=True)
class Case:
    """A network, d, and C."""

    build: Callable[[], nn.Module]
    width: int
    outputs: int = 1

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    @property
    def options(self) -> dict[str, str]:
        return {"output": "all"} if self.outputs > 1 else {}

    def kernel(self) -> NTKKernel:
        return NTKKernel(self.network(), engine="structured", **self.options)

    def points(self, factor_bytes: float) -> int:
        """How many points' factors take so much memory."""
        jacobian = StructuredEngine(self.kernel().network).linearize(self.inputs(8)[None])
        return math.ceil(factor_bytes / (jacobian.nbytes / 8))

    def inputs(self, n: int) -> Tensor:
        return torch.randn(n, self.width, generator=torch.Generator().manual_seed(1))


CASES = {
    "MLP": Case(lambda: mlp(512), 5),
    "narrow MLP, 3 outputs": Case(lambda: mlp(128, 3), 5, 3),
    "CNN": Case(lambda: cnn(16), 768),
    "transformer": Case(lambda: Transformer(32), 64),
}


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, case: Case, x: Tensor):
        several = case.outputs > 1
        likelihood = MultitaskGaussianLikelihood(num_tasks=case.outputs) if several else GaussianLikelihood()
        y = torch.sin(x.sum(-1, keepdim=True) + torch.arange(case.outputs))
        super().__init__(x, y if several else y[:, 0], likelihood)
        self.mean_module = NetworkMean(case.network(), **case.options)
        self.covar_module = case.kernel()
        self.several = several
        likelihood.noise = 1.0

    def forward(self, x: Tensor) -> MultivariateNormal:
        distribution = MultitaskMultivariateNormal if self.several else MultivariateNormal
        return distribution(self.mean_module(x), self.covar_module(x))


def _columns(rows: int, r: int) -> Tensor:
    return torch.randn(rows, r, generator=torch.Generator().manual_seed(2))


def _posterior(case: Case, x: Tensor, part: str) -> Tensor:
    """At a quarter of the points, from so few that the solve is exact."""
    model = AdaptedGP(case, x[: min(len(x) // 8, 1_300 // case.outputs)]).eval()
    with gpytorch.settings.skip_posterior_variances(part == "mean"), torch.no_grad():
        prediction = model(x[: len(x) // 4])
        return prediction.mean if part == "mean" else prediction.variance


def _iterated_mean(case: Case, x: Tensor) -> Tensor:
    """At a few points, from so many that the system is solved by iteration."""
    iteration = gpytorch.settings.max_cholesky_size(1)
    with (
        gpytorch.settings.skip_posterior_variances(),
        iteration,
        ntk_gp.settings.solve_tolerance(1e-8),
        torch.no_grad(),
    ):
        return AdaptedGP(case, x[16:]).eval()(x[:16]).mean


# Each makes its inputs, and returns the computation, so that the inputs are not counted.
OPERATIONS: dict[str, Callable[[Case, Tensor], Callable[[], Tensor]]] = {
    "Gram": lambda case, x: lambda: case.kernel()(x).to_dense(),
    "K v": lambda case, x: _product(case, x, 1),
    "K V, 100": lambda case, x: _product(case, x, 100),
    "J u": lambda case, x: _jvp(case, x, 1),
    "J U, 20": lambda case, x: _jvp(case, x, 20),
    "Jᵀ v": lambda case, x: _vjp(case, x, 1),
    "Jᵀ V, 20": lambda case, x: _vjp(case, x, 20),
    "diagonal": lambda case, x: lambda: case.kernel()(x, diag=True),
    "posterior mean": lambda case, x: lambda: _posterior(case, x, "mean"),
    "posterior variance": lambda case, x: lambda: _posterior(case, x, "variance"),
    "iterated mean": lambda case, x: lambda: _iterated_mean(case, x),
}
QUADRATIC = ("Gram", "K V, 100", "iterated mean")  # their flops: at fewer points, whose factors are still not held


def _product(case: Case, x: Tensor, r: int) -> Callable[[], Tensor]:
    rhs = _columns(len(x) * case.outputs, r)
    return lambda: case.kernel()(x).evaluate_kernel() @ rhs


def _jvp(case: Case, x: Tensor, r: int) -> Callable[[], Tensor]:
    tangents = _columns(case.kernel().jacobian(x).shape[-1], r)
    return lambda: case.kernel().jacobian(x) @ tangents


def _vjp(case: Case, x: Tensor, r: int) -> Callable[[], Tensor]:
    cotangents = _columns(len(x) * case.outputs, r)
    return lambda: case.kernel().jacobian(x).mT @ cotangents


def measure(case: Case, name: str, budget: int) -> dict[str, float]:
    """The peak beyond inputs and result, in units of the budget; the relative difference from a run without limits."""
    n = case.points((0.3 if name in QUADRATIC else 1.5) * budget)
    x = case.inputs(n)
    compute = OPERATIONS[name](case, x)
    OPERATIONS[name](case, x[:19])()  # libraries set themselves up
    with ntk_gp.settings.memory_budget(budget):
        chunked = isinstance(case.kernel()._linearization.jacobian(x[None]), ChunkedJacobian)
        start = _start_of_peak()
        result = compute()
        peak = _status("VmHWM") - start
    with ntk_gp.settings.memory_budget(1 << 40):
        expected = compute()
    error = float((result - expected).norm() / expected.norm())
    return {"points": n, "peak": (peak - result.nbytes) / budget, "error": error, "chunked": chunked}


def _start_of_peak() -> int:
    """Gives back what is free, and counts the peak from here on: the memory in use."""
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    return _status("VmHWM")


def _status(entry: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(entry))
    return 1024 * int(line.split()[1])


def measure_afresh(case: str, operations: Sequence[str], budget: int) -> dict[str, dict[str, float]]:
    """:func:`measure` of each in turn, in a process of their own, where freed memory goes back at once: peaks are what
    was in use."""
    command = [sys.executable, "-m", "tests.peak_memory", "--budget", str(budget), "--only", case, *operations]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ntk_gp.settings.memory_budget.bytes(torch.device("cpu")) // 10
    parser.add_argument("--budget", type=int, default=default, help="bytes (default: a tenth of the default budget)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="a case and some operations, printed as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        case, *operations = arguments.only
        print(json.dumps({name: measure(CASES[case], name, arguments.budget) for name in operations}))
        return
    print(f"budget {arguments.budget / 2**20:.0f} MiB")
    print("| network | computation | points | peak / budget | difference from a run without limits |")
    print("|---|---|---|---|---|")
    for case in CASES:
        for operation, row in measure_afresh(case, list(OPERATIONS), arguments.budget).items():
            print(f"| {case} | {operation} | {row['points']} | {row['peak']:.2f} | {row['error']:.0e} |", flush=True)


if __name__ == "__main__":
    main()
