"""A parameter, or a strided view of one (a slice, a transpose), as a place in the flat parameter vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

import torch
from torch import Tensor


@dataclass(frozen=True)
class ParameterView:
    """Elements of the flat parameter vector (P numbers), read as a tensor with `shape` and `strides` from `offset` on.

    :param name: The parameter that the elements belong to.
    :param group: The parameter's group, an index into the G columns of the variances.
    """

    name: str
    group: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def overlaps_itself(self) -> bool:
        """Whether two elements may be the same number (an expanded view)."""
        reach = 0
        for stride, size in sorted((s, n) for s, n in zip(self.strides, self.shape, strict=True) if n > 1):
            if stride <= reach:
                return True
            reach += stride * (size - 1)
        return False

    @property
    def is_dense(self) -> bool:
        """Whether there are no other elements between the first and the last."""
        return not self.overlaps_itself and self.numel() == self.end - self.offset

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow one another in the order of a contiguous tensor's."""
        pairs = zip(self.shape, self.strides, contiguous_strides(self.shape), strict=True)
        return all(size == 1 or stride == expected for size, stride, expected in pairs)

    def has_rows(self, count: int, length: int) -> bool:
        """Whether a view (H, d_out, d_in) is of so many rows of this length, H·d_out and d_in, one after the other."""
        heads, rows, columns = self.shape
        return (heads * rows, columns) == (count, length) and self.is_contiguous

    @property
    def end(self) -> int:
        """One more than the place of the last element."""
        return self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)) + 1

    def _values(self, *_: object) -> NoReturn:
        raise TypeError(
            f"A rule sees no values of a selected parameter ({self.name}), only its place. Where the derivative in one "
            "parameter needs the values of another, register_decomposition puts calls that have rules in its place."
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = __truediv__ = _values

    def permute(self, *dims: int) -> ParameterView:
        return replace(
            self, shape=tuple(self.shape[dim] for dim in dims), strides=tuple(self.strides[dim] for dim in dims)
        )

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> ParameterView:
        """One dimension as several, as `torch.Tensor.unflatten`."""
        dim %= self.ndim
        known = math.prod(size for size in sizes if size != -1)
        sizes = tuple(self.shape[dim] // known if size == -1 else size for size in sizes)
        strides = [self.strides[dim] * math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        return replace(
            self,
            shape=(*self.shape[:dim], *sizes, *self.shape[dim + 1 :]),
            strides=(*self.strides[:dim], *strides, *self.strides[dim + 1 :]),
        )

    def flatten(self, start: int) -> ParameterView:
        """The dimensions from `start` on as one; they must be laid out as a contiguous tensor's."""
        size = 1
        for dim in range(self.ndim - 1, start - 1, -1):
            if self.shape[dim] > 1 and self.strides[dim] != size * self.strides[-1]:
                raise ValueError(f"The dimensions of {self} from {start} on are not contiguous.")
            size *= self.shape[dim]
        return replace(self, shape=(*self.shape[:start], size), strides=(*self.strides[:start], self.strides[-1]))

    @lru_cache(maxsize=1024)  # noqa: B019  of more views than networks have, and of no tensors
    def within(self, other: ParameterView) -> ParameterView | None:
        """This view of a tensor that is itself a view of a parameter, or None where there are no such strides.

        :param other: The tensor, whose elements are counted from 0, as a contiguous tensor's.
        """
        if other.is_contiguous:
            return replace(other, offset=other.offset + self.offset, shape=self.shape, strides=self.strides)
        places = self.read(other.indices())
        strides = [
            int(places.select(dim, 1).flatten()[0] - places.flatten()[0]) if size > 1 else 1
            for dim, size in enumerate(self.shape)
        ]
        found = replace(other, offset=int(places.flatten()[0]), shape=self.shape, strides=tuple(strides))
        return found if torch.equal(found.indices(), places.flatten()) else None

    def shift(self, elements: int) -> ParameterView:
        """The same view of a parameter that has moved."""
        return replace(self, offset=self.offset + elements)

    def read(self, flat: Tensor) -> Tensor:
        """The elements of parameter vectors (..., P): (..., *shape), a view."""
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        return flat.as_strided(
            (*flat.shape[:-1], *self.shape), (*flat.stride()[:-1], *self.strides), flat.storage_offset() + self.offset
        )

    def add_to(self, flat: Tensor, values: Tensor) -> None:
        """Adds `values` (..., *shape), or of a shape that flattens alike, to the elements of `flat` (..., P)."""
        self.read(flat).add_(values.reshape(*flat.shape[:-1], *self.shape))

    def indices(self) -> Tensor:
        """Where each element is in the flat vector."""
        index = torch.tensor(self.offset, device="cpu")
        for size, stride in zip(self.shape, self.strides, strict=True):
            index = index.unsqueeze(-1) + torch.arange(size, device="cpu") * stride
        return index.reshape(-1)

    def meets(self, other: ParameterView) -> bool:
        """Whether the two have an element in common."""
        if self.name != other.name:
            return False
        if self.is_dense and other.is_dense:
            return self.offset < other.end and other.offset < self.end
        return bool(torch.isin(self.indices(), other.indices()).any())


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))
