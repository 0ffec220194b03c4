"""The network to be linearised: a frozen copy of the user's module, its parameters chosen, grouped and flattened."""

from .frozen import FrozenNetwork
from .function import ALL_OUTPUTS, NetworkFunction, check_finite, check_tensor, full_precision, is_finite, normal_tensor
from .snapshot import ParameterSelection

__all__ = [
    "ALL_OUTPUTS",
    "FrozenNetwork",
    "NetworkFunction",
    "ParameterSelection",
    "check_finite",
    "check_tensor",
    "full_precision",
    "is_finite",
    "normal_tensor",
]
