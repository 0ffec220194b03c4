"""What inputs must be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def is_finite(x: Tensor) -> bool:
    """Whether the sum is finite, and so every element; faster than a look at each. An overflow is no proof of more."""
    return math.isfinite(x.detach().sum())


def check_tensor(x: Any) -> None:
    """Raises for inputs that are no tensor, and under `torch.jit.trace`."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Expected inputs as a torch.Tensor, got {type(x).__name__}. Convert them: torch.from_numpy(x) for a numpy "
            "array, torch.tensor(x) for a list."
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record the network's derivatives. Export the posterior mean instead: "
            "torch.export.export(ntk_gp.adapted_network(model), (x,))."
        )


def check_inputs(*given: Any) -> None:
    """Raises for inputs that do not serve, or that do not go together: what they are is looked at before what is in
    them."""
    for x in given:
        check_tensor(x)
    first = given[0]
    for x in given:
        if (x.dtype, x.device) != (first.dtype, first.device):
            raise ValueError(
                f"The two sets of inputs differ: {first.dtype} on {first.device}, and {x.dtype} on {x.device}. "
                "Convert one with .to() to the dtype and device of the other."
            )
    for x in given:
        check_finite(x)


def check_finite(x: Tensor) -> None:
    """Raises where the inputs are NaN or infinite."""
    if is_finite(x):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).any(-1).nonzero()[:3].tolist()
        raise ValueError(
            f"Inputs of shape {tuple(x.shape)} have NaN or infinite features, first in rows {bad}. Remove or impute "
            "them."
        )
