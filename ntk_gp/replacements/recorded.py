"""Layers as they are recorded: with the values that PyTorch's own have, and quicker, or quicker to differentiate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import backward_class, is_transform_wrapper, view_as_own
from .onednn import are_served, is_product_served, is_tanh_served, onednn_product, onednn_tanh


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    constants = (weight,) if bias is None else (weight, bias)
    if weight.dim() != 2 or input.dim() < 2 or not are_served(input.detach(), *constants):
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(torch.autograd.Function):
    """a Wᵀ + b at the processor's full rate, W and b being constants."""

    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _linear(input, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        many = is_transform_wrapper(grad)
        return _Products.apply(grad, weight) if many else _linear(grad, weight.mT), None, None


class _Products(torch.autograd.Function):
    """g W, which `torch.vmap` takes for one product of all g at once."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor) -> Tensor:
        return _linear(grad, weight.mT)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None: ...

    @staticmethod
    def vmap(info, in_dims: tuple, grad: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        return _linear(grad.movedim(in_dims[0], 0), weight.mT), 0


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    if not is_product_served(rows, weight.mT):
        return F.linear(input, weight, bias)
    product = onednn_product(rows, weight.mT, bias)
    return view_as_own(product, (*input.shape[:-1], product.shape[-1]))  # a tensor of its own


def tanh(input: Tensor) -> Tensor:
    return _Tanh.apply(input) if is_tanh_served(input.detach()) else torch.tanh(input)


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor) -> Tensor:
        output = onednn_tanh(input)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(grad, ctx.saved_tensors[0])


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Scaled and shifted by constants: the derivative of torch's own reads the input again, for statistics' sake."""
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (-1, *[1] * (input.dim() - 2))
    return (input * scale.view(shape)).add_(shift.view(shape))


RECORDED_AS: dict[Callable, Callable] = {
    F.linear: linear,
    torch.tanh: tanh,
    Tensor.tanh: tanh,
    F.batch_norm: batch_norm,
}

# The nodes of these in autograd's graph: of each row by itself.
ROW_BY_ROW = (backward_class(_Linear), backward_class(_Tanh))
