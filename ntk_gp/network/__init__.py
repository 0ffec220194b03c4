"""The network to be linearised: a frozen copy of the user's module, its parameters chosen, grouped and flattened."""

from .by_output import FunctionByOutput, NetworkByOutput, count_outputs, numbered
from .checks import check_finite, check_tensor, is_finite
from .chosen_outputs import ALL_OUTPUTS, OUTPUTS_AS_BATCH, Outputs
from .expected import expecting, values_along
from .features import PENULTIMATE, head_of, layer_features
from .frozen import FrozenNetwork, preserved_random_state
from .function import NO_MODE, NetworkFunction
from .graph import LEAF, are_one_origin, are_one_slice, nodes_below, origin, without_needless_graph
from .inputs import InputDtype, InputShape, pack
from .returned import Output
from .rows import some_rows
from .same import is_same_function, is_same_snapshot
from .snapshot import ParameterSelection
from .switches import Switch
from .tensors import full_precision, normal_tensor

__all__ = [
    "ALL_OUTPUTS",
    "LEAF",
    "NO_MODE",
    "OUTPUTS_AS_BATCH",
    "PENULTIMATE",
    "FrozenNetwork",
    "FunctionByOutput",
    "InputDtype",
    "InputShape",
    "NetworkByOutput",
    "NetworkFunction",
    "Output",
    "Outputs",
    "ParameterSelection",
    "Switch",
    "are_one_origin",
    "are_one_slice",
    "check_finite",
    "check_tensor",
    "count_outputs",
    "expecting",
    "full_precision",
    "head_of",
    "is_finite",
    "is_same_function",
    "is_same_snapshot",
    "layer_features",
    "nodes_below",
    "normal_tensor",
    "numbered",
    "origin",
    "pack",
    "preserved_random_state",
    "some_rows",
    "values_along",
    "without_needless_graph",
]
