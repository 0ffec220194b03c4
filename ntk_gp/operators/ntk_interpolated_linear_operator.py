"""Interpolation from a grid that a neural tangent kernel is evaluated on, plus noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from linear_operator.operators import DiagLinearOperator, InterpolatedLinearOperator, SumLinearOperator
from linear_operator.utils.errors import NotPSDError
from torch import Tensor

from ._solved_by_structure import SolvedByStructure, symmetric


class _Woodbury(NamedTuple):
    """W B Wᵀ + D, with C = I + B Wᵀ D⁻¹ W."""

    weights: Tensor  # W, (*batch, n, m)
    base: Tensor  # B, (*batch, m, m)
    noise: Tensor  # D's diagonal, (*batch, n, 1)
    capacitance: Tensor  # C, (*batch, m, m)
    lu: tuple[Tensor, Tensor]  # of C, a constant


class NTKInterpolatedLinearOperator(SolvedByStructure, SumLinearOperator):
    """W B Wᵀ + D, interpolation from a grid of m points, by Woodbury's formula. B may be singular.

    :param kernel: The same interpolation from both sides.
    :param noise: D, positive.
    """

    def __init__(self, kernel: InterpolatedLinearOperator, noise: DiagLinearOperator):
        super().__init__(kernel, noise)

    def _factorise(self) -> _Woodbury:
        kernel, noise = self.linear_ops
        base = symmetric(kernel.base_linear_op.double().to_dense())
        indices, values = (
            kernel.left_interp_indices,
            (kernel.left_interp_values + kernel.right_interp_values).double() / 2,
        )
        weights = values.new_zeros(*indices.shape[:-1], base.shape[-1]).scatter_add(-1, indices, values)
        diagonal = noise._diagonal().double().unsqueeze(-1)
        identity = torch.eye(base.shape[-1], dtype=base.dtype, device=base.device)
        capacitance = identity + base @ (weights.mT @ (weights / diagonal))
        return _Woodbury(weights, base, diagonal, capacitance, torch.linalg.lu_factor(capacitance.detach()))

    def _inverse(self, parts: _Woodbury, rhs: Tensor) -> Tensor:
        weights, base, noise = parts.weights.detach(), parts.base.detach(), parts.noise.detach()
        scaled = rhs / noise
        return scaled - weights @ torch.linalg.lu_solve(*parts.lu, base @ (weights.mT @ scaled)) / noise

    def _product(self, parts: _Woodbury, rhs: Tensor) -> Tensor:
        return parts.weights @ (parts.base @ (parts.weights.mT @ rhs)) + parts.noise * rhs

    def _log_determinant(self, parts: _Woodbury) -> Tensor:
        sign, logdet = torch.linalg.slogdet(parts.capacitance)
        if (sign <= 0).any():
            raise NotPSDError("The kernel matrix of the grid is not positive semidefinite.")
        return logdet + parts.noise.squeeze(-1).log().sum(-1)


def pays_to_interpolate(kernel: InterpolatedLinearOperator) -> bool:
    """Whether this is W B Wᵀ, with a W on both sides, and Woodbury's (n + m) m² flops are fewer than n³/3."""
    n, m = kernel.shape[-1], kernel.base_linear_op.shape[-1]
    sides = (
        (kernel.left_interp_indices, kernel.right_interp_indices),
        (kernel.left_interp_values, kernel.right_interp_values),
    )
    same = all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in sides)
    return same and 3 * (n + m) * m**2 < n**3
