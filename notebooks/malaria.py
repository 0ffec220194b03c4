"""The malaria maps of Nigeria and networks trained on them: what 02_malaria and 02_malaria_variants share.

From the same seed comes the same network.
"""

from __future__ import annotations

import copy
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of what is installed

from benchmarks.data import MALARIA, folder_with

# ---- 1. The maps ----


class Maps(NamedTuple):
    """Prevalence of *P. falciparum* in children aged 2 to 10, by pixel and year.

    :ivar pixels: Positions (m, 2), in units of 333 km.
    :ivar pfpr: For each year the prevalence (m,), between 0 and 1.
    """

    pixels: Tensor
    pfpr: dict[int, Tensor]


def file() -> Path:
    """Where the maps are.

    :raises FileNotFoundError: If they are not where :func:`benchmarks.data.folder_with` looks.
    """
    rasters = "the Malaria Atlas Project's rasters 2015_Nature_Africa_PR.2000.tif to .2015.tif"
    return folder_with(MALARIA, f"Make it from {rasters}, as 02_malaria describes.") / MALARIA


def load() -> Maps:
    """The maps of 2000 to 2015, float64; raises as :func:`file`."""
    data = np.load(file())
    lon, lat = torch.tensor(data["lon"]).double(), torch.tensor(data["lat"]).double()
    pixels = torch.stack([(lon - lon.mean()) * math.cos(math.radians(9)), lat - lat.mean()], dim=-1) / 3
    years = zip(data["years"], data["pfpr"].T, strict=True)
    return Maps(pixels, {int(year): torch.tensor(values).double() for year, values in years})


# ---- 2. Networks ----


class FourierFeatures(nn.Module):
    """The coordinates, and sines and cosines of random projections of them."""

    def __init__(self, num_frequencies: int = 32, scale: float = 4.0):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(2, num_frequencies))

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.frequencies
        return torch.cat([x, z.sin(), z.cos()], dim=-1)


class Unstandardize(nn.Module):
    """From units of the targets' standard deviation to prevalence."""

    def __init__(self, y: Tensor):
        super().__init__()
        self.register_buffer("mean", y.mean())
        self.register_buffer("std", y.std())

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.std * z


class UnstandardizeBoth(Unstandardize):
    """The same for a mean and the logarithm of a variance, (n, 2)."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([super().forward(z[..., 0]), z[..., 1] + 2 * self.std.log()], dim=-1)


def squared_error(output: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    """In units of the targets' variance."""
    return (output - y).square().mean() / variance


def gaussian_nll(output: Tensor, y: Tensor, variance: Tensor) -> Tensor:
    """-log N(y; m, v) up to a constant, where the network's outputs are m and log v (n, 2)."""
    mean, log_variance = output.unbind(-1)
    return 0.5 * (log_variance + (y - mean).square() * (-log_variance).exp()).mean()


def train(network: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, loss: Callable = squared_error) -> nn.Module:
    """AdamW on batches of 500."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (500,))
        optimizer.zero_grad()
        loss(network(x[batch]), y[batch], y.var()).backward()
        optimizer.step()
        schedule.step()
    return network


def train_source(
    maps: Maps, year: int, seed: int, steps: int = 3000, *, heads: int = 1, width: int = 100, num_labels: int = 800
) -> tuple[nn.Module, Tensor, Tensor]:
    """A year's network, float64, and pixels in a random order: to label, and 1,000 to evaluate on.

    The network has seen 4,000 other pixels. With two heads its outputs are a mean and the logarithm of a variance,
    trained by the Gaussian likelihood; pixels and projections are then those of the network with one.
    """
    torch.manual_seed(seed)
    rest = len(maps.pixels) - 5000 - num_labels
    source, pool, held_out, _ = torch.randperm(len(maps.pixels)).split([4000, num_labels, 1000, rest])
    x, y = maps.pixels[source].float(), maps.pfpr[year][source].float()
    layers = [nn.Linear(66, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, heads)]
    end = [nn.Flatten(0), Unstandardize(y)] if heads == 1 else [UnstandardizeBoth(y)]
    network = nn.Sequential(FourierFeatures(), *layers, *end).float()
    loss = squared_error if heads == 1 else gaussian_nll
    return train(network, x, y, steps, lr=3e-3, loss=loss).double(), pool, held_out


# ---- 3. Fine-tuning ----


def fine_tuned(network: nn.Module, x: Tensor, y: Tensor, steps: int = 300) -> Callable[[Tensor], Normal]:
    """All layers, by Adam, five times: each without a fifth of the labels, stopped where the error on these is least.

    :return: What maps inputs to a normal distribution: the mean of the five, with the errors on the labels held out.
    """
    folds = [_stopped_early(network, x, y, torch.arange(len(x)) % 5 == k, steps) for k in range(5)]
    tuned, errors = zip(*folds, strict=True)
    deviation = torch.cat(errors).square().mean().sqrt()
    return lambda x_new: Normal(torch.stack([each(x_new).detach() for each in tuned]).mean(0), deviation)


def _stopped_early(
    network: nn.Module, x: Tensor, y: Tensor, held_out: Tensor, steps: int, every: int = 10
) -> tuple[nn.Module, Tensor]:
    """The best of the networks on the way, and its errors on the labels that were held out."""
    tuned, best, errors = copy.deepcopy(network), network, (network(x[held_out]) - y[held_out]).detach()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=1e-3)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        (tuned(x[~held_out]) - y[~held_out]).square().mean().backward()
        optimizer.step()
        if step % every == 0:
            new_errors = (tuned(x[held_out]) - y[held_out]).detach()
            if new_errors.square().sum() < errors.square().sum():
                best, errors = copy.deepcopy(tuned), new_errors
    return best, errors


# ---- 4. Cost ----

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a function returns, its seconds of wall time, and the most bytes that it held beyond what there were before.

    Bytes are the kernel's own count of the process, on Linux; NaN elsewhere.
    """
    before = _start_of_peak()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return result, seconds, _peak() - before


def _start_of_peak() -> float:
    if not os.access(_RESET, os.W_OK):
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)
    _RESET.write_text("5")
    return _peak()


def _peak() -> float:
    if not _STATUS.exists():
        return math.nan
    return 1024.0 * int(next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")).split()[1])
