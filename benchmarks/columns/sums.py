"""Sums and products with a neural tangent kernel in GPyTorch, beside one Cholesky factorisation of the same size."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import gpytorch
import numpy as np
import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor

from ntk_gp import NetworkMean, NTKKernel

from .gp import AdaptedGP
from .torch_base import TorchColumn

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class SumColumn(TorchColumn):
    """Steps of fitting, and predictions, each in turns with a Cholesky factorisation in float64."""

    def make_kernel(self, name: str) -> Kernel:
        ntk = ScaleKernel(NTKKernel(self.network))
        if name == "NTK + RBF":
            return ntk + ScaleKernel(RBFKernel())
        if name == "NTK + Matérn":
            return ntk + ScaleKernel(MaternKernel(nu=1.5))
        if name == "NTK × RBF":
            return ScaleKernel(NTKKernel(self.network) * RBFKernel())
        return NTKKernel(self.network, variance_groups="layer")

    def make_model(self, arrays: dict[str, np.ndarray], kernel: str) -> AdaptedGP:
        likelihood = GaussianLikelihood().to(self.x)
        likelihood.noise = self.x.new_tensor(0.1)
        y = self.tensor(arrays["y"])
        return AdaptedGP(self.x, y, likelihood, NetworkMean(self.network), self.make_kernel(kernel)).to(self.x)

    def step(self, arrays: dict[str, np.ndarray], kernel: str, repeats: int) -> Callable:
        """Seconds of a factorisation, of the first step and of a later one; a later one's peak, in numbers of N²."""

        def call() -> Tensor:
            model = self.make_model(arrays, kernel).train()
            mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

            def step() -> None:
                optimizer.zero_grad()
                (-mll(model(*model.train_inputs), model.train_targets)).backward()
                optimizer.step()

            return torch.tensor([*self._in_turns(step, repeats), _peak(step) / (8 * len(self.x) ** 2)])

        return call

    def prediction(self, arrays: dict[str, np.ndarray], kernel: str, repeats: int) -> Callable:
        """The same for mean and variance at new inputs."""

        def call() -> Tensor:
            model = self.make_model(arrays, kernel).eval()
            x_test = self.tensor(arrays["x_test"])

            def predict() -> None:
                with torch.no_grad():
                    prediction = model(x_test + 1e-3 * torch.rand_like(x_test))  # inputs that were never seen
                    prediction.mean, prediction.variance  # noqa: B018

            return torch.tensor([*self._in_turns(predict, repeats), _peak(predict) / (8 * len(self.x) ** 2)])

        return call

    def _in_turns(self, compute: Callable[[], None], repeats: int) -> tuple[float, float, float]:
        x = self.x.double()
        matrix = (-torch.cdist(x, x)).exp() + 0.1 * torch.eye(len(x), dtype=x.dtype)
        first = _seconds(compute)
        pairs = [(_seconds(lambda: torch.linalg.cholesky(matrix)), _seconds(compute)) for _ in range(repeats)]
        factorisations, computations = zip(*pairs, strict=True)
        return float(np.median(factorisations)), first, float(np.median(computations))


def _seconds(compute: Callable[[], object]) -> float:
    start = time.perf_counter()
    compute()
    return time.perf_counter() - start


def _peak(compute: Callable[[], None]) -> float:
    """Bytes beyond those in use before, by the kernel's own count; NaN where it counts none."""
    if not _RESET.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    start = _high_water()
    compute()
    return _high_water() - start


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
