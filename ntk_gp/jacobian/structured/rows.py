"""Inputs at which a network is tried."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Candidates among which distinct ones are looked for.
_CANDIDATES = 64
# Fewer than these distinct inputs say too little about which is which.
_MIN_ROWS = 4


def some_rows(x: Tensor, count: int, evaluate: Callable[[Tensor], Tensor]) -> Tensor:
    """Up to `count` distinct rows of x (n, d), from everywhere in it and in random order; three at least.

    Where x has too few of them, others close to them are added: a permutation of equal rows would not show. What is
    added to a feature is below one half and positive, so that integers in floating point stay valid. Where `evaluate`
    does not take them all the same, or its result is not finite, there are copies.
    """
    generator = torch.Generator().manual_seed(0)
    if len(x) > _CANDIDATES:
        candidates = x[torch.randint(len(x), (_CANDIDATES,), generator=generator).to(x.device)]
    else:
        candidates = x[torch.randperm(len(x), generator=generator).to(x.device)]
    distinct: dict[bytes, Tensor] = {}
    for row in candidates:
        distinct.setdefault(row.cpu().numpy().tobytes(), row)
    rows = torch.stack(list(distinct.values())[:count])
    if len(rows) >= _MIN_ROWS:
        return rows
    copies = rows.repeat(-(-_MIN_ROWS // len(rows)), 1)
    noise = torch.rand(copies.shape, generator=generator, dtype=torch.float64).to(copies)
    noise[: len(rows)] = 0.0
    more = copies + 0.3 * noise * copies.abs().clamp(1e-3, 1.0)
    try:
        is_valid = bool(torch.isfinite(evaluate(more)).all())
    except Exception:  # whatever the network wants of its inputs
        is_valid = False
    return more if is_valid else copies
