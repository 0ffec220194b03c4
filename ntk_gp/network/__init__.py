"""The network to be linearised: a frozen copy of the user's module, its parameters chosen, grouped and flattened."""

from .checks import check_finite, check_tensor, is_finite
from .features import PENULTIMATE, head_of, layer_features
from .frozen import FrozenNetwork, is_same_snapshot, preserved_random_state
from .function import NO_MODE, NetworkFunction
from .graph import LEAF, are_one_origin, are_one_slice, nodes_below, origin, without_needless_graph
from .rows import some_rows
from .snapshot import ParameterSelection
from .specification import ALL_OUTPUTS
from .switches import Switch
from .tensors import full_precision, normal_tensor

__all__ = [
    "ALL_OUTPUTS",
    "LEAF",
    "NO_MODE",
    "PENULTIMATE",
    "FrozenNetwork",
    "NetworkFunction",
    "ParameterSelection",
    "Switch",
    "are_one_origin",
    "are_one_slice",
    "check_finite",
    "check_tensor",
    "full_precision",
    "head_of",
    "is_finite",
    "is_same_snapshot",
    "layer_features",
    "nodes_below",
    "normal_tensor",
    "origin",
    "preserved_random_state",
    "some_rows",
    "without_needless_graph",
]
