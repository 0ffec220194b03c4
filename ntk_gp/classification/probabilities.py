"""Probabilities of classes, averaged over the latent function at single points."""

from __future__ import annotations

import math

import torch
from gpytorch.likelihoods import BernoulliLikelihood
from torch import Tensor, nn

from ..distributed.replicated import same_on_all_ranks
from ..operators._roots import root_by_eigenvalues
from .likelihoods import LogisticLikelihood

METHODS = ("probit", "monte_carlo")


class Link:
    """From a latent function's normal distribution at each point to probabilities.

    :param likelihood: One that :func:`~ntk_gp.classification.log_densities.log_density` serves.
    :param method: `"probit"` or `"monte_carlo"`.
    :param samples: Of the latent function, for Monte Carlo: the same for all points, whichever are asked for together.
    :param generator: Their source. (Default: torch's own, on the CPU.)
    :raises ValueError: For another method, or no samples.
    """

    def __init__(self, likelihood: nn.Module, method: str, samples: int, generator: torch.Generator | None):
        if method not in METHODS:
            raise ValueError(f"method must be 'probit' or 'monte_carlo', got {method!r}.")
        if samples < 1:
            raise ValueError(f"Expected at least one sample, got samples={samples}.")
        self.likelihood = likelihood
        self.method = method
        self.samples = samples
        self.generator = generator
        self._normals: Tensor | None = None

    def __call__(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """(m, C) and (m, C, C) to probabilities, (m, C); or to those of label 1, (m,), where one output has two
        classes."""
        if self.method == "monte_carlo":
            return self._averaged(mean, covariance)
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        if self._has_normal_link:
            return torch.special.ndtr(mean / (1 + variance).sqrt()).squeeze(-1)
        scaled = mean / (1 + math.pi / 8 * variance).sqrt()
        return self._conditional(scaled)

    @property
    def _has_normal_link(self) -> bool:
        return isinstance(self.likelihood, BernoulliLikelihood) and not isinstance(self.likelihood, LogisticLikelihood)

    def _conditional(self, f: Tensor) -> Tensor:
        """p(y | f), (..., C) to (..., C) or (...)."""
        if not isinstance(self.likelihood, BernoulliLikelihood):
            return f.softmax(-1)
        return (torch.special.ndtr(f) if self._has_normal_link else torch.sigmoid(f)).squeeze(-1)

    def _averaged(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """From a root of each covariance, which may be singular."""
        root = root_by_eigenvalues(covariance)
        normals = self._drawn(mean)
        total = torch.zeros_like(self._conditional(mean))
        for normal in normals:
            total += self._conditional(mean + root @ normal)
        return total / len(normals)

    def _drawn(self, like: Tensor) -> Tensor:
        """Standard normals, (samples, C)."""
        if self._normals is None:
            device = torch.device("cpu") if self.generator is None else self.generator.device
            shape = (self.samples, like.shape[-1])
            drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device=device)
            self._normals = same_on_all_ranks(drawn).to(like)
        return self._normals
