"""Elementary stand-ins for the operations whose second derivatives torch gets wrong, or does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class ElementaryOperations(TorchFunctionMode):
    """Some fused operations as compositions of elementary ones, which can be differentiated any number of times.

    Layer and instance norm lose terms, without a word, when their first derivative in forward mode or under vmap is
    differentiated once more (https://github.com/pytorch/pytorch/issues/196700,
    https://github.com/pytorch/pytorch/issues/196699); the others have no such derivative and raise.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        try:
            elementary = _ELEMENTARY.get(function, function)
        except TypeError:  # a callable that cannot be hashed
            elementary = function
        return elementary(*args, **(kwargs or {}))


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    out = _standardise(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats:
        return nn.functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    out = _standardise(input, tuple(range(2, input.dim())), eps)
    channels = (-1, *[1] * (input.dim() - 2))
    out = out if weight is None else out * weight.view(channels)
    return out if bias is None else out + bias.view(channels)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return (input + 3.0).clamp(0.0, 6.0) / 6.0


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


_ELEMENTARY: dict[Callable, Callable] = {
    nn.functional.glu: _glu,
    nn.functional.hardsigmoid: _hardsigmoid,
    torch.cdist: _cdist,
    nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    nn.functional.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
}
