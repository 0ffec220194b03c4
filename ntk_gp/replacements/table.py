"""Tables of what is called in a function's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def replacement(function: Callable[..., Any], table: Mapping[Callable, Callable]) -> Callable[..., Any]:
    """What a table has in a function's place, or the function."""
    try:
        return table.get(function, function)
    except TypeError:  # a callable that cannot be hashed
        return function
