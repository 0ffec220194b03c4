"""What ranks do together, as functions that autograd differentiates: each one's derivative is another of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cholesky import DistributedCholesky

Factors = Sequence[DistributedCholesky]


class Solve(torch.autograd.Function):
    """A⁻¹ rhs for the matrices A of several batches, replicated: (B or 1, N, r) to (B, N, r)."""

    @staticmethod
    def forward(ctx: Any, rhs: Tensor, factors: Factors) -> Tensor:
        ctx.factors, ctx.batch = factors, len(rhs)
        rhs = rhs.expand(len(factors), -1, -1)
        return torch.stack([factor.solve(one) for factor, one in zip(factors, rhs, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Solve.apply(grad, ctx.factors).sum_to_size(ctx.batch, *grad.shape[1:]), None


class ForwardSolve(torch.autograd.Function):
    """L⁻¹ Π B of a rank's rows of B, (B, N_r, r)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, factors: Factors) -> Tensor:
        ctx.factors = factors
        return torch.stack([factor.forward(one) for factor, one in zip(factors, own, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return BackwardSolve.apply(grad, ctx.factors), None


class BackwardSolve(torch.autograd.Function):
    """(L⁻¹ Π)ᵀ B of a rank's rows of B, (B, N_r, r)."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, factors: Factors) -> Tensor:
        ctx.factors = factors
        return torch.stack([factor.backward(one) for factor, one in zip(factors, own, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ForwardSolve.apply(grad, ctx.factors), None


class SumOverRanks(torch.autograd.Function):
    """What is each rank's, added up and replicated: the derivative of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, summed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.summed = summed
        return summed(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return OnEachRank.apply(grad, ctx.summed), None


class OnEachRank(torch.autograd.Function):
    """What is replicated, where each rank goes on to something of its own: derivatives are added up."""

    @staticmethod
    def forward(ctx: Any, replicated: Tensor, summed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.summed = summed
        return replicated.view_as(replicated)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.apply(grad, ctx.summed), None
