"""Parameters computed from parameters: what becomes of a use of one, for the parameters that it was computed from.

================  ===================================================================================================
:mod:`.computed`  a tensor that was computed from parameters alone, and its derivatives by them
:mod:`.registry`  the table of maps: functions through which the terms of a use can be pulled back
:mod:`.own`       the maps of the package
:mod:`.pulling`   terms for computed tensors to terms for parameters
================  ===================================================================================================
"""

from . import own  # noqa: F401
from .computed import Computed, Operand
from .pulling import pull_back
from .registry import Pull, UnsupportedMap, is_own, mark_as_own, register_map

mark_as_own()

__all__ = ["Computed", "Operand", "Pull", "UnsupportedMap", "is_own", "pull_back", "register_map"]
