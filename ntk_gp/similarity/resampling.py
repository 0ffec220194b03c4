"""The bootstrap over data points, by weights: nothing is evaluated again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number, with its standard error over the data points.

    :ivar value: NaN where it is not defined: for a layer without influence on the outputs, or a kernel that is constant
        where it is to be centred.
    :ivar error: The standard deviation over resampled points; NaN with it, and where nothing was resampled.
    """

    value: float
    error: float

    def __str__(self) -> str:
        if self.value != self.value:
            return "–"
        return f"{self.value:.3f}" + ("" if self.error != self.error else f" ± {self.error:.3f}")


class Resampling:
    """As many sets of points as were asked for, drawn with replacement from the points that there are.

    :param resamples: How many, 0 for no errors.
    :param seed: Of the draws.
    """

    def __init__(self, resamples: int, seed: int):
        if resamples < 0 or resamples == 1:
            raise ValueError(f"Expected resamples=0 for no standard errors, or two at least, got {resamples}.")
        self.resamples = resamples
        self._generator = torch.Generator(device="cpu").manual_seed(seed)

    def weights(self, like: Tensor) -> Tensor:
        """How often each of the n points of `like` (n, …) is in each set, (1 + resamples, n); the first is the data."""
        n = len(like)
        drawn = torch.randint(n, (self.resamples, n), generator=self._generator, device="cpu")
        counts = drawn.new_zeros(1 + self.resamples, n, dtype=torch.float64)
        counts[0] = 1
        counts[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        return counts.to(like.device)


def estimate(values: Tensor) -> Estimate:
    """From the value of the data and those of resampled points, (1 + resamples,)."""
    error = values[1:].std().item() if len(values) > 2 else float("nan")
    return Estimate(values[0].item(), error)
