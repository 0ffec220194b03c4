"""What can be set, as context managers, in the manner of `gpytorch.settings`."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from ._compat import FeatureFlag, ValueSetting
from .distributed.group import DEFAULT_TIMEOUT, Group

T = TypeVar("T")


class distributed(ValueSetting):
    """Whether the rows of Jacobians, and what is made of them, are sharded over the ranks of a process group.

    Every rank runs the same script with the same inputs, started by `torchrun`, and makes the same calls within this
    context. Results are replicated, the same bits on all ranks. The memory budget is each rank's. Training inputs, and
    others that are kept between computations, are sharded where there is a point for each rank.

    Entering it gives the :class:`~ntk_gp.distributed.group.Group`, which counts the bytes that go between ranks:

    >>> with ntk_gp.settings.distributed() as group:  # doctest: +SKIP
    ...     mean = model(test_x).mean
    ...     print(group.rank, group.size, group.traffic)

    (Default: off.)

    :param group: A process group of `torch.distributed`; None for the world, False for none: each rank by itself.
    :param timeout: Seconds that a rank waits for the others in one operation, before it raises.
    :raises RuntimeError: If `torch.distributed` has not been initialised, or ranks differ in what must be equal, or do
        not answer in time, because one of them has failed.
    """

    _global_value: Group | None = None
    _last: Group | None = None

    def __init__(self, group: Any = None, timeout: float = DEFAULT_TIMEOUT):
        self._timeout = self._timeout_before = _positive(timeout, "timeout")
        super().__init__(None if group is False else self._known(group, self._timeout))

    def __enter__(self) -> Group | None:
        super().__enter__()
        group = self.group()
        if group is not None:
            self._timeout_before, group.timeout = group.timeout, self._timeout
        return group

    def __exit__(self, *args: Any) -> bool:
        group = self.group()
        if group is not None:
            group.timeout = self._timeout_before
        return super().__exit__(*args)

    @classmethod
    def group(cls) -> Group | None:
        """The ranks that work together at the moment; None where each process works by itself."""
        return cls.value()

    @classmethod
    def _set_value(cls, value: Any) -> None:
        super()._set_value(value if value is None or isinstance(value, Group) else cls._known(value, DEFAULT_TIMEOUT))

    @classmethod
    def _known(cls, process_group: Any, timeout: float) -> Group:
        """The same object for a process group as the last time, which what is kept belongs to."""
        new = Group(process_group, timeout)
        if cls._last is None or not cls._last.is_of(new.process_group):
            new.least_memory = _least_memory(new)
            cls._last = new
        return cls._last


class memory_budget(ValueSetting):
    """Bytes that one computation may take beyond its inputs and its result, caches included.

    Work is cut into chunks that fit, and what does not fit is recomputed instead of stored: a smaller budget costs
    time, never accuracy.

    (Default: a quarter of the memory of the inputs' device. Within :class:`distributed` that of each rank, of the
    smallest device among them, and of a CPU's memory its share among the ranks on one machine.)

    :param value: A number of bytes, or text such as `"1GB"`, `"512 MiB"` or `"2e9"`; None for the default.
    :raises ValueError: If it is not positive, or a text of another form.
    """

    _global_value: float | None = None

    def __init__(self, value: float | str | None):
        super().__init__(None if value is None else _number_of_bytes(value))

    @classmethod
    def _set_value(cls, value: float | str | None) -> None:
        super()._set_value(None if value is None else _number_of_bytes(value))

    @classmethod
    def bytes(cls, device: torch.device) -> int:
        """The budget in force for computations on `device`."""
        value = cls.value()
        if value is not None:
            return int(value)
        device, group = torch.device(device), distributed.group()
        known = None if group is None else group.least_memory.get(device.type)
        return (_device_memory(device) if known is None else known) // 4


class allow_tf32(FeatureFlag):
    """Whether convolutions on a GPU may round their inputs to TF32 (10 bits), which is faster.

    (Default: False. Matrix products follow `torch.set_float32_matmul_precision`.)
    """

    _default = False


class progress_bar(FeatureFlag):
    """Whether long work shows a progress bar (needs the package tqdm): Gram matrices, factorisations, the eigenvalues
    that fitting needs, iterations, variances, the network at many inputs, and averages over hyperparameters.

    (Default: False.)
    """

    _default = False


class solve_tolerance(ValueSetting):
    """The relative residual ‖(K + D)x − b‖ / ‖b‖ at which an iterative solve stops.

    Only where neither K + D nor its counterpart in weight space fits in the memory budget is a system solved by
    iteration; the residual is measured in float64. A tolerance that the user sets in `gpytorch.settings.cg_tolerance`
    or `eval_cg_tolerance` comes first.

    (Default: 1e-4.)
    """

    _global_value: float = 1e-4

    def __init__(self, value: float):
        super().__init__(_positive(value, "solve_tolerance"))


class love_tolerance(ValueSetting):
    """How far variances may be above the exact ones, as a part of themselves, with `gpytorch.settings.fast_pred_var`.

    On average over training points; single test points far from all training points may be off by a few times as much.

    (Default: 1e-3.)
    """

    _global_value: float = 1e-3

    def __init__(self, value: float):
        super().__init__(_positive(value, "love_tolerance"))


class solver(ValueSetting):
    """The one way to solve with K + D: `"function_space"`, `"weight_space"`, `"iterative"`, or within
    :class:`distributed` also `"distributed"`, function space over ranks, and `"distributed_weight_space"`; None for the
    cheapest.

    By default the one with the least flops of those that are exact and fit in the memory budget is taken, and iteration
    where none does: :func:`ntk_gp.solver_report` says which that is for a model, and why. A solver that is set here
    serves marginal likelihoods, predictions and samples alike, whatever it costs and whatever
    `gpytorch.settings.max_cholesky_size` is. So fitting does without the one eigendecomposition that otherwise serves
    all its steps, and without second derivatives. A model that has predicted keeps the solver it has, until
    `model.train()`. Where iteration does not reach its tolerance, and memory allows, it still ends in a factorisation.

    Sums and products of kernels, and what GPyTorch solves by structure, are solved as ever. Laplace's approximation
    (:class:`~ntk_gp.LaplaceGP`) takes the space that is set, and refuses iteration.

    (Default: None.)

    :param value: A solver's name, or None.
    :raises ValueError: If there is no such solver; and where something is to be solved that this one cannot serve, such
        as batches by iteration.
    :raises MemoryError: Where something is to be solved for which this one needs more than the memory budget.
    """

    _global_value: str | None = None
    names: tuple[str, ...] = ()  # as :mod:`ntk_gp.solvers.table` has them, which no import leads to from here

    def __init__(self, value: str | None):
        super().__init__(self._known(value))

    @classmethod
    def _set_value(cls, value: str | None) -> None:
        super()._set_value(cls._known(value))

    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is None or value in cls.names:
            return value
        raise ValueError(
            f"There is no solver {value!r}: it is one of {', '.join(map(repr, cls.names))}, or None. "
            "A new one has its line in ntk_gp/solvers/table.py."
        )


def progress(steps: Sequence[T], description: str) -> Iterable[T]:
    """The steps, behind a progress bar where one was asked for and there is more than one step."""
    return steps if progress_bar.off() or len(steps) < 2 else _tqdm()(steps, desc=description)


@contextmanager
def stage(description: str) -> Iterator[None]:
    """A bar of one step, where bars were asked for, around one long call to a library."""
    if progress_bar.off():
        yield
        return
    with _tqdm()(total=1, desc=description) as bar:
        yield
        bar.update()


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("ntk_gp.settings.progress_bar needs the package tqdm: pip install tqdm.") from error
    return tqdm


_UNITS = {"": 1, **{f"{prefix}b": 1000**i for i, prefix in enumerate(("", "k", "m", "g", "t"))}}
_UNITS.update({f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", start=1)})


def _number_of_bytes(value: float | str) -> int:
    if not isinstance(value, str):
        return int(_positive(value, "memory_budget"))
    match = re.fullmatch(r"\s*([-+]?[\d_.]+(?:e[-+]?\d+)?)\s*([a-z]*)\s*", value.lower())
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    unit = _UNITS.get(match[2]) if match else None
    if unit is None or math.isnan(number):
        raise ValueError(f"memory_budget={value!r} is no number of bytes: write for instance '1GB', '512 MiB' or 2e9.")
    return int(_positive(number * unit, "memory_budget"))


def _positive(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}.")
    return value


def _least_memory(group: Group) -> dict[str, int]:
    """For each kind of device, the least memory that any rank has of it: what is decided by it is decided alike."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    found = {"cpu": _device_memory(torch.device("cpu")) // max(1, beside)}
    if torch.cuda.is_available():
        found["cuda"] = _device_memory(torch.device("cuda", torch.cuda.current_device()))
    least = -group.largest(-torch.tensor(list(found.values()), dtype=torch.int64, device=group.device))
    return dict(zip(found, least.tolist(), strict=True))


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
