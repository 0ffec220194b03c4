"""Derivatives by plain autograd, for networks that the transforms of `torch.func` refuse.

Packed sequences, checkpointing, old forms of `torch.autograd.Function`, derivatives taken inside the network, hooks
that make tensors require gradients, activations turned into numpy arrays: whatever can be trained can be
differentiated here. It takes a pass through the network for each vector, where transforms share one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..network import NetworkFunction


def pull(function: NetworkFunction, x: Tensor, cotangents: Tensor) -> Tensor:
    """Jᵀ v for vectors v (r, m·C) at the points x (m, d): (r, P). A forward pass, and a backward pass for each.

    Differentiable with respect to x and the vectors where gradients are recorded and one of them requires some.
    """
    leaves = function.leaves()
    if torch.is_grad_enabled() and (x.requires_grad or cotangents.requires_grad):
        out = function(leaves, x).reshape(-1)
        pulled = [_gradients(out, leaves, v, create_graph=True) for v in cotangents]
        return torch.stack([_flatten(function, gradients, leaves) for gradients in pulled])
    rows = []
    with torch.enable_grad():
        out = function(leaves, x.detach()).reshape(-1)
        for v in cotangents:
            rows.append(_accumulated(function, leaves, out, v.detach()))
    return torch.stack(rows)


def _accumulated(function: NetworkFunction, leaves: Mapping[str, Tensor], out: Tensor, v: Tensor) -> Tensor:
    """By `backward`, which checkpoints that are re-entered need; `autograd.grad` would refuse them."""
    for leaf in leaves.values():
        leaf.grad = None
    if out.requires_grad:
        out.backward(v, retain_graph=True)
    return _flatten(function, {name: leaf.grad for name, leaf in leaves.items()}, leaves)


def push(function: NetworkFunction, x: Tensor, tangents: Tensor) -> Tensor:
    """J u for vectors u (r, P) at the points x (m, d): (r, m·C). Jᵀ v is linear in v: its derivative, transposed.

    Differentiable with respect to x and the vectors, as :func:`pull`.
    """
    recorded = torch.is_grad_enabled() and (x.requires_grad or tangents.requires_grad)
    leaves = function.leaves()
    products = []
    with torch.enable_grad():
        out = function(leaves, x if recorded else x.detach()).reshape(-1)
        v = torch.zeros_like(out, requires_grad=True)
        pulled = _gradients(out, leaves, v, create_graph=True)
        for u in tangents if recorded else tangents.detach():
            pieces = function.split(u)
            terms = [(g * pieces[name]).sum() for name, g in pulled.items() if g is not None and g.requires_grad]
            total = sum(terms[1:], terms[0]) if terms else v.sum() * 0.0
            (product,) = torch.autograd.grad(
                total, v, retain_graph=True, create_graph=recorded, allow_unused=True, materialize_grads=True
            )
            products.append(product)
    return torch.stack(products)


def rows(function: NetworkFunction, points: Tensor, together: int = 1) -> Tensor:
    """The rows of J at points (m, d), (m, C, P): a backward pass for each.

    :param together: How many points share a forward pass: few, since each backward pass runs over all of them.
    """
    return torch.cat([_rows(function, chunk) for chunk in points.split(together)])


def _rows(function: NetworkFunction, points: Tensor) -> Tensor:
    count = len(points) * function.num_outputs
    identity = torch.eye(count, dtype=points.dtype, device=points.device)
    return pull(function, points, identity).unflatten(0, (len(points), -1))


def _gradients(out: Tensor, leaves: Mapping[str, Tensor], v: Tensor, create_graph: bool) -> dict[str, Tensor | None]:
    if not out.requires_grad:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(out, list(leaves.values()), v, create_graph=create_graph, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _flatten(function: NetworkFunction, gradients: Mapping[str, Tensor | None], leaves: Mapping[str, Tensor]) -> Tensor:
    pieces = {name: torch.zeros_like(leaf) if (g := gradients[name]) is None else g for name, leaf in leaves.items()}
    return function.flatten({name: g.to_dense() if g.is_sparse else g for name, g in pieces.items()})
