"""What hyperparameters are drawn from before they are weighted: Student's t distributions, one for each mode."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

# Degrees of freedom: little is lost where the density is Gaussian, and weights stay bounded where its tails are
# heavier.
_FREEDOM = 8.0


@dataclass(frozen=True)
class StudentT:
    """A multivariate t distribution.

    :ivar center: (d,).
    :ivar root: R of its shape matrix R Rᵀ, (d, d).
    """

    center: Tensor
    root: Tensor

    def draw(self, uniform: Tensor) -> Tensor:
        """One draw for each row of uniform numbers (S, d + 1): (S, d)."""
        normals = torch.special.ndtri(uniform[:, :-1])
        return self.center + normals * (_FREEDOM / _chi_square(uniform[:, -1:])).sqrt() @ self.root.mT

    def log_density(self, u: Tensor) -> Tensor:
        """At u (S, d): (S,)."""
        d = u.shape[-1]
        standard = self._standard(u).square().sum(0)
        constant = math.lgamma((_FREEDOM + d) / 2) - math.lgamma(_FREEDOM / 2) - d / 2 * math.log(_FREEDOM * math.pi)
        log_volume = torch.linalg.slogdet(self.root)[1]
        return constant - log_volume - (_FREEDOM + d) / 2 * (standard / _FREEDOM).log1p()

    def is_near(self, u: Tensor) -> bool:
        """Whether u (d,) is within a standard deviation of the centre."""
        return float(self._standard(u.unsqueeze(0)).norm()) < 1.0

    def _standard(self, u: Tensor) -> Tensor:
        return torch.linalg.solve(self.root, (u - self.center).mT)


@dataclass(frozen=True)
class Several:
    """A mixture of t distributions, one around each of several modes.

    :ivar parts: The distributions.
    :ivar weights: (K,), that add up to one.
    """

    parts: tuple[StudentT, ...]
    weights: Tensor

    @property
    def center(self) -> Tensor:
        """Of the part with the largest weight."""
        return self.largest.center

    @property
    def largest(self) -> StudentT:
        return self.parts[int(self.weights.argmax())]

    def draw(self, uniform: Tensor) -> Tensor:
        """One draw for each row of uniform numbers (S, d + 1); as many from each part as its weight says."""
        pieces = uniform.split(self._counts(len(uniform)))
        return torch.cat([part.draw(piece) for part, piece in zip(self.parts, pieces, strict=True)])

    def log_density(self, u: Tensor) -> Tensor:
        """At the draws u (S, d): (S,)."""
        parts = torch.stack([part.log_density(u) for part in self.parts])
        shares = parts.new_tensor(self._counts(len(u))) / len(u)
        return (parts + shares.log().unsqueeze(-1)).logsumexp(0)

    def _counts(self, draws: int) -> list[int]:
        ends = (self.weights.cumsum(0) * draws).round().long().tolist()
        return [end - begin for begin, end in zip([0, *ends[:-1]], [*ends[:-1], draws], strict=True)]


def with_moments(u: Tensor, log_weights: Tensor, first: StudentT) -> StudentT:
    """The distribution with the moments of draws (S, d) whose weights were too uneven to be used.

    The weights are raised to the power at which they are worth a quarter of the draws, and at least 2 d if there are as
    many, so that no single one decides; what they do not determine is as in the first distribution.
    """
    usable = log_weights > -math.inf
    u, log_weights = u[usable], log_weights[usable]
    count, d = u.shape
    weights = _tempered(log_weights, min(max(count / 4, 2 * d), 0.9 * count))
    center = weights @ u
    spread = (u - center) * weights.sqrt().unsqueeze(-1)
    size = float(1 / weights.square().sum())
    known = size / (size + d)
    covariance = known * spread.mT @ spread + (1 - known) * first.root @ first.root.mT
    return StudentT(center, torch.linalg.cholesky(covariance))


def _tempered(log_weights: Tensor, size: float) -> Tensor:
    """Weights to a power of at most 1 at which they are worth so many draws."""
    low, high = 0.0, 1.0
    for _ in range(40):
        power = (low + high) / 2
        weights = (power * log_weights).softmax(0)
        if float(1 / weights.square().sum()) < size:
            high = power
        else:
            low = power
    return (low * log_weights).softmax(0)


def uniform_points(dimension: int, draws: int, seed: int, like: Tensor) -> Tensor:
    """Quasi-random points in a cube, (S, dimension): drawn on the CPU, where torch's engine is."""
    with torch.device("cpu"):
        points = SobolEngine(dimension, scramble=True, seed=seed).draw(draws, dtype=torch.float64)
    return points.clamp(1e-10, 1 - 1e-10).to(like)


def reduced(weights: Tensor, count: int) -> Tensor:
    """Weights of which at most `count` are not zero: large ones are kept, and some of the small ones stand for the
    others (Fearnhead and Clifford, "On-line inference for hidden Markov models via particle filters", 2003; drawn
    systematically).

    :param weights: (S,), that add up to one.
    """
    if int((weights > 0).sum()) <= count:
        return weights
    low, high = 0.0, 1.0
    for _ in range(60):
        threshold = (low + high) / 2
        if float((weights / threshold).clamp_max(1).sum()) > count:
            low = threshold
        else:
            high = threshold
    is_kept = weights >= high
    left = count - int(is_kept.sum())
    new = torch.where(is_kept, weights, torch.zeros_like(weights))
    if left > 0:
        small = torch.where(is_kept, torch.zeros_like(weights), weights)
        places = torch.searchsorted(small.cumsum(0) / small.sum(), _spread_evenly(left, weights))
        new[places.clamp_max(len(weights) - 1)] += small.sum() / left
    return new / new.sum()


def _spread_evenly(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


def _chi_square(uniform: Tensor) -> Tensor:
    """The quantiles of χ² with _FREEDOM degrees, by bisection."""
    shape = torch.full_like(uniform, _FREEDOM / 2)
    low, high = torch.zeros_like(uniform), torch.full_like(uniform, 200.0)
    for _ in range(60):
        middle = (low + high) / 2
        is_below = torch.special.gammainc(shape, middle / 2) < uniform
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    return (low + high) / 2
