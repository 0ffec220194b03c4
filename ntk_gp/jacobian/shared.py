"""One linearization for all kernels that are made of one network: what one of them computes, the others need not."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
from typing import Any
from weakref import WeakValueDictionary

import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..network import FrozenNetwork, is_same_snapshot
from ..network.sharing import share_snapshot
from ..network.snapshot import unwrap
from .linearization import Linearization

_lock = threading.Lock()
# Those of each network, in the order in which they were made. Holds neither networks nor linearizations alive.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()
_numbers = itertools.count()


def linearization_of(network: nn.Module, engine: str | None = None, **options: Any) -> Linearization:
    """The linearization of a snapshot of this network as it is now.

    Where there is one already, of the same network in the same state, with the same options and engine, what is
    returned is a copy of that, with its caches: Jacobians, Gram matrices and solvers are computed for both at once. It
    is a copy all the same. Converting it, loading other weights into it or replacing it changes no other, and it is
    tried at the first inputs of its own.

    :param network: The user's module.
    :param engine: As in :class:`Linearization`.
    :param options: Those of :class:`~ntk_gp.network.FrozenNetwork`.
    """
    new = Linearization(FrozenNetwork(network, **options), engine)
    source = unwrap(network)
    known = next((other for other in _alive(source) if _is_same(other, new)), None)
    shared = None if known is None else copy.deepcopy(known)
    if shared is not None and _is_same(shared, new):  # still: another thread may just have converted it
        # A selection by a function may select otherwise in another network.
        shared.network.take_options(new.network)
        shared.network.forget_trials()
        share_snapshot(source, shared.network.tensors)
        new = shared
    with _lock:
        _known.setdefault(source, WeakValueDictionary())[next(_numbers)] = new
    return new


def _alive(source: nn.Module) -> list[Linearization]:
    """Those of a network, the oldest first.

    On several ranks without those that nobody holds any more: each collects its garbage at a time of its own, and what
    one of them still knows the others would compute without it, waiting for its part.
    """
    if dist.is_available() and dist.is_initialized() and source in _known:
        gc.collect()
    with _lock:
        return list(_known.get(source, {}).values())


def _is_same(one: Linearization, other: Linearization) -> bool:
    return type(one.engine) is type(other.engine) and is_same_snapshot(one.network, other.network)
