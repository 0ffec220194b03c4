"""The terms of several captures put together, in the forms that products and Gram matrices are quickest with."""

from __future__ import annotations

from ..terms import FeatureTerm, Term
from .gram import is_tiled


def joined(parts: list[list[Term]]) -> list[Term]:
    """The terms of all chunks, term by term; the chunks are emptied, so that only one term at a time exists twice."""
    terms = []
    while parts[0]:
        first, *others = (part.pop() for part in parts)
        terms.append((first.concatenate(others) if others else first).compact())
        del first, others
    return terms[::-1]


def tidy(terms: list[Term]) -> list[Term]:
    """Small dense blocks beside one another, so that a Gram tile takes one product for all of them."""
    small: list[FeatureTerm] = []
    others: list[Term] = []
    for term in terms:
        if isinstance(term, FeatureTerm) and is_tiled(term):
            small.append(term)
        else:
            others.append(term)
    return [FeatureTerm.join(small), *others] if small else others
