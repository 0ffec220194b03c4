"""What a method predicts, and how that is scored."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Prediction(Protocol):
    """Densities of observations at m points, each by itself."""

    @property
    def mean(self) -> Tensor: ...  # (m,)

    @property
    def variance(self) -> Tensor: ...  # (m,), of an observation, with its noise

    def log_density(self, y: Tensor) -> Tensor: ...  # (m,) to (m,)


class Gaussian(NamedTuple):
    """A normal density at each point."""

    mean: Tensor
    variance: Tensor

    def log_density(self, y: Tensor) -> Tensor:
        return torch.distributions.Normal(self.mean, self.variance.sqrt()).log_prob(y)


def with_constant_variance(mean: Tensor, variance: Tensor) -> Gaussian:
    """One variance for all points. What fits its labels exactly would have none at all: it gets a millionth."""
    return Gaussian(mean, variance.clamp_min(1e-6).expand_as(mean))


def scores(prediction: Prediction, y: Tensor, truth: Tensor) -> dict[str, float]:
    """Scores at the test points, in units of the target's own standard deviation.

    :param y: Observations, (m,): densities and coverage are theirs.
    :param truth: The same without noise, where that is known, and otherwise the observations: errors are from it.
    :return: `nlpd`, mean negative log predictive density; `mse`, of the mean, relative to the variance of the truth;
        `coverage`, the share of observations within 1.96 predictive standard deviations.
    """
    mean = _checked("mean", prediction.mean, y)
    variance = _checked("variance", prediction.variance, y)
    density = _checked("density", prediction.log_density(y), y)
    return {
        "nlpd": float(-density.mean()) - math.log(float(truth.std(correction=0))),
        "mse": float((mean - truth).square().mean() / truth.var(correction=0)),
        "coverage": float(((y - mean).abs() <= 1.96 * variance.sqrt()).double().mean()),
    }


def _checked(name: str, values: Tensor, y: Tensor) -> Tensor:
    if values.shape != y.shape or not values.isfinite().all():
        raise ValueError(f"Expected a finite {name} at each of {len(y)} test points, got {values.shape}: {values}")
    return values
