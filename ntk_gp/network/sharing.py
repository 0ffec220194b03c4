"""One set of tensors for all snapshots of one network: the mean's and the kernel's, and what they are converted to."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._compat import buffers_in

_lock = threading.Lock()
# Both hold nothing alive: the trees that were made of a network, and the tensors that were put in a tensor's place.
_trees: WeakIdKeyDictionary = WeakIdKeyDictionary()
_successors: WeakIdKeyDictionary = WeakIdKeyDictionary()


def share_snapshot(network: nn.Module, tree: nn.Module) -> None:
    """Puts tensors of earlier snapshots of this network in the place of those in the tree that are equal to them.

    What a network was when a snapshot was taken is in the snapshot: contents are compared, so that a network that has
    changed meanwhile, in whatever way, shares what has not changed. Snapshots are not written to: loading and
    converting puts new tensors in their place, in one tree.

    :param network: The network that the tree is a snapshot of; known by its identity.
    :param tree: The snapshot, a tree of modules with buffers.
    """
    with _lock:
        others: WeakSet[nn.Module] = _trees.setdefault(network, WeakSet())
        alive = [dict(other.named_buffers()) for other in others]
        others.add(tree)
    for prefix, node in tree.named_modules():
        for name, tensor in buffers_in(node).items():
            if tensor is not None:
                known = (other.get(f"{prefix}.{name}".lstrip(".")) for other in alive)
                buffers_in(node)[name] = _first_equal(tensor, known)


def share_successor(old: Tensor, new: Tensor) -> Tensor:
    """The tensor to put in the place of `old`: `new`, or an equal one that has replaced it elsewhere.

    Mean and kernel of a model are converted, or loaded, one after the other.
    """
    if new is old:
        return new
    with _lock:
        references = [reference for reference in _successors.get(old, []) if reference() is not None]
        shared = _first_equal(new, (reference() for reference in references))
        if shared is new:
            _successors[old] = [*references, ref(new)]
    return shared


def _first_equal(tensor: Tensor, others: Iterable[Tensor | None]) -> Tensor:
    return next((other for other in others if other is not None and _has_same_bits(tensor, other)), tensor)


def _has_same_bits(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    kind, kind_of_other = ((t.dtype, t.device, t.layout, t.shape, t.is_inference()) for t in (one, other))
    if kind != kind_of_other or one.layout != torch.strided or one.is_meta or one.stride() != other.stride():
        return False
    if one.is_contiguous() and one.dim() > 0:  # also where there are NaNs, or zeros of either sign
        return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    return torch.equal(one, other)
