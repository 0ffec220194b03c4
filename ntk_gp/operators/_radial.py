"""Functions of a squared distance over a squared lengthscale, with derivatives that are finite where it is zero.

====  ==========================  =====================================
ν     k(s), s = d² / ℓ²           with
====  ==========================  =====================================
1/2   exp(-a)                     a = √s
3/2   (1 + a) exp(-a)             a = √(3 s)
5/2   (1 + a + a²/3) exp(-a)      a = √(5 s)
∞     exp(-s / 2)
====  ==========================  =====================================
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..jacobian.memory import empty

# How many numbers are worked on at a time: what one step leaves is still in cache when the next one wants it.
_BLOCK = 1 << 16


def radial(squared_distances: Tensor, lengthscale: Tensor, nu: float) -> Tensor:
    """k(d² / ℓ²), differentiable as often as asked.

    With constant distances a step of fitting is a few passes over them, in blocks, and nothing but them is kept for its
    derivative. At d = 0 the derivative of Matérn-1/2 by d², which is infinite, is taken for zero: by symmetry there is
    none in x.

    :param squared_distances: (B, n, m).
    :param lengthscale: (B', 1, 1), in the same dtype; B and B' are equal, or one is 1.
    :param nu: 0.5, 1.5, 2.5 or infinity.
    """
    if squared_distances.requires_grad:
        return profile(squared_distances / lengthscale.square(), nu)
    return _AtConstantDistances.apply(squared_distances, lengthscale, nu)


def profile(scaled: Tensor, nu: float) -> Tensor:
    """k(s), (...)."""
    return (-0.5 * scaled).exp() if math.isinf(nu) else _Matern.apply(scaled, nu)


def slope(scaled: Tensor, nu: float) -> Tensor:
    """k'(s). For Matérn functions that is, up to a factor, the one with ν less by one at the same a."""
    if math.isinf(nu):
        return -0.5 * profile(scaled, nu)
    if nu == 2.5:
        return (-5 / 6) * profile(5 / 3 * scaled, 1.5)
    if nu == 1.5:
        return (-3 / 2) * profile(3 * scaled, 0.5)
    positive = scaled > 0
    root = torch.where(positive, scaled, 1.0).sqrt()
    return torch.where(positive, -0.5 * (-root).exp() / root, 0.0)


class _Matern(torch.autograd.Function):
    """k(s) with the derivative k'(s), which is a function of the same kind."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, nu: float) -> Tensor:
        ctx.save_for_backward(scaled)
        ctx.nu = nu
        return _values(scaled.clone(), nu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scaled,) = ctx.saved_tensors
        return grad * slope(scaled, ctx.nu), None


class _AtConstantDistances(torch.autograd.Function):
    """k(d² / ℓ²), (B or B', n, m), differentiable with respect to ℓ alone."""

    @staticmethod
    def forward(ctx: Any, squared_distances: Tensor, lengthscale: Tensor, nu: float) -> Tensor:
        ctx.save_for_backward(squared_distances, lengthscale)
        ctx.nu = nu
        batch = max(len(squared_distances), len(lengthscale))
        out = empty((batch, *squared_distances.shape[1:]), like=squared_distances)
        for b, rows, block, length in _blocks(squared_distances, lengthscale):
            out[b, rows] = _values(block / length**2, nu)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        squared_distances, lengthscale = ctx.saved_tensors
        if torch.is_grad_enabled():  # derivatives of this are asked for
            scaled = squared_distances / lengthscale.square()
            by_logarithm = -2 * grad * slope(scaled, ctx.nu) * scaled
            return None, by_logarithm.sum((-2, -1), keepdim=True).sum_to_size(lengthscale.shape) / lengthscale, None
        out = torch.zeros_like(lengthscale)
        for b, rows, block, length in _blocks(squared_distances, lengthscale):
            total = torch.linalg.vecdot(grad[b, rows].reshape(-1), _by_logarithm(block / length**2, ctx.nu).reshape(-1))
            out[b % len(out)] += total / length
        return None, out, None


def _blocks(squared_distances: Tensor, lengthscale: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """A batch, some of its rows, d² there and ℓ."""
    rows = max(1, _BLOCK // max(1, squared_distances.shape[-1]))
    for b in range(max(len(squared_distances), len(lengthscale))):
        matrix, length = squared_distances[b % len(squared_distances)], lengthscale[b % len(lengthscale)].reshape(())
        for start in range(0, len(matrix), rows):
            here = slice(start, start + rows)
            yield b, here, matrix[here], length


def _values(scaled: Tensor, nu: float) -> Tensor:
    """k(s), in the place of s."""
    if math.isinf(nu):
        return scaled.mul_(-0.5).exp_()
    root = scaled.mul_(2 * nu).sqrt_()
    decay = (-root).exp_()
    if nu == 0.5:
        return decay
    if nu == 2.5:
        root.addcmul_(root, root, value=1 / 3)
    return decay.addcmul_(root, decay)


def _by_logarithm(scaled: Tensor, nu: float) -> Tensor:
    """The derivative of k(d² / ℓ²) by log ℓ, -2 s k'(s), in the place of s."""
    if math.isinf(nu):
        return (-0.5 * scaled).exp_().mul_(scaled)
    root = scaled.mul_(2 * nu).sqrt_()
    decay = (-root).exp_()
    if nu == 0.5:
        return decay.mul_(root)
    if nu == 1.5:
        return decay.mul_(root).mul_(root)
    return decay.mul_(root).mul_(root).mul_(root.add_(1.0)).mul_(1 / 3)
