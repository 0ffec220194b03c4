"""Where the points are in a recorded call's tensors: which dimension runs over them, found by recording twice.

A network may move its inputs' rows to any dimension, and fold others into it (all the windows of all the images). What
follows needs to know which element is whose, so shapes at two numbers of points are compared, and every later recording
must have the shapes that follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rules import UnsupportedUse
from .record import RecordedUse, Recording

Place = tuple[int, bool]  # the dimension that runs over the points, and whether it runs over positions too


@dataclass
class TensorLayout:
    """How the shape of a tensor follows the number of points: found by recording at two numbers of them.

    :param place: Where the points are, or None where the shape is always the same.
    :param shape: The shape at `points` points.
    """

    place: Place | None
    shape: torch.Size
    points: int

    @classmethod
    def compare(cls, shape: torch.Size, other: torch.Size, n: int, m: int) -> TensorLayout:
        changed = [dim for dim, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b]
        if len(changed) != 1:
            return cls(None, shape, n)
        dim = changed[0]
        return cls((dim, shape[dim] != n), shape, n)

    def shape_at(self, n: int) -> tuple[int, ...]:
        if self.place is None:
            return tuple(self.shape)
        dim = self.place[0]
        return (*self.shape[:dim], self.shape[dim] * n // self.points, *self.shape[dim + 1 :])

    def take(self, tensor: Tensor, n: int, rows: Tensor) -> Tensor:
        """The tensor, of n points, at some of them; as it is where it does not depend on them."""
        return tensor if self.place is None else take_points(tensor, self.place, n, rows)

    def first(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor with the points first, (n, …); as it is where it does not depend on them."""
        return tensor if self.place is None else points_first(tensor, self.place, n)


@dataclass
class Layout:
    """Where the points are in one use: in its result, and in each of its tensor arguments."""

    result: TensorLayout
    arguments: dict[str, TensorLayout]

    @classmethod
    def compare(cls, use: RecordedUse, other: RecordedUse, n: int, m: int) -> Layout:
        """Of a use recorded at n points and at m."""
        arguments = {k: TensorLayout.compare(v.shape, other.tensors[k].shape, n, m) for k, v in use.tensors.items()}
        return cls(TensorLayout.compare(use.shape, other.shape, n, m), arguments)

    def check(self, use: RecordedUse, n: int) -> None:
        """Raises UnsupportedUse where a use recorded at n points is not laid out like this."""
        if self.result.place is None:
            raise UnsupportedUse("the result does not depend on the points one by one")
        shapes = [(self.result, use.shape), *((self.arguments[k], v.shape) for k, v in use.tensors.items())]
        for layout, shape in shapes:
            if tuple(shape) != layout.shape_at(n):
                raise UnsupportedUse("shapes do not follow the number of points")

    def points_first(self, use: RecordedUse, gradients: Tensor, n: int) -> tuple[dict[str, Tensor], Tensor]:
        """The tensor arguments of a use at n points, (n, …) where they depend on them, and its gradients, (n, C, …).

        :param gradients: g at the use's result, (C, *shape).
        :raises UnsupportedUse: Where the use is not laid out like this.
        """
        self.check(use, n)
        assert self.result.place is not None
        if use.rule.elementwise:
            arguments = {k: points_first(v.expand(use.shape), self.result.place, n) for k, v in use.tensors.items()}
        else:
            arguments = {k: self.arguments[k].first(v, n) for k, v in use.tensors.items()}
        dim, split = self.result.place
        return arguments, points_first(gradients, (dim + 1, split), n).movedim(1 + split, 1)


def compare_layouts(first: Recording, second: Recording) -> list[Layout]:
    """Of every use, from recordings at two numbers of points."""
    n, m = first.output.shape[0], second.output.shape[0]
    return [Layout.compare(use, other, n, m) for use, other in zip(first.uses, second.uses, strict=True)]


def points_first(tensor: Tensor, place: Place, n: int) -> Tensor:
    """A tensor at n points, (n, …)."""
    dim, split = place
    tensor = tensor.movedim(dim, 0)
    return tensor.unflatten(0, (n, -1)) if split else tensor


def take_points(tensor: Tensor, place: Place, n: int, rows: Tensor) -> Tensor:
    """A tensor at some of its n points, laid out as it is: memory of its own."""
    dim, split = place
    if split:
        positions = tensor.shape[dim] // n
        rows = (rows.unsqueeze(1) * positions + torch.arange(positions, device=rows.device)).flatten()
    return tensor.index_select(dim, rows)
