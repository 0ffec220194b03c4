"""Newton's method for the mode of the latent function: monotone, from anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .log_densities import LogDensity
from .spaces import Curvature, Position, Space

# How far from the mode the search ends, in standard deviations of the posterior. It is known from the gradient g:
# √(gᵀ (K⁻¹ + H)⁻¹ g), the Newton decrement. What rounding leaves, in huge priors, may be more; below the second
# number nobody is told.
_CONVERGED = 1e-9
_ROUNDING = 1e-6
_MOST_STEPS = 200
# Where no latent value moves by more than this, H is constant to as much, and the whole step is right.
_SMALL_MOVE = 1e-3


class Mode(NamedTuple):
    """Where log p(y | f) − ½ (f − m)ᵀ K⁻¹ (f − m) is largest.

    :param position: f̂.
    :param curvature: K⁻¹ + H there.
    :param steps: How many Newton steps were taken.
    :param distance: From the mode, in standard deviations of the posterior.
    """

    position: Position
    curvature: Curvature
    steps: int
    distance: float


def find_mode(space: Space, density: LogDensity, mean: Tensor, start: Tensor | None = None) -> Mode:
    """The mode, from the prior mean or from a better start.

    Each step goes along Newton's direction as far as the objective, which is concave, keeps rising: it never falls.

    :param mean: m, (n, C).
    :param start: Coordinates to start from, if they are better.
    :warns NumericalWarning: If the search ends before it has converged.
    """
    objective = _Objective(space, density, mean)
    position = objective.best_start(start)
    best, stalled = float("inf"), 0
    for steps in range(_MOST_STEPS):
        f = objective.latent(position)
        curvature = space.curved(density.curvature_root(f))
        gradient = density.gradient(f).reshape(-1)
        step = curvature.newton_step(position, gradient)
        slope = float(step.latent @ gradient - space.inner(position, step))
        distance = max(slope, 0.0) ** 0.5
        stalled = stalled + 1 if distance > best / 2 else 0
        best = min(best, distance)
        if distance <= _CONVERGED or (stalled >= 3 and distance <= _ROUNDING):
            return Mode(position, curvature, steps, distance)
        # The coordinates are what is added to; f is computed from them, so that rounding does not add up.
        length = objective.step_length(position, step, slope)
        position = space.at(position.coordinates + length * step.coordinates)
    warnings.warn(
        f"Laplace's approximation has not reached the mode: after {_MOST_STEPS} Newton steps it is {distance:.1e} of "
        "the posterior's standard deviations away. The kernel's scale is likely to be far too large; give it a "
        "constraint or a prior.",
        NumericalWarning,
        stacklevel=2,
    )
    return Mode(position, curvature, _MOST_STEPS, distance)


class _Objective:
    """log p(y | f) − ½ (f − m)ᵀ K⁻¹ (f − m)."""

    def __init__(self, space: Space, density: LogDensity, mean: Tensor):
        self.space, self.density, self.mean = space, density, mean

    def latent(self, position: Position) -> Tensor:
        """f, (n, C)."""
        return self.mean + position.latent.view_as(self.mean)

    def value(self, position: Position) -> float:
        return float(self.density.value(self.latent(position)) - self.space.inner(position, position) / 2)

    def best_start(self, start: Tensor | None) -> Position:
        """The prior mean, or what is given where that is higher."""
        zero = Position(self.mean.new_zeros(self.space.num_coordinates), torch.zeros_like(self.mean).reshape(-1))
        if start is None or start.shape != zero.coordinates.shape:
            return zero
        given = self.space.at(start.to(self.mean))
        return given if self.value(given) > self.value(zero) else zero

    def step_length(self, position: Position, step: Position, slope: float) -> float:
        """How far to go: the whole step where that is right."""
        if float(step.latent.abs().max()) <= _SMALL_MOVE:
            return 1.0
        across, along = (float(self.space.inner(other, step)) for other in (position, step))

        def slope_at(length: float) -> float:
            f = self.latent(position.plus(step, length))
            return float(step.latent @ self.density.gradient(f).reshape(-1)) - across - length * along

        whole = slope_at(1.0)
        rises = self.value(position.plus(step, 1.0)) >= self.value(position)
        if abs(whole) <= slope / 2 and rises:
            return 1.0
        return _uphill(slope_at, slope, whole)


def _uphill(slope_at: Callable[[float], float], slope: float, whole: float) -> float:
    """Where a concave function of the length still rises, but half as steeply at most: there it is higher.

    :param slope: At zero.
    :param whole: At one.
    """
    low, high = 0.0, 1.0
    while whole > slope / 2 and high < 1e6:
        low, high = high, 2 * high
        whole = slope_at(high)
    if 0 <= whole <= slope / 2:
        return high
    for _ in range(100):
        middle = (low + high) / 2
        found = slope_at(middle)
        if 0 <= found <= slope / 2:
            return middle
        low, high = (middle, high) if found > 0 else (low, middle)
    return low
