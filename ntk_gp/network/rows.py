"""Whether a network treats each row of its inputs by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .function import MIXES_ROWS, NetworkFunction

# Rows looked at, to find different ones among them.
_CANDIDATES = 256


def spread_rows(x: Tensor, count: int) -> Tensor:
    """Up to `count` different rows of x (n, d), spread over all of them; two made different where all are equal."""
    rows = x[_spread(len(x), _CANDIDATES, x.device)].unique(dim=0)
    if len(rows) == 1 and len(x) > 1:
        # A little nearer to zero: integers stay in their range however they are rounded.
        return torch.cat([rows, 0.99 * rows])
    return rows[_spread(len(rows), count, x.device)]


def _spread(n: int, count: int, device: torch.device) -> Tensor:
    """Up to `count` of the numbers below n, evenly spaced."""
    return torch.linspace(0, max(n - 1, 0), min(n, count), device=device).long()


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
            raise ValueError(f"{MIXES_ROWS} (Some rows by themselves raised: {error})") from error
    tolerance = 1e-5 * max(float(together.abs().max()), 1e-30)
    if not torch.allclose(together, again, rtol=0.0, atol=tolerance):
        raise ValueError(
            "The network gives different outputs for the same inputs, so it has no Jacobian. It is already in eval "
            "mode: look for random numbers in its forward, such as torch.nn.functional.dropout without "
            "training=self.training."
        )
    same_alone = torch.allclose(together[[0, -1]], alone, rtol=0.0, atol=tolerance)
    if not same_alone or not torch.allclose(together, apart, rtol=0.0, atol=tolerance):
        raise ValueError(MIXES_ROWS)
