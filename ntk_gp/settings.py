"""What can be set, as context managers, in the manner of `gpytorch.settings`."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from gpytorch.settings import _feature_flag, _value_context


class memory_budget(_value_context):
    """Bytes that one computation may take beyond its inputs and its result, caches included.

    Work is cut into chunks that fit, and what does not fit is recomputed instead of stored: a smaller budget costs
    time, never accuracy.

    (Default: a quarter of the memory of the inputs' device.)
    """

    _global_value: int | None = None

    @classmethod
    def bytes(cls, device: torch.device) -> int:
        """The budget in force for computations on `device`."""
        value = cls.value()
        return int(value) if value is not None else _device_memory(torch.device(device)) // 4


class allow_tf32(_feature_flag):
    """Whether convolutions on a GPU may round their inputs to TF32 (10 bits), which is faster.

    (Default: False. Matrix products follow `torch.set_float32_matmul_precision`.)
    """

    _default = False


class progress_bar(_feature_flag):
    """Whether long work shows a progress bar (needs the package tqdm).

    (Default: False.)
    """

    _default = False


class solve_tolerance(_value_context):
    """The relative residual ‖(K + D)x − b‖ / ‖b‖ at which an iterative solve stops.

    Only where neither K + D nor its counterpart in weight space fits in the memory budget is a system solved by
    iteration; the residual is measured in float64. A tolerance that the user sets in `gpytorch.settings.cg_tolerance`
    or `eval_cg_tolerance` comes first.

    (Default: 1e-4.)
    """

    _global_value: float = 1e-4


class love_tolerance(_value_context):
    """How far variances may be above the exact ones, as a part of themselves, with `gpytorch.settings.fast_pred_var`.

    On average over training points; single test points far from all training points may be off by a few times as much.

    (Default: 1e-3.)
    """

    _global_value: float = 1e-3


def progress(steps: Sequence[int], description: str) -> Iterable[int]:
    """The steps, behind a progress bar where one was asked for and there is more than one step."""
    if progress_bar.off() or len(steps) < 2:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("ntk_gp.settings.progress_bar needs the package tqdm: pip install tqdm.") from error
    return tqdm(steps, desc=description)


@functools.cache  # it is asked for in every prediction
def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    limit = Path("/sys/fs/cgroup/memory.max")  # what a container was given
    try:
        text = limit.read_text().strip()
    except OSError:
        return total
    return min(total, int(text)) if text.isdigit() else total
