"""What of a network's result is linearised: the way to one tensor in it, whose columns are the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

Step = str | int | Callable[[Any], Any]
Output = int | str | Sequence[int] | Callable[[Any], Any] | tuple[Any, ...] | None

# What `output` says of the columns of the tensor that it is about, rather than of the way there.
_OF_COLUMNS = ("all", "batch")


def way_and_columns(output: Any) -> tuple[tuple[Step, ...], Any]:
    """The steps that lead from what a network returns to one tensor, and which of its columns to take.

    =========================  ======================  ========
    `output`                   steps                   columns
    =========================  ======================  ========
    `3`, `[0, 3]`, `"all"`     none                    that
    `"logits"`, a function     that                    the only one
    `("logits", "all")`        all but the last        the last
    =========================  ======================  ========
    """
    if isinstance(output, tuple):
        *steps, last = output
        return (*steps, last) if _is_step(last) else tuple(steps), None if _is_step(last) else last
    return ((output,), None) if _is_step(output) else ((), output)


def _is_step(value: Any) -> bool:
    return callable(value) or (isinstance(value, str) and value not in _OF_COLUMNS)


def check_steps(steps: Sequence[Any]) -> None:
    """Raises where one of them is none."""
    for step in steps:
        if not callable(step) and (not isinstance(step, (str, int)) or isinstance(step, bool)):
            raise TypeError(f"A step to the output is a name, a position or a function, got {step!r}.")


def tensor_of(returned: Any, steps: Sequence[Step]) -> Any:
    """What the steps lead to: a key or an attribute by name, an element by position (of a tensor: along its second
    dimension), or what a function makes of it.

    :raises ValueError: Where there is none.
    """
    for step in steps:
        returned = step(returned) if callable(step) else _taken(returned, step)
    return returned


def _taken(returned: Any, step: str | int) -> Any:
    if isinstance(step, int):
        try:
            return returned[:, step] if isinstance(returned, Tensor) else returned[step]
        except (TypeError, IndexError, KeyError) as error:
            raise ValueError(f"The network's result has no element {step}: it is {described(returned)}.") from error
    if isinstance(returned, Mapping) and step in returned:
        return returned[step]
    if isinstance(returned, (Mapping, Tensor)) or not hasattr(returned, step):
        raise ValueError(f"The network's result has no {step!r}: it is {described(returned)}.")
    return getattr(returned, step)


def described(returned: Any) -> str:
    """What a result is, in a few words."""
    kind = type(returned).__name__
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    if isinstance(returned, Mapping):
        return f"a {kind} with {', '.join(map(repr, returned))}"
    if isinstance(returned, (tuple, list)):
        return f"a {kind} of {len(returned)}: {', '.join(type(part).__name__ for part in returned)}"
    return f"a {kind}"
