"""Which Gram matrices are kept, and from when on: a stored one costs memory, and a copy each time it is handed out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .base import Jacobian
from .contents_cache import ContentsCache

# A Gram matrix of so few flops for each entry is not copied for the sake of a second time that may never come: memory
# that was never written to costs as much as they do.
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
        groups = self.num_groups
        batch = max(jacobian1.x.shape[0], jacobian2.x.shape[0])
        size = groups * batch * jacobian1.num_rows * jacobian2.num_rows * jacobian1.x.element_size()
        return (groups == 1 or batch == 1) and size <= ContentsCache.capacity(jacobian1.x.device)

    def pays(self, jacobian1: Jacobian, jacobian2: Jacobian) -> bool:
        """Whether it is cheaper to store the Gram matrix and to copy it than to form it for whoever asks now.

        That of a small network costs little more than its memory: it is stored when it is asked for again.
        """
        pair = self._pair(jacobian1, jacobian2)
        entries = jacobian1.num_rows * jacobian2.num_rows
        again, pair.is_formed_again = pair.is_formed_again, True
        return again or jacobian1.gram_cost(jacobian2) > _COPY * entries

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
            eye = torch.eye(self.num_groups, dtype=jacobian1.x.dtype, device=jacobian1.x.device)
            with torch.no_grad():
                return jacobian1.gram(jacobian2, eye)

        pair = self._pair(jacobian1, jacobian2)
        gram = None if pair.gram is None else pair.gram()
        if gram is None:
            gram = keep("gram", (jacobian1.x, jacobian2.x), compute, jacobian1.function.state)
            pair.gram = weakref.ref(gram)
        return gram

    def _pair(self, jacobian1: Jacobian, jacobian2: Jacobian) -> _Pair:
        with self._lock:
            partners = self._pairs.setdefault(jacobian1, WeakKeyDictionary())
            return partners.setdefault(jacobian2, _Pair())


class _Pair:
    """What products of two Jacobians have cost so far, in flops, and their Gram matrix while the cache holds it."""

    flops = 0.0
    gram: weakref.ref[Tensor] | None = None
    is_formed_again = False  # when it is asked for next
