"""Weighted draws from a density of a few variables, from a distribution around its mode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import settings
from .optimum import LogDensity, Optimum, maximise
from .proposals import Several, StudentT, reduced, uniform_points, with_moments

# For second differences of gradients: of u's unit, an e-fold. Their error is of the order of its square.
_STEP = 1e-3
# What a curvature may fall to, of that of one coordinate alone: directions in which the density is flat, or rises.
_LEAST_CURVATURE = 0.05
# And that of a coordinate: as of a Gaussian three wide.
_WIDEST = 3.0
# Draws are worth enough from this part of their number on, and from this number on.
_ENOUGH = 0.3
_FEW = 5.0
# How often what is drawn from is made anew, and how many candidates are drawn then for each draw asked for.
_ROUNDS = 2
_CANDIDATES = 4
# A draw is on the way to another mode if its log density is this much above the mode's.
_HIGHER = 0.1
# A mode is left out if its log density is this much below the highest.
_NEGLIGIBLE = 12.0
_NOWHERE = (
    "The marginal likelihood is not a finite number at the hyperparameters that the model has, nor at the means of "
    "their priors. Set others, with more noise, or scale the data (ntk_gp.priors.scale_to_data)."
)


@dataclass(frozen=True)
class WeightedDraws:
    r"""Draws u with weights that stand for a density.

    :ivar u: (S, d).
    :ivar weights: (S,), that add up to one.
    :ivar log_integral: The log of the density's integral, by importance sampling.
    :ivar log_integral_error: Its standard error, √(1/ESS - 1/n) with n points evaluated.
    :ivar effective_sample_size: How many draws of equal weight would be as good, (Σ w)² / Σ w².
    """

    u: Tensor
    weights: Tensor
    log_integral: float
    log_integral_error: float
    effective_sample_size: float


def weighted_draws(
    log_density: LogDensity,
    value: Callable[[Tensor], float],
    starts: Sequence[Tensor],
    draws: int,
    seed: int,
    other_starts: int = 4,
) -> WeightedDraws:
    """Draws from a Student's t distribution around the mode, weighted by density over proposal.

    Modes are searched for from each of the starts, and from points around; the distribution has the curvature there, by
    central differences of gradients, and several modes have a part of it each, with the weights of Laplace's
    approximation. Draws are quasi-random (scrambled Sobol points). Where they are worth less than 30 % of their number,
    four times as many are drawn anew, from a distribution with their moments, or around a higher mode where one of them
    was higher than the first; at most twice. As many as were asked for then stand for them.

    :param log_density: Of u (d,): value, up to a constant, and gradient.
    :param value: Of u (d,): the value alone.
    :param starts: Where to search from, (d,) each; float64.
    :param draws: How many, S.
    :param seed: Of the scrambling.
    :param other_starts: From how many points around the last of the starts to search as well, at least one.
    :raises RuntimeError: If the density is zero, or not a number, at every start or at every draw.
    """
    modes = _modes(log_density, [*starts, *_others(value, starts[-1], other_starts, seed)])
    proposal: StudentT | Several = modes.proposal
    candidates = [_Candidates(value, proposal, draws, seed)]
    for i in range(1, _ROUNDS + 1):
        last = candidates[-1]
        if last.size >= _ENOUGH * draws or not last.log_weights.isfinite().any():
            break
        if float(last.values.max()) > modes.value + _HIGHER:
            modes = _modes(log_density, [last.u[int(last.values.argmax())], *modes.places])
            proposal = modes.proposal
        else:
            proposal = with_moments(last.u, last.log_weights, modes.proposal.largest)
        candidates.append(_Candidates(value, proposal, _CANDIDATES * draws, seed + i))
    result = max(candidates, key=lambda each: each.size).result(draws)
    _warn(modes.have_converged, result, draws)
    return result


class _Modes(NamedTuple):
    """The modes found: where, the highest value, whether all searches have ended at one, and what to draw from."""

    places: list[Tensor]
    value: float
    have_converged: bool
    proposal: Several


def _modes(log_density: LogDensity, starts: Sequence[Tensor]) -> _Modes:
    """Searches from each of the starts, which end where a mode found before is near."""
    optima: list[Optimum] = []
    parts: list[StudentT] = []
    for start in settings.progress(starts, "Modes of hyperparameters"):
        found = maximise(log_density, start, negligible=1e-4, is_known=lambda u: any(part.is_near(u) for part in parts))
        highest = max((optimum.value for optimum in optima), default=-math.inf)
        if found.is_new and math.isfinite(found.value) and found.value > highest - _NEGLIGIBLE:
            optima.append(found)
            parts.append(laplace(log_density, found.u))
    if not optima:
        raise RuntimeError(_NOWHERE)
    volumes = torch.stack([torch.linalg.slogdet(part.root)[1] for part in parts])
    weights = (volumes.new_tensor([optimum.value for optimum in optima]) + volumes).softmax(0)
    return _Modes(
        [optimum.u for optimum in optima],
        max(optimum.value for optimum in optima),
        all(optimum.has_converged for optimum in optima),
        Several(tuple(parts), weights),
    )


def _others(value: Callable[[Tensor], float], center: Tensor, count: int, seed: int) -> list[Tensor]:
    """Other points to start from: of 32 around one, two e-folds wide, some of the better half that are far apart."""
    wide = StudentT(center, 2 * torch.eye(len(center), dtype=center.dtype, device=center.device))
    points = list(wide.draw(uniform_points(len(center) + 1, 32, seed, like=center)))
    values = [value(point) for point in settings.progress(points, "Starts for hyperparameters")]
    better = [points[i] for i in sorted(range(len(points)), key=lambda i: -values[i])[: len(points) // 2]]
    chosen = better[:1]
    while len(chosen) < count:
        chosen.append(max(better, key=lambda point: min(float((point - other).norm()) for other in chosen)))
    return chosen


def _warn(have_converged: bool, result: WeightedDraws, draws: int) -> None:
    if not have_converged:
        warnings.warn(
            "The search for the mode of the hyperparameters' density has not converged. Draws are weighted by that "
            "density all the same; if they are worth little, give every parameter a prior (ntk_gp.priors).",
            RuntimeWarning,
            stacklevel=5,
        )
    if result.effective_sample_size < max(0.1 * draws, min(_FEW, 0.5 * draws)):
        warnings.warn(
            f"{draws} draws of the hyperparameters are worth {result.effective_sample_size:.1f}: their posterior is "
            "far from Gaussian in logarithms. Averages over them are rough. Take more draws, give every parameter a "
            "prior (ntk_gp.priors.scale_to_data), or set requires_grad_(False) on those that data do not determine.",
            RuntimeWarning,
            stacklevel=5,
        )


class _Candidates:
    """Points drawn from a proposal, with weights."""

    def __init__(self, value: Callable[[Tensor], float], proposal: StudentT | Several, count: int, seed: int):
        center = proposal.center
        self.u = proposal.draw(uniform_points(len(center) + 1, count, seed, like=center))
        steps = settings.progress(list(self.u), "Draws of hyperparameters")
        self.values = center.new_tensor([value(each) for each in steps])
        log_weights = self.values - proposal.log_density(self.u)
        self.log_weights = log_weights.nan_to_num(nan=-math.inf, neginf=-math.inf)

    @property
    def size(self) -> float:
        weights = self.log_weights.softmax(0)
        return float(1 / weights.square().sum()) if weights.isfinite().all() else 0.0

    def result(self, draws: int) -> WeightedDraws:
        log_integral = float(self.log_weights.logsumexp(0)) - math.log(len(self.u))
        if not math.isfinite(log_integral):
            raise RuntimeError(
                "The marginal likelihood is not a finite number at any draw of the hyperparameters. Give every "
                "parameter a prior, such as ntk_gp.priors.scale_to_data does."
            )
        size, weights = self.size, reduced(self.log_weights.softmax(0), draws)
        is_drawn = weights > 0
        u, weights = self.u[is_drawn], weights[is_drawn]
        error = math.sqrt(max(1 / size - 1 / len(self.u), 0.0))
        return WeightedDraws(u, weights, log_integral, error, min(size, float(1 / weights.square().sum())))


def best(log_density: LogDensity, starts: Sequence[Tensor]) -> Optimum:
    """The highest mode that is found from the starts."""
    found = [maximise(log_density, start) for start in settings.progress(starts, "Mode of hyperparameters")]
    optimum = max(found, key=lambda optimum: optimum.value)
    if not math.isfinite(optimum.value):
        raise RuntimeError(_NOWHERE)
    return optimum


def curvature(log_density: LogDensity, u: Tensor) -> Tensor:
    """Minus the second derivatives, (d, d), by central differences of gradients."""
    steps = _STEP * torch.eye(len(u), dtype=u.dtype, device=u.device)
    rows = [
        (log_density(u - step)[1] - log_density(u + step)[1]) / (2 * _STEP)
        for step in settings.progress(list(steps), "Curvature of hyperparameters")
    ]
    matrix = torch.stack(rows)
    return (matrix + matrix.mT) / 2


def laplace(log_density: LogDensity, mode: Tensor) -> StudentT:
    """The distribution with the curvature at the mode, which is made positive definite where it is not."""
    matrix = curvature(log_density, mode)
    matrix = torch.where(matrix.isfinite(), matrix, torch.zeros_like(matrix))
    scale = matrix.diagonal().clamp_min(1 / _WIDEST**2).sqrt()
    values, vectors = torch.linalg.eigh(matrix / torch.outer(scale, scale))
    return StudentT(mode, vectors / values.clamp_min(_LEAST_CURVATURE).sqrt() / scale.unsqueeze(-1))
