"""Bilinear layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from ..terms import ParameterView, Term
from .registry import UnsupportedUse, Use, register_rule


def bilinear(
    use: Use, input1: Tensor, input2: Tensor, weight: ParameterView, bias: ParameterView | None = None
) -> Iterable[Term]:
    """z_o = xᵀ W_o y + b_o: linear in the products x_i y_j."""
    use.decline_points_in_last(1)
    products = (input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2)
    try:
        matrix = weight.flatten(1) if isinstance(weight, ParameterView) else weight
    except ValueError as error:
        raise UnsupportedUse(str(error)) from error
    return use.matrix(matrix, bias, products)


register_rule(F.bilinear, bilinear)
