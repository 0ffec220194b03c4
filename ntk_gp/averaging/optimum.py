"""The mode of a smooth log density of a few variables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], tuple[float, Tensor]]

# Of no coordinate more than this at a step: e-folds, where coordinates are logarithms.
_LONGEST_STEP = 2.0


class Optimum(NamedTuple):
    """Where a search has ended.

    :ivar u: (d,).
    :ivar value: The log density there.
    :ivar has_converged: Whether nothing is left to gain, as far as the curvature seen tells.
    :ivar is_new: Whether the search has not ended because it came to what is known.
    """

    u: Tensor
    value: float
    has_converged: bool
    is_new: bool = True


def maximise(
    log_density: LogDensity,
    start: Tensor,
    max_steps: int = 200,
    negligible: float = 1e-9,
    is_known: Callable[[Tensor], bool] | None = None,
) -> Optimum:
    """The mode by BFGS with a line search for the weak Wolfe conditions, by bisection (Lewis and Overton, "Nonsmooth
    optimization via quasi-Newton methods", 2013): where the density is -inf it steps back, as from any point too low.

    :param log_density: Of u (d,): value and gradient (d,).
    :param start: u (d,), float64.
    :param max_steps: Line searches.
    :param negligible: A mode is found where another step would gain less than this.
    :param is_known: Whether a point is near a mode that is known already, where the search ends.
    """
    u, (value, gradient) = start, log_density(start)
    if not math.isfinite(value):
        return Optimum(u, -math.inf, False)
    inverse, is_scaled = torch.eye(len(u), dtype=u.dtype, device=u.device), False
    for _ in range(max_steps):
        if is_known is not None and is_known(u):
            return Optimum(u, value, True, is_new=False)
        direction = inverse @ gradient
        gain = float(gradient @ direction)
        if gain < 2 * negligible:
            return Optimum(u, value, True)
        direction = direction * min(1.0, _LONGEST_STEP / float(direction.abs().max()))
        found = _search(log_density, u, value, gradient, direction)
        if found is None:
            # No step gains: rounding is all that is left, or the curvature seen so far misleads.
            if not is_scaled:
                return Optimum(u, value, gain < 1e-4)
            inverse, is_scaled = torch.eye(len(u), dtype=u.dtype, device=u.device), False
            continue
        new, new_value, new_gradient = found
        inverse, is_scaled = _updated(inverse, is_scaled, new - u, gradient - new_gradient), True
        u, value, gradient = new, new_value, new_gradient
    return Optimum(u, value, False)


def _search(
    log_density: LogDensity, u: Tensor, value: float, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """A point along a direction that is higher, and less steep; None where there is none."""
    slope = float(gradient @ direction)
    low, high, step, best = 0.0, math.inf, 1.0, None
    for _ in range(25):
        new = u + step * direction
        new_value, new_gradient = log_density(new)
        if not new_value >= value + 1e-4 * step * slope:
            high = step
        else:
            best = (new, new_value, new_gradient)
            if (
                float(new_gradient @ direction) <= 0.9 * slope
                or step * float(direction.abs().max()) > 2 * _LONGEST_STEP
            ):
                return best
            low = step
        step = 2 * step if high == math.inf else (low + high) / 2
    return best


def _updated(inverse: Tensor, is_scaled: bool, step: Tensor, change: Tensor) -> Tensor:
    """The inverse of the curvature, which a step and the change of slope along it tell more of."""
    along = float(step @ change)
    if along <= 1e-12 * float(step.norm() * change.norm()):
        return inverse
    if not is_scaled:
        inverse = inverse * (along / float(change @ change))
    left = torch.eye(len(step), dtype=step.dtype, device=step.device) - torch.outer(step, change) / along
    return left @ inverse @ left.mT + torch.outer(step, step) / along
