"""Derivatives by the transforms of `torch.func`.

The first reverse-mode derivative by one, and the first vmap, import for seconds: plain autograd serves a few vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.func import vjp, vmap

from .._compat import set_vmap_warns_of_loops
from ..network import NO_MODE, NetworkFunction, Switch
from .forward_mode import value_and_tangent

# vmap warns once for every operator that it has to loop over; the answer is the same. (PyTorch does not tell whether it
# would warn; it does, unless told otherwise.)
_quiet = Switch((lambda: True, set_vmap_warns_of_loops, False))


def pushforward(function: NetworkFunction, x: Tensor) -> Callable[[Tensor], Tensor]:
    """u (P,) to J u (m·C,) at the points x (m, d), by forward mode."""

    def at(parameters: dict[str, Tensor], mode: AbstractContextManager[object] = NO_MODE) -> Tensor:
        return function(parameters, x, mode).reshape(-1)

    return lambda tangent: value_and_tangent(at, function.parameters, function.split(tangent))[1]


def transposed_pullback(function: NetworkFunction, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The same, by reverse mode of what is linear in v: v to Jᵀ v."""
    out, pull = vjp(lambda parameters: function(parameters, x).reshape(-1), function.parameters)  # type: ignore[misc]
    _, transpose = vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(out))  # type: ignore[misc]
    return lambda tangent: transpose(function.split(tangent))[0]


def pullback(function: NetworkFunction, x: Tensor) -> Callable[[Tensor], Tensor]:
    """v (m·C,) to Jᵀ v (P,) at the points x (m, d)."""
    _, pull = vjp(lambda parameters: function(parameters, x).reshape(-1), function.parameters)  # type: ignore[misc]
    return lambda cotangent: function.flatten(pull(cotangent)[0])


def rows(function: NetworkFunction, points: Tensor, together: bool, chunk: int) -> Tensor:
    """The rows of J at points (m, d), each by itself: (m, C, P).

    :param together: By vmap, `chunk` points at a time, instead of one after the other.
    """
    one = rows_at_one_point(function, loop=not together)
    if not together:
        return torch.stack([one(point) for point in points.unsqueeze(-2)])
    with quiet_batching_rules():
        return torch.cat([vmap(one)(part) for part in points.unsqueeze(-2).split(max(1, chunk))])


def rows_at_one_point(function: NetworkFunction, loop: bool) -> Callable[[Tensor], Tensor]:
    """x (1, d) to the C rows of J there, (C, P)."""

    def at(point: Tensor) -> Tensor:
        pull = pullback(function, point)
        outputs = torch.eye(function.num_outputs, dtype=point.dtype, device=point.device)
        return torch.stack([pull(output) for output in outputs]) if loop else vmap(pull)(outputs)

    return at


def each(apply: Callable[[Tensor], Tensor], vectors: Tensor, together: int) -> Tensor:
    """`apply` to each row of `vectors`, so many at a time."""
    if together > 1 and vectors.shape[0] > 1:
        with quiet_batching_rules():
            return vmap(apply, chunk_size=together)(vectors)
    return torch.stack([apply(vector) for vector in vectors])


@contextmanager
def quiet_batching_rules() -> Iterator[None]:
    with _quiet:
        yield
