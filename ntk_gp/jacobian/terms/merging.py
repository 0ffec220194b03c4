"""Terms that have parameters in common, put together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .base import Term
from .combined import CombinedTerm
from .corrected import CorrectedTerm


def merge_terms(terms: Sequence[Term]) -> list[Term]:
    """Terms without cross terms between them: the uses of a parameter that several terms share become one term.

    Uses of one kind become more positions of one use. Unlike ones (an embedding that is also a decoder) are combined.
    """
    names = [view.name for term in terms for view in term.views]
    if len(set(names)) == len(names):
        return list(terms)
    return [_joined(cluster) for cluster in _clusters(terms)]


def _joined(cluster: Sequence[Term]) -> Term:
    """Terms that have parameters in common, as one."""
    alike: dict[Hashable, list[Term]] = {}
    for term in cluster:
        alike.setdefault(term.key(), []).append(term)
    uses: list[Term] = []
    for first, *others in alike.values():
        merged = first.merge(others) if others else first
        uses += [first, *others] if merged is None else [merged]
    if len(uses) == 1:
        return uses[0]
    return CorrectedTerm.of(uses) or CombinedTerm(uses)


def _clusters(terms: Sequence[Term]) -> list[list[Term]]:
    clusters: list[list[Term]] = []
    for term in terms:
        touching = [cluster for cluster in clusters if any(_meet(term, member) for member in cluster)]
        joined = [member for cluster in touching for member in cluster] + [term]
        clusters = [cluster for cluster in clusters if cluster not in touching] + [joined]
    return clusters


def _meet(term: Term, other: Term) -> bool:
    return any(view.meets(view2) for view in term.views for view2 in other.views)
