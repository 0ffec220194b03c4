"""The terms of several captures put together, in the forms that products and Gram matrices are quickest with."""

from __future__ import annotations

import torch

from ..terms import FeatureTerm, MatrixTerm, Term
from .gram import is_tiled

# A matrix whose per-point gradients are hardly wider than its two factors is kept as them: one product in place of two.
_DENSE_MARGIN = 16


def joined(parts: list[list[Term]]) -> list[Term]:
    """The terms of all chunks, term by term; the chunks are emptied, so that only one term at a time exists twice."""
    terms = []
    while parts[0]:
        first, *others = (part.pop() for part in parts)
        terms.append(_dense(first.concatenate(others) if others else first))
        del first, others
    return terms[::-1]


def tidy(terms: list[Term]) -> list[Term]:
    """Small dense blocks beside one another, so that a Gram tile takes one product for all of them."""
    small = [term for term in terms if isinstance(term, FeatureTerm) and is_tiled(term)]
    others = [term for term in terms if not (isinstance(term, FeatureTerm) and is_tiled(term))]
    return [FeatureTerm.join(small), *others] if small else others


def _dense(term: Term) -> Term:
    if not isinstance(term, MatrixTerm) or term.num_positions > 1:
        return term
    heads, d_out, _ = term.weight.shape
    if heads * d_out * term.num_columns > heads * (d_out + term.num_columns) + _DENSE_MARGIN:
        return term
    rows = term.gradient_rows(slice(None))  # (B, n, C, H, d_out, columns)
    if term.bias is None or heads * d_out == 1:  # the columns are in the parameters' order
        return FeatureTerm(term.views, rows.flatten(3))
    return FeatureTerm(
        [term.weight, term.bias], torch.cat([rows[..., :-1].flatten(3), rows[..., -1].flatten(3)], dim=-1)
    )
