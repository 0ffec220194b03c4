"""How alike two tasks are to a network, two networks on one set of inputs, or a network and targets: by Jacobians.

========================  ==========================================================================================
:func:`of_tasks`          which weights two tasks need: Fisher diagonals, leading right singular subspaces
:func:`of_networks`       what two networks say of inputs: tangent kernels, leading left singular subspaces
:func:`of_targets`        whether a network's tangent kernel points to the targets
========================  ==========================================================================================
"""

from .comparisons import of_networks, of_targets, of_tasks
from .resampling import Estimate
from .results import LayerOfNetworks, LayerOfTargets, LayerOfTasks, Similarity

__all__ = [
    "Estimate",
    "LayerOfNetworks",
    "LayerOfTargets",
    "LayerOfTasks",
    "Similarity",
    "of_networks",
    "of_targets",
    "of_tasks",
]
