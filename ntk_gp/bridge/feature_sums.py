"""Sums of a neural tangent kernel and kernels of a few known features: again one neural tangent kernel's matrix.

NTK + gain + constant + linear kernel, each scaled or not, in any order and nesting, is linear in P + q weights
(:mod:`ntk_gp.jacobian.widened`), and everything that serves an NTK alone serves it: solvers of either space, weights,
samples, updates. Whatever else is in the sum, or where the kernels see different columns of the inputs, the sum is
solved as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from gpytorch.kernels import AdditiveKernel, ConstantKernel, Kernel, LinearKernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from torch import Tensor

from .. import memory
from ..jacobian.columns import Column, Inputs, Ones, sizes_of
from ..operators import NTKLinearOperator
from .recognised import KnownFeaturesKernel, NeuralTangentKernel


class Summand(NamedTuple):
    """A kernel in a sum.

    :param kernel: What is added: neither a sum nor scaled itself.
    :param scales: The ScaleKernels that it is in.
    :param active_dims: The columns of the inputs that it sees; None for all.
    """

    kernel: Kernel
    scales: tuple[ScaleKernel, ...]
    active_dims: Tensor | None


def summands(kernel: Kernel) -> list[Summand]:
    """What a kernel is the sum of; the kernel itself where it is no sum. For the inputs that its `forward` is given:
    the active dimensions of the kernel as a whole were taken before."""
    return list(_walk(kernel, (), None))


def _walk(kernel: Kernel, scales: tuple[ScaleKernel, ...], dims: Tensor | None) -> Iterator[Summand]:
    if type(kernel) is ScaleKernel:  # which calls `forward`, and has the inner kernel's active dimensions for its own
        yield from _walk(kernel.base_kernel, (*scales, kernel), dims)
    elif type(kernel) is AdditiveKernel:
        for part in kernel.kernels:
            own = part.active_dims
            seen = dims if own is None else (own if dims is None else dims[own])
            yield from _walk(part, scales, seen)
    else:
        yield Summand(kernel, scales, dims)


def parts_of_features(kernel: Kernel) -> tuple[Summand, list[Summand]] | None:
    """The one neural tangent kernel of a sum, and the kernels of known features beside it; None if there are others,
    or no sum."""
    parts = summands(kernel)
    tangent = [part for part in parts if getattr(part.kernel, "is_linear_in_weights", False)]
    others = [part for part in parts if part not in tangent] if len(tangent) == 1 else []
    if not others or not all(_is_known(part.kernel) for part in others):
        return None
    if any(part.kernel.is_by_output != tangent[0].kernel.is_by_output for part in others if _is_of_network(part)):
        return None
    seeing = (part for part in others if type(part.kernel) is not ConstantKernel)
    if not all(_same_dims(part.active_dims, tangent[0].active_dims) for part in seeing):
        return None
    return tangent[0], others


def sum_of_features(matrix: LazyEvaluatedKernelTensor) -> NTKLinearOperator | None:
    """The matrix of such a sum as one operator; None if it is not such a sum, or its features do not fit in memory."""
    parts = None if matrix.params or matrix.last_dim_is_batch else parts_of_features(matrix.kernel)
    if parts is None:
        return None
    tangent, others = parts
    x1, x2 = _seen(matrix.x1, matrix.x2, tangent.active_dims)
    assert isinstance(tangent.kernel, NeuralTangentKernel)
    operator = tangent.kernel.forward(x1, x2)
    if not isinstance(operator, NTKLinearOperator):
        return None
    outputs = (
        operator.shape[-2] // max(1, x1.shape[-2]) if x1.shape[-2] else tangent.kernel.num_outputs_per_input(x1, x2)
    )
    known: list[tuple[Column, Tensor]] = []
    for part in others:
        own = _known_features(part.kernel, x1, x2, outputs)
        if own is None:
            return None
        known += [(column, _scaled(variances.to(x1), part.scales)) for column, variances in own]
    if not _fit([column for column, _ in known], operator):
        return None
    for scale in tangent.scales:
        operator = operator.mul(_outputscale(scale).to(x1)[..., None, None])
    shape = torch.broadcast_shapes(*(variances.shape[:-1] for _, variances in known))
    together = torch.cat([variances.expand(*shape, variances.shape[-1]) for _, variances in known], dim=-1)
    return operator.widened([column for column, _ in known], together)


def _is_known(kernel: Kernel) -> bool:
    return isinstance(kernel, KnownFeaturesKernel) or type(kernel) in (ConstantKernel, LinearKernel)


def _is_of_network(part: Summand) -> bool:
    return isinstance(part.kernel, NeuralTangentKernel)


def _same_dims(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _seen(x1: Tensor, x2: Tensor, dims: Tensor | None) -> tuple[Tensor, Tensor]:
    if dims is None:
        return x1, x2
    seen = x1.index_select(-1, dims)
    return seen, seen if x2 is x1 else x2.index_select(-1, dims)


def _known_features(kernel: Kernel, x1: Tensor, x2: Tensor, outputs: int) -> list[tuple[Column, Tensor]] | None:
    """The features of one kernel, each with its prior variances, (*batch, 1, groups), if it has as many outputs."""
    if isinstance(kernel, KnownFeaturesKernel):
        own = kernel.known_features(x1, x2) if kernel.num_outputs_per_input(x1, x2) == outputs else None
        return own
    if outputs != 1:
        return None
    if isinstance(kernel, ConstantKernel):
        return [(Ones(1), _value(kernel.constant).unsqueeze(-1))]
    variances = _value(kernel.variance)
    width = x1.shape[-1]
    if variances.shape[-1] not in (1, width):
        return None
    return [(Inputs(width, ard=variances.shape[-1] > 1), variances)]


def _scaled(variances: Tensor, scales: tuple[ScaleKernel, ...]) -> Tensor:
    for scale in scales:
        variances = variances * _outputscale(scale).to(variances)[..., None, None]
    return variances


def _outputscale(scale: ScaleKernel) -> Tensor:
    return _value(scale.outputscale)


def _value(parameter: Tensor) -> Tensor:
    """What the matrix may be evaluated with where gradients are on, and was made where they were off."""
    return parameter if torch.is_grad_enabled() else parameter.detach()


def _fit(columns: list[Column], operator: NTKLinearOperator) -> bool:
    """Whether the features of all rows, as they are held for solving, have room beside the Jacobian's factors."""
    numbers = operator.shape[-2] * operator.batch_shape.numel() * sum(sizes_of(columns))
    return 8 * numbers <= memory.FACTORS.bytes(operator.x1.device)
