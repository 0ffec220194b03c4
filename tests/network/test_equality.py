"""Modules are taken for the same only where nothing in them differs."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ntk_gp.network.equality import same_module

pytestmark = pytest.mark.engine_independent


@dataclass
class Settings:
    rate: float
    names: list[str]


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: float):
        self.value = value


def scaled(x: torch.Tensor, by: float) -> torch.Tensor:
    return by * x


def unlike(x: torch.Tensor) -> torch.Tensor:
    return x


# What an attribute is, and what another module has in its place.
DIFFERENT = {
    "number": (1.0, 2.0),
    "kind of number": (1, 1.0),
    "sign of zero": (0.0, -0.0),
    "string": ("relu", "tanh"),
    "nothing": (None, 0),
    "flag": (True, False),
    "function": (unlike, scaled),
    "arguments of a function": (functools.partial(scaled, by=1.0), functools.partial(scaled, by=2.0)),
    "list": ([1, 2], [2, 1]),
    "longer": ((1, 2), (1, 2, 3)),
    "set": ({1, 2}, {1, 3}),
    "nested": ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}),
    "key": ({"a": 1}, {"b": 1}),
    "order": (OrderedDict(a=1, b=2), OrderedDict(b=2, a=1)),
    "default": (defaultdict(list), defaultdict(set)),
    "length of a queue": (deque([1], maxlen=1), deque([1], maxlen=2)),
    "tensor": (torch.ones(2), torch.tensor([1.0, 2.0])),
    "dtype": (torch.ones(2), torch.ones(2).double()),
    "array": (np.arange(3), np.arange(3) + 1),
    "object": (SimpleNamespace(a=1), SimpleNamespace(a=2)),
    "dataclass": (Settings(1.0, ["a"]), Settings(1.0, ["b"])),
    "slots": (Slotted(1.0), Slotted(2.0)),
    "random numbers": (random.Random(0), random.Random(1)),
    "module": (nn.Dropout(0.1), nn.Dropout(0.2)),
    "kind of module": (nn.Tanh(), nn.ReLU()),
    "bound method": (SimpleNamespace(a=1).__repr__, SimpleNamespace(a=2).__repr__),
}


def holder(value: object) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2, device="meta"))
    module.value = value
    return module


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_copy_is_the_same_and_another_is_not(name):
    one, other = (holder(value) for value in DIFFERENT[name])
    assert not same_module(one, other)
    assert not same_module(other, one)
    copied = same_module(one, copy.deepcopy(one))
    assert copied or name in ("bound method", "random numbers")  # which may count as different
    assert same_module(one, one)


def test_hooks_and_mode():
    one = holder(1)
    other = copy.deepcopy(one).eval()
    assert not same_module(one, other)
    other = copy.deepcopy(one)
    other[0].register_forward_hook(lambda *_: None)
    assert not same_module(one, other)


def test_which_are_one_object():
    inner = [1]
    assert same_module(holder([inner, inner]), holder([copy.copy(inner)] * 2))
    assert not same_module(holder([inner, inner]), holder([[1], [1]]))
    assert not same_module(holder([[1], [1]]), holder([inner, inner]))


def test_objects_that_hold_themselves():
    one, other = holder(None), holder(None)
    one.value, other.value = [one], [other]
    assert same_module(one, other)
    other.value.append(1)
    assert not same_module(one, other)


def test_what_cannot_be_compared_counts_as_different():
    class Refuses:
        def __reduce_ex__(self, protocol):
            raise TypeError

    assert not same_module(holder(Refuses()), holder(Refuses()))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert not same_module(*map(holder, generators))


def test_parameters_on_the_meta_device_by_shape():
    assert not same_module(nn.Linear(2, 3, device="meta"), nn.Linear(2, 4, device="meta"))
    assert not same_module(nn.Linear(2, 3, device="meta"), nn.Linear(2, 3, device="meta", bias=False))
