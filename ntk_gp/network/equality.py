"""Whether two modules do the same: whether nothing that either holds differs from what the other holds in its place."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Equal by value, and never changed.
_VALUES = (bool, int, str, bytes, range, slice, torch.dtype, torch.device, torch.Size)
# One and the same for both, or not equal.
_IDENTITIES = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


def same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules, copies of one perhaps, are known to compute the same.

    Everything they hold is compared: tensors bit by bit (by shape and dtype on the meta device, where snapshots keep
    their modules), numbers, strings and functions, in attributes, containers and objects; and which of these are one
    object. What cannot be compared counts as different.
    """
    try:
        return _Comparison().same(one, other)
    except RecursionError:  # objects within objects, too many to follow
        return False


class _Comparison:
    def __init__(self) -> None:
        self._partner: dict[int, int] = {}  # of each object on the left, that on the right, and back
        self._partner_of_other: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no number is that of another object

    def same(self, one: Any, other: Any) -> bool:
        if one is other:
            return True
        if type(one) is not type(other) or isinstance(one, _IDENTITIES):
            return False
        if isinstance(one, float | complex):  # NaN is the same as NaN, and zeros have signs
            return repr(one) == repr(other)
        if isinstance(one, _VALUES):
            return one == other
        if id(one) in self._partner or id(other) in self._partner_of_other:
            return self._partner.get(id(one)) == id(other)
        self._partner[id(one)], self._partner_of_other[id(other)] = id(other), id(one)
        self._alive += [one, other]
        return self._same_contents(one, other)

    def _same_contents(self, one: Any, other: Any) -> bool:
        if isinstance(one, Tensor):
            return _same_tensor(one, other)
        if isinstance(one, np.ndarray):
            return one.dtype == other.dtype != object and one.shape == other.shape and one.tobytes() == other.tobytes()
        if type(one) is dict:
            return self._all_same(one.keys(), other.keys()) and self._all_same(one.values(), other.values())
        if type(one) in (list, tuple):
            return self._all_same(one, other)
        if type(one) in (set, frozenset):
            return one == other and all(isinstance(item, (*_VALUES, *_IDENTITIES)) for item in one)
        if isinstance(one, nn.Module):
            return self.same(vars(one), vars(other))
        return self._same_objects(one, other)

    def _same_objects(self, one: Any, other: Any) -> bool:
        """By what a copy of them would be made from, and by their attributes."""
        try:
            parts, others = (_parts_of_copy(value) for value in (one, other))
        except Exception:  # whatever refuses to be copied
            return False
        return self._all_same(parts, others) and self._all_same(_items(one), _items(other))

    def _all_same(self, ones: Iterable[Any], others: Iterable[Any]) -> bool:
        ones, others = list(ones), list(others)
        return len(ones) == len(others) and all(map(self.same, ones, others))


def _items(value: Any) -> Iterable[Any]:
    return getattr(value, "__dict__", {}).items()


def _parts_of_copy(value: Any) -> list[Any]:
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        raise TypeError("A name says nothing of what is behind it.")
    return [list(part) if isinstance(part, Iterator) else part for part in reduced]


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device, one.layout) != (other.shape, other.dtype, other.device, other.layout):
        return False
    if one.is_meta:
        return True
    return one.layout == torch.strided and not one.is_quantized and torch.equal(one, other)
