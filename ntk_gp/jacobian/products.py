"""Products with Jacobians at fixed inputs, as differentiable functions of the vectors, or of the prior variances.

What engines compute has no graph of autograd's; its derivatives are products of the same kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .base import Jacobian


class JacobianProduct(torch.autograd.Function):
    """J u for a Jacobian at fixed inputs, differentiable with respect to the rows u: (B or 1, r, P) to (B, r, N)."""

    @staticmethod
    def forward(ctx, tangents: Tensor, jacobian: Jacobian) -> Tensor:
        ctx.jacobian, ctx.batch = jacobian, tangents.shape[0]
        return jacobian.jvp(tangents)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        tangents = ctx.jacobian.vjp(grad)
        return tangents if ctx.batch == tangents.shape[0] else tangents.sum(0, keepdim=True), None


class TransposedJacobianProduct(torch.autograd.Function):
    """Jᵀ v for a Jacobian at fixed inputs, differentiable with respect to the rows v: (B or 1, r, N) to (B, r, P)."""

    @staticmethod
    def forward(ctx, cotangents: Tensor, jacobian: Jacobian) -> Tensor:
        ctx.jacobian, ctx.batch = jacobian, cotangents.shape[0]
        return jacobian.vjp(cotangents)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        cotangents = ctx.jacobian.jvp(grad)
        return cotangents if ctx.batch == cotangents.shape[0] else cotangents.sum(0, keepdim=True), None


class GramProduct(torch.autograd.Function):
    """J₁ Σ_w J₂ᵀ, differentiable with respect to the variances (W, G): backward forms each group's own matrix again."""

    @staticmethod
    def forward(ctx, variances: Tensor, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        ctx.jacobians = (jacobian1, jacobian2)
        ctx.save_for_backward(variances)
        return jacobian1.gram(jacobian2, variances)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (variances,) = ctx.saved_tensors
        jacobian1, jacobian2 = ctx.jacobians
        return variances_derivative(grad, variances, partial(jacobian1.gram, jacobian2)), None, None


def variances_derivative(grad: Tensor, variances: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of ⟨grad, compute(variances)⟩ by the variances (W, G), in which the result is linear: for each
    group, what it is with its variance one and the rest zero."""
    out = torch.zeros_like(variances)
    for group in range(variances.shape[1]):
        part = grad * compute(one_hot(variances, group))
        out[:, group] = part.flatten(1).sum(-1).sum_to_size(len(variances))
    return out


def gram_diagonal(jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor) -> Tensor:
    """The diagonal of J₁ Σ_w J₂ᵀ, (B or W, N), differentiable with respect to the variances (W, G)."""
    total: Tensor | None = None
    for group in range(variances.shape[1]):
        one = one_hot(variances, group)
        if jacobian1 is jacobian2:
            part = variances[:, group, None] * jacobian1.diagonal(one)
        else:
            part = variances[:, group, None] * jacobian1.cross_diagonal(jacobian2, one)
        total = part if total is None else total + part
    assert total is not None
    return total


def kernel_product(jacobian1: Jacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
    """(J₁ Σ_w J₂ᵀ) rhs, differentiable in everything: also in the inputs where they require gradients."""
    sums = jacobian2.vjp(rhs.mT) if jacobian2.x.requires_grad else TransposedJacobianProduct.apply(rhs.mT, jacobian2)
    tangents = sums * jacobian1.function.expand_variances(variances).unsqueeze(-2)
    if jacobian1.x.requires_grad:
        return jacobian1.jvp(tangents).mT
    return JacobianProduct.apply(tangents, jacobian1).mT


def one_hot(variances: Tensor, group: int) -> Tensor:
    """(1, G): variance one for this group and zero for the others."""
    one = torch.zeros_like(variances[:1], requires_grad=False)
    one[0, group] = 1.0
    return one
