"""The constant that makes a kernel's mean variance one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

_lock = threading.RLock()  # of all: each is written to once


class Normalization(nn.Module):
    """What a kernel is divided by: a given number, or its mean diagonal at the inputs that it sees first.

    :param chosen: That number; or True for the mean diagonal.
    :param dtype: Of the buffer.
    :param device: Of the buffer.

    :ivar torch.Tensor value: A buffer, and so in the state: (), NaN as long as no inputs have been seen.
    """

    value: Tensor

    def __init__(self, chosen: bool | float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.is_given = not isinstance(chosen, bool)
        if self.is_given and not (isinstance(chosen, int | float) and math.isfinite(chosen) and chosen > 0):
            raise ValueError(
                f"normalize must be True, False or a positive number to divide the kernel by, got {chosen!r}."
            )
        with torch.inference_mode(False):
            start = float(chosen) if self.is_given else math.nan
            self.register_buffer("value", torch.full((), start, dtype=dtype, device=device))

    def at(self, mean_diagonal: Callable[[], float]) -> Tensor:
        """The constant, which is settled now if it was not.

        :param mean_diagonal: That of the kernel at the present inputs, if it is wanted.
        """
        if torch.isnan(self.value):
            with _lock:
                if torch.isnan(self.value):  # or another thread has settled it meanwhile
                    self.settle(mean_diagonal())
        return self.value

    def settle(self, mean_diagonal: float) -> None:
        """Takes this for the constant, in place: copies that share this module have it too."""
        if not (math.isfinite(mean_diagonal) and mean_diagonal > 0):
            raise ValueError(
                f"The kernel's mean diagonal at these inputs is {mean_diagonal}, which it cannot be divided by. Give "
                "normalize a positive number, or call normalize_at with other inputs."
            )
        with torch.no_grad():
            self.value.fill_(mean_diagonal)

    def forget(self) -> None:
        """Has the next inputs settle it, unless it was given."""
        if not self.is_given:
            with torch.no_grad():
                self.value.fill_(math.nan)
