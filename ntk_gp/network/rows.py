"""Inputs at which a network is tried, and whether it treats each row of them by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .function import NetworkFunction

_MIXES_ROWS = (
    "A row's output changes with the other rows of the batch, so the network is not a function of one input. Expected "
    "a network that treats rows independently in eval mode: give batch normalisation running statistics "
    "(track_running_stats=True), or freeze whatever mixes rows."
)
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
    generator = torch.Generator(device="cpu").manual_seed(0)
    if len(x) > _CANDIDATES:
        candidates = x[torch.randint(len(x), (_CANDIDATES,), generator=generator, device="cpu").to(x.device)]
    else:
        candidates = x[torch.randperm(len(x), generator=generator, device="cpu").to(x.device)]
    distinct: dict[bytes, Tensor] = {}
    for row in candidates:
        distinct.setdefault(row.cpu().numpy().tobytes(), row)
    rows = torch.stack(list(distinct.values())[:count])
    if len(rows) >= _MIN_ROWS:
        return rows
    copies = rows.repeat(-(-_MIN_ROWS // len(rows)), 1)
    noise = torch.rand(copies.shape, generator=generator, dtype=torch.float64, device="cpu").to(copies)
    noise[: len(rows)] = 0.0
    more = copies + 0.3 * noise * copies.abs().clamp(1e-3, 1.0)
    try:
        is_valid = bool(torch.isfinite(evaluate(more)).all())
    except Exception:  # whatever the network wants of its inputs
        is_valid = False
    return more if is_valid else copies


def check_rows_are_independent(function: NetworkFunction, rows: Tensor) -> None:
    """Raises where an output changes with the other rows of the batch, or from call to call.

    :param function: Tried before, with its own dtype.
    :param rows: At least two different ones, (m, d).
    """
    rows = rows.to(function.dtype)
    with function.tracing(), torch.no_grad():
        together, again = (function(function.parameters, rows) for _ in range(2))
        try:
            apart = torch.empty_like(together)
            for part in (slice(0, None, 2), slice(1, None, 2)):
                apart[part] = function(function.parameters, rows[part])
            alone = torch.cat([function(function.parameters, rows[i : i + 1]) for i in (0, len(rows) - 1)])
        except Exception as error:
            raise ValueError(f"{_MIXES_ROWS} (Some rows by themselves raised: {error})") from error
    tolerance = 1e-5 * max(float(together.abs().max()), 1e-30)
    if not torch.allclose(together, again, rtol=0.0, atol=tolerance):
        raise ValueError(
            "The network gives different outputs for the same inputs, so it has no Jacobian. It is already in eval "
            "mode: look for random numbers in its forward, such as torch.nn.functional.dropout without "
            "training=self.training."
        )
    same_alone = torch.allclose(together[[0, -1]], alone, rtol=0.0, atol=tolerance)
    if not same_alone or not torch.allclose(together, apart, rtol=0.0, atol=tolerance):
        raise ValueError(_MIXES_ROWS)


def check_values(function: NetworkFunction, x: Tensor, values: Tensor, rows: int) -> None:
    """Raises where two rows have other values by themselves than among all of x (n, d), `values` (n, C).

    What was tried with few rows need not hold for many; to be asked once for each number of rows, which the function
    takes down.

    :param rows: The size of the batch, of which x is as much as goes through the network at once.
    """
    places = [len(x) // 3, len(x) - 1]
    values = values.detach()
    with torch.no_grad():
        alone = function(function.parameters, x.detach()[places])
    tolerance = torch.finfo(function.inner_dtype or x.dtype).eps ** 0.5 * float(values.abs().max())
    if not torch.allclose(values[places], alone, rtol=0.0, atol=tolerance):
        raise ValueError(_MIXES_ROWS)
    function.add_checked(rows)
