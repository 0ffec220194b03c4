"""What snapshots of one network share, such as a mean's and a kernel's: tensors, and what these are converted to."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .._compat import buffers_in

_lock = threading.Lock()
# Both hold nothing alive: the snapshots of a network, and the tensors that were put in a tensor's place.
_families: WeakIdKeyDictionary = WeakIdKeyDictionary()
_successors: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Snapshot(Protocol):
    """What is taken of a network."""

    @property
    def tensors(self) -> nn.Module:
        """Its tensors, a tree of modules with buffers."""


def share_snapshot(network: nn.Module, snapshot: Snapshot) -> WeakSet:
    """Puts tensors of earlier snapshots of this network in the place of those of this one that are equal to them.

    What a network was when a snapshot was taken is in the snapshot: contents are compared, so that a network that has
    changed meanwhile, in whatever way, shares what has not changed. Snapshots are not written to: loading and
    converting puts new tensors in their place, in one tree.

    :param network: The network that the snapshot is of; known by its identity.
    :param snapshot: The snapshot.
    :return: All its snapshots, as far as they are in use, this one among them.
    """
    with _lock:
        family: WeakSet = _families.setdefault(network, WeakSet())
        alive = [dict(other.tensors.named_buffers()) for other in family]
        family.add(snapshot)
    for prefix, node in snapshot.tensors.named_modules():
        for name, tensor in buffers_in(node).items():
            if tensor is not None:
                known = (other.get(f"{prefix}.{name}".lstrip(".")) for other in alive)
                buffers_in(node)[name] = _first_equal(tensor, known)
    return family


def others_of(family: WeakSet, snapshot: Snapshot) -> list:
    """The other snapshots of its network."""
    with _lock:
        return [other for other in family if other is not snapshot]


def has_same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two trees hold the very same tensors by the same names."""
    mine, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    return mine.keys() == theirs.keys() and all(tensor is theirs[name] for name, tensor in mine.items())


def is_same_module(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are the same in all that would be saved of them; not known, and False, where nothing can be.

    A network may have been changed, other than in its tensors, between two snapshots of it.
    """
    try:
        return pickle.dumps(one) == pickle.dumps(other)
    except Exception:  # whatever they hold that cannot be pickled
        return False


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
    kind, kind_of_other = ((t.dtype, t.device, t.layout, t.shape, t.is_inference()) for t in (one, other))
    if kind != kind_of_other or one.layout != torch.strided or one.is_meta or one.stride() != other.stride():
        return False
    if one.is_contiguous() and one.dim() > 0:  # also where there are NaNs, or zeros of either sign
        return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    return torch.equal(one, other)
