"""Solves as differentiable functions, by an operator's own `_solve`."""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from torch.autograd.function import once_differentiable


class Solve(torch.autograd.Function):
    """A⁻¹ rhs, differentiable with respect to rhs, (*batch, N, r), and everything that represents the operator A.

    In place of linear_operator's function of this name: that builds the operator anew, without what it remembers, and
    asks settings of the whole process, not the operator, how to solve.
    """

    @staticmethod
    def forward(ctx, operator: LinearOperator, rhs: Tensor, *representation: Tensor) -> Tensor:
        solution = operator._solve(rhs)
        ctx.operator = operator
        ctx.save_for_backward(rhs, solution)
        return solution

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rhs, solution = ctx.saved_tensors
        adjoint = ctx.operator._solve(grad)
        representation_grads: tuple[Tensor | None, ...] = (None,) * len(ctx.operator.representation())
        if any(ctx.needs_input_grad[2:]):
            # Symmetric, as upstream has it: x₁ and x₂ then take half of the derivative each.
            left, right = torch.cat([adjoint, solution], -1), torch.cat([solution, adjoint], -1)
            representation_grads = ctx.operator._bilinear_derivative(left, right.mul(-0.5))
        return None, adjoint.sum_to_size(rhs.shape), *representation_grads
