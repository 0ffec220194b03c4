"""Raw parameters that are added, multiplied or expanded: positional embeddings, class tokens, LayerScale."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..terms import ParameterView, Term
from .registry import UnsupportedUse, Use, register_rule

Operand = ParameterView | Tensor | float


def add(use: Use, input: Operand, other: Operand, *, alpha: float = 1) -> Iterable[Term]:
    g = use.gradients
    return [
        *use.features(input, use.sum_to(input, g)),
        *use.features(other, alpha * use.sum_to(other, g)),
    ]


def subtract(use: Use, input: Operand, other: Operand, *, alpha: float = 1) -> Iterable[Term]:
    return add(use, input, other, alpha=-alpha)


def multiply(use: Use, input: Operand, other: Operand) -> Iterable[Term]:
    if isinstance(input, ParameterView) and isinstance(other, ParameterView):
        raise UnsupportedUse("a product of two parameters")
    parameter, factor = (input, other) if isinstance(input, ParameterView) else (other, input)
    factor = factor.unsqueeze(1) if isinstance(factor, Tensor) else factor
    return use.features(parameter, use.sum_to(parameter, use.gradients * factor))


def expand(use: Use, input: ParameterView, *sizes: Any) -> Iterable[Term]:
    return use.features(input, use.sum_to(input, use.gradients))


_ADDITIONS: tuple[Callable, ...] = (torch.add, torch.Tensor.add, torch.Tensor.add_)
_SUBTRACTIONS: tuple[Callable, ...] = (torch.sub, torch.subtract, torch.Tensor.sub, torch.Tensor.subtract)
_PRODUCTS: tuple[Callable, ...] = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply)
_EXPANSIONS: tuple[Callable, ...] = (
    torch.Tensor.expand,
    torch.Tensor.expand_as,
    torch.Tensor.repeat,
    torch.broadcast_to,
)
for _rule, _functions in ((add, _ADDITIONS), (subtract, _SUBTRACTIONS), (multiply, _PRODUCTS)):
    for _function in _functions:
        register_rule(_function, _rule, parameters=("input", "other"), elementwise=True)
for _function in _EXPANSIONS:
    register_rule(_function, expand, parameters=("input",))
