"""What a model will ask its network for, said before it asks for f(x): one pass may serve both.

A Gaussian process asks for the mean f(x) first, and for J(x), or J(x) ŵ, only later and by way of its kernel. Whoever
evaluates the model knows what will be wanted, and says here where f(x) may be had along with it; the mean asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from .frozen import FrozenNetwork

ValuesAlong = Callable[[FrozenNetwork, Tensor], Tensor | None]
"""f, (N, C), of a network at inputs (*batch, m, d), in memory of its own; None where nothing is gained."""

_expected: ContextVar[ValuesAlong | None] = ContextVar("ntk_gp_expected", default=None)


@contextmanager
def expecting(values_along: ValuesAlong) -> Iterator[None]:
    """While a model is evaluated, in this thread."""
    token = _expected.set(values_along)
    try:
        yield
    finally:
        _expected.reset(token)


def values_along(network: FrozenNetwork, x: Tensor) -> Tensor | None:
    """f(x), (N, C), at (*batch, m, d) from a pass that is needed anyway; None where there is none."""
    ask = _expected.get()
    return None if ask is None else ask(network, x)
