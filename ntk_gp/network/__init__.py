"""The network to be linearised: a frozen copy of the user's module, its parameters chosen, grouped and flattened."""

from .frozen import FrozenNetwork, preserved_random_state
from .function import ALL_OUTPUTS, NetworkFunction, check_finite, check_tensor, full_precision, is_finite, normal_tensor
from .graph import nodes_below
from .rows import some_rows
from .snapshot import ParameterSelection
from .switches import Switch

__all__ = [
    "ALL_OUTPUTS",
    "FrozenNetwork",
    "NetworkFunction",
    "ParameterSelection",
    "Switch",
    "check_finite",
    "check_tensor",
    "full_precision",
    "is_finite",
    "nodes_below",
    "normal_tensor",
    "preserved_random_state",
    "some_rows",
]
