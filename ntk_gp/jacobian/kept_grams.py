"""Which Gram matrices are kept, and from when on: a stored one costs memory, and a copy each time it is handed out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..distributed.jacobian import ShardedJacobian
from .base import Jacobian
from .contents_cache import ContentsCache

# A Gram matrix of so many entries, at so few flops for each, is not copied for the sake of a second time that may never
# come.
_LARGE = 1 << 24
_COPY = 1000.0


class KeptGrams:
    """The Gram matrices of pairs of Jacobians: what decides about keeping them, and where they are while they are kept.

    Pairs are told apart by the Jacobians as objects, without a look at their inputs: the iterations of a solve ask for
    every step. The matrices themselves are in the cache of contents.

    :param num_groups: G, how many groups of parameters have a prior variance of their own: a matrix is kept for each.
    """

    def __init__(self, num_groups: int):
        self.num_groups = num_groups
        self._pairs: WeakKeyDictionary[Jacobian, WeakKeyDictionary[Jacobian, _Pair]] = WeakKeyDictionary()
        self._lock = threading.Lock()  # of the dictionaries

    def fits(self, jacobian1: Jacobian, jacobian2: Jacobian) -> bool:
        """Whether the cache has room for the Gram matrix of these two, one for each group."""
        return self._fits(jacobian1, jacobian2, jacobian1.num_rows)

    def fits_own(self, jacobian1: Jacobian, jacobian2: Jacobian) -> bool:
        """The same for the rows that one process works on, where several share them: for the one with most."""
        return self._fits(jacobian1, jacobian2, jacobian1.shards.most_rows(jacobian1.num_rows))

    def _fits(self, jacobian1: Jacobian, jacobian2: Jacobian, rows: int) -> bool:
        groups = self.num_groups
        batch = max(jacobian1.x.shape[0], jacobian2.x.shape[0])
        size = groups * batch * rows * jacobian2.num_rows * jacobian1.x.element_size()
        return (groups == 1 or batch == 1) and size <= ContentsCache.capacity(jacobian1.x.device)

    def pays(self, jacobian1: Jacobian, jacobian2: Jacobian) -> bool:
        """Whether it is cheaper to store the Gram matrix and to copy it than to form it for whoever asks now.

        A large one of a small network costs little more than its memory: it is stored when it is asked for again.
        """
        pair = self._pair(jacobian1, jacobian2)
        entries = jacobian1.num_rows * jacobian2.num_rows
        again, pair.is_formed_again = pair.is_formed_again, True
        return again or entries < _LARGE or jacobian1.gram_cost(jacobian2) > _COPY * entries

    def pays_for_product(self, jacobian1: Jacobian, jacobian2: Jacobian, columns: int) -> bool:
        """Whether the products so far, and one with so many more columns, cost as much as forming the matrix does.

        From then on it is to be stored, so that both together never cost more than twice the cheaper way.
        """
        pair = self._pair(jacobian1, jacobian2)
        pair.flops += columns * jacobian1.product_cost(jacobian2)
        if pair.flops < jacobian1.gram_cost(jacobian2):
            return False
        pair.is_formed_again = True
        return True

    def matrix(self, jacobian1: Jacobian, jacobian2: Jacobian, keep: Callable[..., Tensor]) -> Tensor:
        """The Gram matrices of all groups, (G, N₁, N₂), or (B, N₁, N₂) where there is one group.

        :param keep: As :meth:`ntk_gp.jacobian.linearization.Linearization.keep`.
        """

        def compute(*_: Tensor) -> Tensor:
            with torch.no_grad():
                return jacobian1.gram(jacobian2, self._each_group(jacobian1))

        pair = self._pair(jacobian1, jacobian2)
        gram = None if pair.gram is None else pair.gram()
        if not (jacobian1.shards.is_whole and jacobian2.shards.is_whole):
            gram = None  # whether it is still in memory may not decide: other ranks collect garbage at other times
        if gram is None:
            gram = keep("gram", (jacobian1.x, jacobian2.x), compute, jacobian1.function.state)
            pair.gram = weakref.ref(gram)
        return gram

    def own_rows(self, jacobian1: ShardedJacobian, jacobian2: Jacobian, keep: Callable[..., OwnRows]) -> Tensor:
        """Of the matrices of :meth:`matrix`, the rows that this rank works on."""

        def compute(*_: Tensor) -> OwnRows:
            rows = jacobian1.own_gram(jacobian2, self._each_group(jacobian1))
            return OwnRows(rows, rows[:, :1].nbytes * jacobian1.shards.most_rows(jacobian1.num_rows))

        return keep("own gram", (jacobian1.x, jacobian2.x), compute, jacobian1.function.state).rows

    def _each_group(self, jacobian: Jacobian) -> Tensor:
        return torch.eye(self.num_groups, dtype=jacobian.x.dtype, device=jacobian.x.device)

    def _pair(self, jacobian1: Jacobian, jacobian2: Jacobian) -> _Pair:
        with self._lock:
            partners = self._pairs.setdefault(jacobian1, WeakKeyDictionary())
            return partners.setdefault(jacobian2, _Pair())


@dataclass(frozen=True)
class OwnRows:
    """A rank's rows of a Gram matrix.

    :param rows: Them.
    :param nbytes: What they take on the rank that has most: all ranks forget alike.
    """

    rows: Tensor
    nbytes: int


class _Pair:
    """What products of two Jacobians have cost so far, in flops, and their Gram matrix while the cache holds it."""

    flops = 0.0
    gram: weakref.ref[Tensor] | None = None
    is_formed_again = False  # when it is asked for next
