"""Weighted draws from a density of a few variables, from a Gaussian around its mode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .. import settings
from .optimum import LogDensity, Optimum, maximise

# The proposal is the Gaussian of the curvature at the mode, this much wider: weights are bounded where the density's
# tails are lighter than the wider Gaussian's, and a Gaussian of the right width loses more where they are not.
_WIDENED = 1.15
# For second differences of gradients: of u's unit, an e-fold. Their error is of the order of its square.
_STEP = 1e-3
# What a curvature may fall to, of that of one coordinate alone: directions in which the density is flat, or rises.
_LEAST_CURVATURE = 0.05
# And that of a coordinate: as of a Gaussian three wide.
_WIDEST = 3.0


@dataclass(frozen=True)
class WeightedDraws:
    r"""Draws u with weights that stand for a density.

    :ivar u: (S, d).
    :ivar weights: (S,), that add up to one.
    :ivar log_integral: The log of the density's integral, by importance sampling.
    :ivar mode: The mode found, (d,).
    """

    u: Tensor
    weights: Tensor
    log_integral: float
    mode: Tensor

    @property
    def effective_sample_size(self) -> float:
        """How many draws of equal weight would be as good, (Σ w)² / Σ w²."""
        return float(1 / self.weights.square().sum())

    @property
    def log_integral_error(self) -> float:
        """The standard error of `log_integral` that the weights' spread tells, √(1/ESS - 1/S)."""
        return math.sqrt(max(1 / self.effective_sample_size - 1 / len(self.weights), 0.0))


@dataclass(frozen=True)
class _Gaussian:
    mean: Tensor
    root: Tensor  # R of the covariance R Rᵀ, (d, d), whose determinant's logarithm is known
    log_determinant: float

    def draw(self, normals: Tensor) -> Tensor:
        return self.mean + normals @ self.root.mT

    def log_density(self, normals: Tensor) -> Tensor:
        """At the draws made of these normals."""
        constant = self.log_determinant + normals.shape[-1] / 2 * math.log(2 * math.pi)
        return -normals.square().sum(-1) / 2 - constant


def weighted_draws(
    log_density: LogDensity,
    value: Callable[[Tensor], float],
    starts: Sequence[Tensor],
    draws: int,
    seed: int,
) -> WeightedDraws:
    """Draws from a Gaussian around the mode, weighted by density over proposal.

    The mode is the highest that a search from each of the starts finds; the Gaussian has the curvature there, by central
    differences of gradients, and is 15 % wider. Draws are quasi-random (scrambled Sobol points). Where they are
    worth less than 10 % of their number, or less than five, the Gaussian is made anew with their weighted moments, once.

    :param log_density: Of u (d,): value, up to a constant, and gradient.
    :param value: Of u (d,): the value alone.
    :param starts: Where to search from, (d,) each; float64.
    :param draws: How many, S.
    :param seed: Of the scrambling.
    :raises RuntimeError: If the density is zero, or not a number, at every start or at every draw.
    """
    optimum = best(log_density, starts)
    if not optimum.has_converged:
        warnings.warn(
            "The search for the mode of the hyperparameters' density has not converged. Draws are weighted by that "
            "density all the same; if they are worth little, give every parameter a prior (ntk_gp.priors).",
            RuntimeWarning,
            stacklevel=3,
        )
    normals = _normals(len(optimum.u), draws, seed).to(optimum.u)
    proposal = _widened(_laplace(log_density, optimum.u))
    result = _weighted(value, proposal, normals, optimum.u)
    if _is_poor(result):
        again = _weighted(value, _widened(_moments(result, proposal)), normals, optimum.u)
        result = max(result, again, key=lambda draws: draws.effective_sample_size)
    if _is_poor(result):
        warnings.warn(
            f"{draws} draws of the hyperparameters are worth {result.effective_sample_size:.1f}: their posterior is far "
            "from Gaussian in logarithms. Averages over them are rough. Take more draws, give every parameter a prior "
            "(ntk_gp.priors.scale_to_data), or set requires_grad_(False) on those that the data do not determine.",
            RuntimeWarning,
            stacklevel=3,
        )
    return result


def best(log_density: LogDensity, starts: Sequence[Tensor]) -> Optimum:
    """The highest mode that is found from the starts."""
    found = [maximise(log_density, start) for start in settings.progress(starts, "Mode of hyperparameters")]
    optimum = max(found, key=lambda optimum: optimum.value)
    if not math.isfinite(optimum.value):
        raise RuntimeError(
            "The marginal likelihood is not a finite number at the hyperparameters that the model has, nor at the "
            "medians of their priors. Set others, with more noise, or scale the data (ntk_gp.priors.scale_to_data)."
        )
    return optimum


def _is_poor(draws: WeightedDraws) -> bool:
    return draws.effective_sample_size < max(0.1 * len(draws.weights), min(5, 0.5 * len(draws.weights)))


def _normals(size: int, draws: int, seed: int) -> Tensor:
    """Quasi-random standard normals, (S, d); on the CPU, where torch's engine draws."""
    with torch.device("cpu"):
        uniform = SobolEngine(size, scramble=True, seed=seed).draw(draws, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))


def curvature(log_density: LogDensity, u: Tensor) -> Tensor:
    """Minus the second derivatives, (d, d), by central differences of gradients."""
    steps = _STEP * torch.eye(len(u), dtype=u.dtype, device=u.device)
    rows = [
        (log_density(u - step)[1] - log_density(u + step)[1]) / (2 * _STEP)
        for step in settings.progress(list(steps), "Curvature of hyperparameters")
    ]
    matrix = torch.stack(rows)
    return (matrix + matrix.mT) / 2


def _laplace(log_density: LogDensity, mode: Tensor) -> _Gaussian:
    """The Gaussian with the curvature at the mode, which is made positive definite where it is not."""
    matrix = curvature(log_density, mode)
    matrix = torch.where(matrix.isfinite(), matrix, torch.zeros_like(matrix))
    scale = matrix.diagonal().clamp_min(1 / _WIDEST**2).sqrt()
    values, vectors = torch.linalg.eigh(matrix / torch.outer(scale, scale))
    values = values.clamp_min(_LEAST_CURVATURE)
    root = vectors / values.sqrt() / scale.unsqueeze(-1)
    return _Gaussian(mode, root, float(-values.log().sum() / 2 - scale.log().sum()))


def _moments(draws: WeightedDraws, proposal: _Gaussian) -> _Gaussian:
    """With the weighted mean and covariance of draws; few of these do not determine it, so that a part of the covariance
    they were drawn with stays in."""
    mean = draws.weights @ draws.u
    spread = (draws.u - mean) * draws.weights.sqrt().unsqueeze(-1)
    size = draws.effective_sample_size
    known = size / (size + len(mean))
    covariance = known * spread.mT @ spread + (1 - known) * proposal.root @ proposal.root.mT
    root = torch.linalg.cholesky(covariance)
    return _Gaussian(mean, root, float(root.diagonal().log().sum()))


def _widened(gaussian: _Gaussian) -> _Gaussian:
    more = len(gaussian.mean) * math.log(_WIDENED)
    return _Gaussian(gaussian.mean, _WIDENED * gaussian.root, gaussian.log_determinant + more)


def _weighted(
    value: Callable[[Tensor], float], proposal: _Gaussian, normals: Tensor, mode: Tensor
) -> WeightedDraws:
    u = proposal.draw(normals)
    values = torch.tensor([value(each) for each in settings.progress(list(u), "Draws of hyperparameters")])
    log_weights = values.to(u) - proposal.log_density(normals)
    log_weights = log_weights.nan_to_num(nan=-math.inf, neginf=-math.inf)
    log_integral = float(log_weights.logsumexp(0)) - math.log(len(u))
    if not math.isfinite(log_integral):
        raise RuntimeError(
            "The marginal likelihood is not a finite number at any draw of the hyperparameters. Give every parameter a "
            "prior, such as ntk_gp.priors.scale_to_data does."
        )
    return WeightedDraws(u, log_weights.softmax(0), log_integral, mode)
