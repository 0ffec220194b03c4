"""Whether two snapshots are of one network: the mean's and the kernel's, which are made of it one after the other."""

from __future__ import annotations

from .equality import same_module
from .frozen import FrozenNetwork


def is_same_snapshot(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    """Whether two are of the same function, with the same parameters chosen, and share every tensor."""
    return one._presumed == other._presumed and one.specification == other.specification and _is_same(one, other)


def is_same_function(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    """Whether two have the same values f(x), whichever parameters they are linearised in.

    :param one: One that edits without a trace have just been looked for in; where it has none since the last
        comparison, the other has none either.
    """
    states = one.fingerprint(), other.fingerprint()
    if one.compared is None or one.compared[:2] != states:
        states = states[0], other.fingerprint(thorough=True)
        one.compared = (*states, _is_same_function(one, other))
    return one.compared[2]


def _is_same_function(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    ours, theirs = one.specification, other.specification
    takes, gives = ours.inputs == theirs.inputs, (ours.steps, ours.outputs) == (theirs.steps, theirs.outputs)
    return takes and gives and _is_same(one, other)


def _is_same(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    """Snapshots of one module share what is equal (:mod:`.sharing`), so that the objects say it."""
    ours, theirs = dict(one.named_buffers()), dict(other.named_buffers())
    same_tensors = ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in ours)
    return same_tensors and one._aliases == other._aliases and same_module(one._skeleton[0], other._skeleton[0])
