"""Linear layers and products with a raw matrix."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..terms import MatrixTerm, ParameterView, Term
from .registry import UnsupportedUse, Use, register_rule


def linear(use: Use, input: Tensor, weight: ParameterView, bias: ParameterView | None = None) -> Iterable[Term]:
    """z = a Wᵀ + b."""
    use.decline_points_in_last(1)
    return use.matrix(weight, bias, input)


def addmm(
    use: Use, input: ParameterView, mat1: Tensor, mat2: ParameterView, *, beta: float = 1, alpha: float = 1
) -> Iterable[Term]:
    """z = β b + α a W."""
    use.decline_points_not_first()
    terms = []
    if isinstance(mat2, ParameterView):
        terms += use.matrix(mat2.permute(1, 0), None, alpha * mat1)
    return terms + use.features(input, beta * use.sum_to(input, use.gradients))


def matmul(use: Use, input: Tensor | ParameterView, other: Tensor | ParameterView) -> Iterable[Term]:
    """z = a W, z = W a, or both batched; the raw parameter is on either side."""
    if isinstance(input, Tensor) and isinstance(other, ParameterView):
        return _times_parameter(use, input, other)
    if isinstance(input, ParameterView) and isinstance(other, Tensor):
        return _parameter_times(use, input, other)
    raise UnsupportedUse("a product of two parameters")


def _times_parameter(use: Use, input: Tensor, other: ParameterView) -> Iterable[Term]:
    g = use.gradients
    if other.ndim == 1:  # a vector: one output, which has no dimension
        return use.matrix(other.unflatten(0, (1, -1)), None, input, g.unsqueeze(-1))
    if other.ndim == 2:
        use.decline_points_in_last(1)
        return use.matrix(other.permute(1, 0), None, input)
    if other.ndim == 3:
        return _times_heads(use, input, other)
    raise UnsupportedUse("a product with a batch of batches of matrices")


def _times_heads(use: Use, input: Tensor, other: ParameterView) -> Iterable[Term]:
    """z_h = a_h W_h, one matrix for each head h; where there is one a, or one W, it is the same for all heads."""
    g = use.gradients
    if use.point_dim == use.ndim - 2 == 1 and not use.split:  # (H or none, n, d_in) at the beginning
        input = input.unsqueeze(1) if input.dim() == 2 else input
        input, g = input.unsqueeze(-2), g.unsqueeze(-2)  # (n, H or 1, 1, d_in), (n, C, H, 1, d_out)
    else:
        use.decline_points_in_last(3)
    a = input.expand(*g.shape[:1], *g.shape[2:-1], input.shape[-1])  # (n, *positions, H, rows, d_in)
    a, g = (t.transpose(-3, -2) for t in (a, g))
    if other.shape[0] == 1:
        a, g = a.unsqueeze(-2), g.unsqueeze(-2)
    a, g = a.flatten(1, -3), g.flatten(2, -3)
    return [MatrixTerm(other.permute(0, 2, 1), None, a.unsqueeze(0), g.unsqueeze(0))]


def _parameter_times(use: Use, input: ParameterView, other: Tensor) -> Iterable[Term]:
    if input.ndim != 2 or use.ndim < 3:
        raise UnsupportedUse("a product from the left that is not a matrix with a batch of matrices")
    use.decline_points_in_last(2)
    return use.matrix(input, None, other.mT, use.gradients.mT)


register_rule(F.linear, linear)
register_rule(torch.addmm, addmm, parameters=("input", "mat2"))
for _function in (torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm):
    register_rule(_function, matmul, parameters=("input", "other"))
