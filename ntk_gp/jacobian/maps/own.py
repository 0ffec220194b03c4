"""Functions through which the use of a matrix can be pulled back without leaving products of matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..terms import Term
from .computed import Operand
from .registry import Pull, ScaleTerm, UnsupportedMap, register_map

Value = Operand | float


def add(pull: Pull, input: Value, other: Value, *, alpha: float = 1) -> list[Term]:
    """θ = input + α other."""
    return [*pull.to(input), *_times(pull, other, alpha)]


def subtract(pull: Pull, input: Value, other: Value, *, alpha: float = 1) -> list[Term]:
    return add(pull, input, other, alpha=-alpha)


def subtract_from(pull: Pull, input: Value, other: Value) -> list[Term]:
    """θ = other − input."""
    return [*pull.to(other), *_times(pull, input, -1)]


def negate(pull: Pull, input: Value) -> list[Term]:
    return _times(pull, input, -1)


def same_elements(pull: Pull, input: Value, *sizes: Any, **options: Any) -> list[Term]:
    """Copies and reshapes."""
    return pull.to(input)


def _times(pull: Pull, operand: Value, number: float) -> list[Term]:
    return pull.to(operand, pull.term if number == 1 else pull.term.scaled(pull.value(number)))


def multiply(pull: Pull, input: Value, other: Value) -> list[Term]:
    """θ = matrix ∘ scale, whichever comes first."""
    shape = pull.computed.value.shape
    for matrix, scale in ((input, other), (other, input)):
        if isinstance(matrix, Operand) and matrix.value.shape == shape and (kind := pull.scale(scale, shape)):
            values = pull.value(scale)
            return _scaled(pull, matrix, scale, kind, values, torch.ones_like(values))
    raise UnsupportedMap("neither operand is one number, or one for each row")


def divide(pull: Pull, input: Value, other: Value) -> list[Term]:
    """θ = matrix / scale."""
    kind = pull.scale(other, pull.computed.value.shape)
    if not isinstance(input, Operand) or kind is None or input.value.shape != pull.computed.value.shape:
        raise UnsupportedMap("the divisor is not one number, or one for each row")
    values = pull.value(other).reciprocal()
    return _scaled(pull, input, other, kind, values, values.square() if pull.squared else -values.square())


def _scaled(pull: Pull, matrix: Operand, scale: Value, kind: str, values: Tensor, derivatives: Tensor) -> list[Term]:
    """θ = t(s) ∘ w, of numbers t or one for each row.

    :param values: t.
    :param derivatives: t'(s).
    """
    term, values, derivatives = pull.term, values.flatten(), derivatives.flatten()
    terms = pull.to(matrix, term.scaled(values[0]) if kind == "number" else term.scaled_rows(values))
    if isinstance(scale, Operand) and scale.view is not None:
        numbers = term.weight.read(pull.value(matrix).reshape(-1)).flatten(0, 1)
        products = term.row_products(numbers)
        products = products.sum(-1, keepdim=True) if kind == "number" else products
        terms.append(ScaleTerm(scale.view, products * derivatives, matrix, values / derivatives))
    return terms


def matmul(pull: Pull, input: Value, other: Value) -> list[Term]:
    """θ = B A: B multiplies A a, and A, a, with the gradients Bᵀ g."""
    if not (isinstance(input, Operand) and isinstance(other, Operand)):
        raise UnsupportedMap("not a product of two tensors")
    if input.value.dim() != 2 or other.value.dim() != 2 or pull.term.weight.shape[0] != 1:
        raise UnsupportedMap("not a product of two matrices")
    shape = pull.computed.value.shape
    left, right = pull.value(input), pull.value(other)
    left_view, right_view = input.view, other.view
    if pull.term.weight.is_contiguous and pull.term.weight.shape[1:] == shape:
        pass
    elif pull.term.weight.permute(0, 2, 1).is_contiguous and pull.term.weight.shape[1:] == shape[::-1]:  # θᵀ = Aᵀ Bᵀ
        left, right = right.mT, left.mT
        left_view, right_view = (None if view is None else view.permute(1, 0) for view in (right_view, left_view))
    else:
        raise UnsupportedMap("a part of the product is used")
    first, second = pull.term.factors_of_product(left, right)
    pairs = ((first, left_view), (second, right_view))
    return [term.moved(view.unflatten(0, (1, -1))) for term, view in pairs if view is not None]


_SAME: Sequence[Callable] = (
    torch.clone,
    torch.Tensor.clone,
    torch.Tensor.contiguous,
    torch.Tensor.reshape,
    torch.Tensor.view,
    torch.Tensor.flatten,
    torch.Tensor.unflatten,
    torch.Tensor.squeeze,
    torch.Tensor.unsqueeze,
    torch.reshape,
    torch.flatten,
    torch.squeeze,
    torch.unsqueeze,
)
_MAPS: dict[Callable, tuple[Callable, ...]] = {
    add: (torch.add, torch.Tensor.add),
    subtract: (torch.sub, torch.subtract, torch.Tensor.sub, torch.Tensor.subtract),
    subtract_from: (torch.rsub, torch.Tensor.__rsub__),
    negate: (torch.neg, torch.negative, torch.Tensor.neg),
    multiply: (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply),
    divide: (torch.div, torch.divide, torch.true_divide, torch.Tensor.div, torch.Tensor.divide),
    matmul: (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm),
    same_elements: tuple(_SAME),
}
for _map, _functions in _MAPS.items():
    for _function in _functions:
        register_map(_function, _map)
