"""Distances in the network's metric: d²(x, x') = |J(x) - J(x')|² = k(x, x) + k(x', x') - 2 k(x, x').

Of each output by itself, in float64 whatever the inputs' dtype: d² is a small difference of large numbers, and what
float32 loses of it would be most of it. With k known to ε it is known to about 4 ε k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Jacobian
from .contents_cache import ContentsCache
from .linearization import Linearization

# Two inputs may be equal only where d² is so small a part of k + k': elsewhere they need not be looked at.
_MAY_BE_EQUAL = 1e-5
# Numbers of the inputs that are compared at once.
_COMPARED = 1 << 22


def squared_distances(linearization: Linearization, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """d² of all pairs of inputs for each output, (B, C, n, m) in float64; zero where two inputs are equal.

    Differentiable where the inputs require gradients; otherwise kept for the next time, beside the Gram matrix that
    they are made of, if there is room for both.

    :param linearization: Of a network with one group of parameters.
    :param x1: (B, n, d).
    :param x2: (B', m, d), B and B' equal or one of them 1; `x1` by default.
    """
    jacobian1 = linearization.jacobian(x1.double())
    jacobian2 = jacobian1 if x2 is None else linearization.jacobian(x2.double())
    if jacobian1.x.requires_grad or jacobian2.x.requires_grad:
        return _computed(linearization, jacobian1, jacobian2)

    def compute(*_: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return _computed(linearization, jacobian1, jacobian2)

    batch, outputs = max(len(x1), len(jacobian2.x)), jacobian1.function.num_outputs
    nbytes = 8 * batch * jacobian1.num_points * jacobian2.num_points * outputs
    if 2 * outputs * nbytes > ContentsCache.capacity(x1.device):
        return compute()
    if x2 is None:
        return linearization.keep("squared distances", (jacobian1.x,), compute, jacobian1.function.state)
    inputs = (jacobian1.x, jacobian2.x)
    return linearization.keep("squared distances to others", inputs, compute, jacobian1.function.state)


def paired_squared_distances(linearization: Linearization, x1: Tensor, x2: Tensor) -> Tensor:
    """d² of the first to the first, the second to the second, ..., for each output, (B, n, C) in float64.

    :param x1: (B, n, d).
    :param x2: (B', n, d).
    """
    jacobians = [linearization.jacobian(x.double()) for x in (x1, x2)]
    size = min(jacobian.points_per_block() for jacobian in jacobians)
    pieces = [x1.new_zeros(max(len(x1), len(x2)), 0, dtype=torch.float64)]
    for start in range(0, x1.shape[-2], size):
        rows1, rows2 = (jacobian[slice(start, start + size)].rows() for jacobian in jacobians)
        pieces.append((rows1 - rows2).square().sum(-1))
    equal = (x1 == x2).all(-1).unsqueeze(-1)
    distances = torch.cat(pieces, dim=-1).reshape(len(pieces[0]), x1.shape[-2], -1)
    return distances.masked_fill(equal, 0.0)


def _computed(linearization: Linearization, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
    outputs, ones = jacobian1.function.num_outputs, jacobian1.x.new_ones(1, 1)
    gram = _of_each_output(linearization.gram(jacobian1, jacobian2, ones), outputs)
    if jacobian1 is jacobian2:
        scale1 = scale2 = gram.diagonal(dim1=-2, dim2=-1)
    else:
        scale1, scale2 = (
            linearization.diagonal(jacobian, jacobian, ones).unflatten(-1, (-1, outputs)).mT
            for jacobian in (jacobian1, jacobian2)
        )
    scales = scale1.unsqueeze(-1) + scale2.unsqueeze(-2)  # first, so that what is symmetric stays so to the last bit
    # In the memory of the Gram matrix, which is nobody else's.
    distances = scales - 2 * gram if gram.requires_grad else gram.mul_(-2.0).add_(scales)
    equal = _equal_inputs(jacobian1.x, jacobian2.x, distances.detach() <= _MAY_BE_EQUAL * scales.detach())
    if gram.requires_grad:
        is_equal = torch.zeros_like(distances, dtype=torch.bool)
        is_equal[equal] = True
        return distances.masked_fill(is_equal, 0.0).clamp(min=0.0)
    distances[equal] = 0.0
    return distances.clamp_(min=0.0)


def _of_each_output(gram: Tensor, outputs: int) -> Tensor:
    """(B, n·C, m·C) to (B, C, n, m), each output's covariances with itself."""
    if outputs == 1:
        return gram.unsqueeze(1)
    blocks = gram.unflatten(-1, (-1, outputs)).unflatten(-3, (-1, outputs))
    return blocks.diagonal(dim1=-3, dim2=-1).movedim(-1, -3).contiguous()


def _equal_inputs(x1: Tensor, x2: Tensor, candidates: Tensor) -> tuple[Tensor, ...]:
    """The indices, as many tensors as dimensions, of those among the candidates (B, C, n, m) where x = x'."""
    indices = candidates.nonzero()
    pieces = [indices[:0]]
    for some in indices.split(max(1, _COMPARED // max(1, x1.shape[-1]))):
        batch, _, first, second = some.unbind(-1)
        equal = (x1[batch % len(x1), first] == x2[batch % len(x2), second]).all(-1)
        pieces.append(some[equal])
    return torch.cat(pieces).unbind(-1)
