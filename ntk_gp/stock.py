"""Which of GPyTorch's settings a user has made, and which hold the value that came with an import.

GPyTorch keeps only a setting's present value. A user who writes `max_cholesky_size(800)` means 800, although that is
the default as well, so values cannot tell. Objects can: at import, the defaults of a few settings are replaced by equal
numbers of a subclass. They compare, print and compute as before and travel with the value (`cg_tolerance(
eval_cg_tolerance.value())`, as GPyTorch writes itself, stays a default); whatever a user puts in their place is another
object. No method of GPyTorch's is replaced for this, and leaving a context brings the marked object back.

BoTorch assigns a size of its own when it is imported. If that comes later than this package, it is marked when the next
kernel is made, or else taken for BoTorch's as long as it has BoTorch's value.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from gpytorch import settings

BOTORCH_CHOLESKY_SIZE = 4096
STOCK_CHOLESKY_SIZES = (800, BOTORCH_CHOLESKY_SIZE)  # GPyTorch's default, and what importing BoTorch makes of it

_DEFAULTS = {
    settings.max_cholesky_size: STOCK_CHOLESKY_SIZES,
    settings.cg_tolerance: (1,),
    settings.eval_cg_tolerance: (0.01,),
    settings.max_root_decomposition_size: (100,),
}
_BY_DTYPE = {torch.float: "float_value", torch.double: "double_value", torch.half: "half_value"}


class StockInt(int):
    """A whole number that no user chose."""

    is_stock = True


class StockFloat(float):
    """A number that no user chose."""

    is_stock = True


def stock(value: float) -> float:
    """The same number, marked as a default."""
    return StockInt(value) if isinstance(value, int) else StockFloat(value)


def is_stock(value: Any) -> bool:
    """Whether a setting's value is a default, not a choice of the user's."""
    return getattr(value, "is_stock", False)


def mark() -> None:
    """Marks the present values as defaults; what was chosen before this package was imported is left as it is."""
    for setting, defaults in _DEFAULTS.items():
        value = setting.value()
        if not is_stock(value) and value in defaults:
            setting(stock(value)).__enter__()  # for good
    for dtype, name in _BY_DTYPE.items():
        value = settings.min_variance.value(dtype)
        if not is_stock(value) and value in (1e-6, 1e-10, 1e-3):
            settings.min_variance(**{name: stock(value)}).__enter__()


def mark_botorchs() -> None:
    """Marks the size that importing BoTorch has set, once, if that came after :func:`mark`."""
    setting = settings.max_cholesky_size
    if not _botorch.is_marked and "botorch" in sys.modules:
        if setting.value() == BOTORCH_CHOLESKY_SIZE:
            setting(stock(BOTORCH_CHOLESKY_SIZE)).__enter__()
        _botorch.is_marked = is_stock(setting.value()) and setting.value() == BOTORCH_CHOLESKY_SIZE


def chosen_cholesky_size() -> int | None:
    """The `gpytorch.settings.max_cholesky_size` that the user has set, if any."""
    value = settings.max_cholesky_size.value()
    unmarked = value == BOTORCH_CHOLESKY_SIZE and "botorch" in sys.modules and not _botorch.is_marked
    return None if is_stock(value) or unmarked else value


def chosen_min_variance(dtype: Any) -> float | None:
    """The `gpytorch.settings.min_variance` that the user has set for a dtype, if any."""
    value = settings.min_variance.value(dtype)
    return None if is_stock(value) else value


class _Botorch:
    is_marked = False


_botorch = _Botorch()
