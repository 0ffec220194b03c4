"""What operators check of what they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def check_right_hand_side(rhs: Tensor) -> None:
    """Raises for an empty training set, and for targets that are not numbers."""
    if rhs.shape[-2 if rhs.dim() > 1 else -1] == 0:
        raise ValueError("There is no training data: expected at least one input with its target.")
    if not torch.isfinite(rhs).all():
        count = int((~torch.isfinite(rhs)).sum())
        raise ValueError(
            f"{count} of {rhs.numel()} training targets (less the prior mean) are NaN or infinite. Remove them, or set "
            "gpytorch.settings.observation_nan_policy('mask')."
        )
