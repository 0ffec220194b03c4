"""Products with a Jacobian at fixed inputs, as differentiable functions of the vectors, for engines without graphs."""

from __future__ import annotations

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
