"""Trained parameters without their constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from torch import Tensor, nn

from .._compat import transforms_of

_Item = TypeVar("_Item")


class Coordinate:
    """One tensor of parameters θ as coordinates u without constraints.

    u = log(θ - lower) where θ is bounded below, log(upper - θ) above, log(θ - lower) - log(upper - θ) on both sides,
    and θ itself without bounds; whatever the transform is that GPyTorch keeps the raw parameter by.

    :param name: Of the raw parameter in the model.
    :param parameter: The raw parameter.
    :param constraint: What GPyTorch makes θ of it by, or None.
    """

    def __init__(self, name: str, parameter: nn.Parameter, constraint: Interval | None):
        self.name = name
        self.parameter = parameter
        self.constraint = constraint
        self.has_lower = constraint is not None and bool((constraint.lower_bound > -math.inf).all())
        self.has_upper = constraint is not None and bool((constraint.upper_bound < math.inf).all())

    @property
    def public_name(self) -> str:
        """The name of θ: the parameter's without `raw_`."""
        owner, _, name = self.name.rpartition(".")
        return f"{owner}.{name.removeprefix('raw_')}".lstrip(".")

    def value(self) -> Tensor:
        """θ, float64."""
        raw = self.parameter.detach()
        return (raw if self.constraint is None else self.constraint.transform(raw)).double()

    def u(self) -> Tensor:
        """The present u, in the parameter's shape."""
        value = self.value()
        above = (value - self.constraint.lower_bound).log() if self.has_lower else None  # type: ignore[union-attr]
        below = (self.constraint.upper_bound - value).log() if self.has_upper else None  # type: ignore[union-attr]
        if above is None:
            return value if below is None else below
        return above if below is None else above - below

    def raw(self, u: Tensor) -> Tensor:
        """The raw parameter for u of its shape, differentiable."""
        if self.constraint is None or not (self.has_lower or self.has_upper):
            return u
        lower, upper = self.constraint.lower_bound.double(), self.constraint.upper_bound.double()
        if self.has_lower and self.has_upper:
            value = lower + (upper - lower) * u.sigmoid()
        else:
            value = lower + u.exp() if self.has_lower else upper - u.exp()
        return self.constraint.inverse_transform(value)

    def is_alike(self, other: Coordinate) -> bool:
        """Whether the raw parameters are the same functions of u, entry by entry, as far as is known of GPyTorch's own
        constraints."""
        one, another = self.constraint, other.constraint
        if one is None or another is None:
            return one is another
        bounds = [(each.lower_bound, each.upper_bound) for each in (one, another)]
        if type(one) is not type(another) or type(one) not in (Interval, GreaterThan, LessThan, Positive):
            return False
        if any(bound.dim() for pair in bounds for bound in pair):
            return False
        (low, high), (other_low, other_high) = bounds
        return bool(low == other_low and high == other_high) and transforms_of(one) == transforms_of(another)


class Coordinates:
    """Several of them as one vector u, (d,) in float64."""

    def __init__(self, coordinates: Sequence[Coordinate]):
        self.each = list(coordinates)
        self.parameters = [coordinate.parameter for coordinate in self.each]
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self._alike = grouped(range(len(self.each)), lambda i, group: self.each[i].is_alike(self.each[group[0]]))

    def u(self) -> Tensor:
        """The present u."""
        return torch.cat([coordinate.u().flatten() for coordinate in self.each])

    def raw(self, u: Tensor) -> list[Tensor]:
        """The raw parameters for u (d,), each in its shape, differentiable; those that are alike at once."""
        shapes = [parameter.shape for parameter in self.parameters]
        pieces, raw = u.split(self.sizes), {}
        for first, *others in self._alike:
            if not others:  # its bounds may be of its shape
                raw[first] = self.each[first].raw(pieces[first].reshape(shapes[first]))
                continue
            together = self.each[first].raw(torch.cat([pieces[i] for i in (first, *others)]))
            raw.update(zip((first, *others), together.split([self.sizes[i] for i in (first, *others)]), strict=True))
        return [raw[i].reshape(shape) for i, shape in enumerate(shapes)]


def grouped(items: Iterable[_Item], joins: Callable[[_Item, list[_Item]], bool]) -> list[list[_Item]]:
    """Items in groups: each is put into the first one that it joins, or begins another."""
    groups: list[list[_Item]] = []
    for item in items:
        group = next((group for group in groups if joins(item, group)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    return groups
