"""Known features: columns beside the Jacobian that are functions of the inputs and of the network's values there.

========  ===================================  ============================================
column    features of row (point, output c)    groups, each with a prior variance of its own
========  ===================================  ============================================
Values    f(x)_c in column c, else 0           one, of C columns
Ones      1 in column c, else 0                one, of C columns
Inputs    x, of a network with one output      one of d columns, or d of one column each
========  ===================================  ============================================

With prior variance s they are the kernels s f(x) f(x')ᵀ, s and s xᵀ x', for each output by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..network import FrozenNetwork, NetworkByOutput


class Column(ABC):
    """One kind of known features; never changed.

    :ivar sizes: How many columns each of its groups has.
    """

    sizes: tuple[int, ...]

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """What its features depend on beside x: two with equal keys are equal at every x."""

    @abstractmethod
    def at(self, x: Tensor) -> Tensor:
        """The features at x (B, n, d): (B, n·C, q), differentiable where x requires a gradient."""

    @abstractmethod
    def product(self, x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        """The features times weights, (k, m, C), from what is known: a pure function of tensors.

        :param x: (m, d).
        :param values: f(x), (m, C).
        :param weights: (k, q).
        """

    @property
    def width(self) -> int:
        """q, how many columns there are."""
        return sum(self.sizes)


class Values(Column):
    """The network's values.

    :param outputs: C.
    :param network: The frozen network, or that of one output for each row. None where values are handed in, as
        :meth:`product` has them.
    """

    def __init__(self, outputs: int, network: FrozenNetwork | NetworkByOutput | None = None):
        self.sizes = (outputs,)
        self.network = network

    @property
    def key(self) -> Hashable:
        return "values", self.sizes, None if self.network is None else self.network.fingerprint()

    def at(self, x: Tensor) -> Tensor:
        if self.network is None:
            raise RuntimeError("These features have no network of their own: give their values to product().")
        values = self.network.values(x, self.network.fingerprint())
        return values.reshape(*x.shape[:2], *self.sizes).diag_embed().flatten(1, 2)

    def product(self, x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        return values * weights.unsqueeze(-2)


class Ones(Column):
    """A constant for each output.

    :param outputs: C.
    """

    def __init__(self, outputs: int):
        self.sizes = (outputs,)

    @property
    def key(self) -> Hashable:
        return "ones", self.sizes

    def at(self, x: Tensor) -> Tensor:
        return torch.eye(*self.sizes, dtype=x.dtype, device=x.device).repeat(x.shape[0], x.shape[1], 1)

    def product(self, x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        return weights.unsqueeze(-2).expand(-1, x.shape[0], -1)


class Inputs(Column):
    """The inputs themselves, beside a network with one output.

    :param width: d.
    :param ard: Whether each has a prior variance of its own.
    """

    def __init__(self, width: int, ard: bool):
        self.sizes = (1,) * width if ard else (width,)

    @property
    def key(self) -> Hashable:
        return "inputs", self.sizes

    def at(self, x: Tensor) -> Tensor:
        return x[..., : self.width]  # behind them may be the number of an output

    def product(self, x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
        return (weights @ x.mT).unsqueeze(-1)


def sizes_of(columns: Sequence[Column]) -> tuple[int, ...]:
    """How many columns each group of all of them has."""
    return tuple(size for column in columns for size in column.sizes)


def features(columns: Sequence[Column], x: Tensor) -> Tensor:
    """Ψ(x) of all of them, side by side: (B, n, d) to (B, n·C, q)."""
    return torch.cat([column.at(x) for column in columns], dim=-1)


def products(columns: Sequence[Column], x: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """Ψ(x) v for each v of `weights`, (k, q), or (k, C, q) of one output's features for each: (k, m, C), from x (m, d)
    and f(x) (m, C)."""
    if weights.dim() == 3:  # each output's own
        outputs = range(weights.shape[1])
        return torch.cat([products(columns, x, values[:, c : c + 1], weights[:, c]) for c in outputs], dim=-1)
    pieces = weights.split([column.width for column in columns], dim=-1)
    total = torch.zeros((), dtype=values.dtype, device=values.device)
    for column, piece in zip(columns, pieces, strict=True):
        total = total + column.product(x, values, piece)
    return total
