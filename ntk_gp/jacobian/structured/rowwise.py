"""Telling from autograd's graph alone that no row of anything meets another's: no row need be compared then.

Every node on the way from the output to the uses must be of a kind that is known to work on each element of dimension 0
by itself, with one block of elements after the other belonging to each point. Other graphs may keep rows apart as well;
they are put to the test (:mod:`.verification`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..._compat import input_metadata, saved_dim, saved_dim0, saved_dim1, saved_normalized_shape
from ...network import LEAF
from ...replacements.recorded import ROW_BY_ROW
from .layout import Layout
from .record import Recording

# One tensor that is differentiated, the others being constants: by position among the node's inputs.
_OF_ONE_INPUT = {
    "AddmmBackward0": 1,
    "MmBackward0": 0,
    "ConvolutionBackward0": 0,
    "NativeGroupNormBackward0": 0,
    "AvgPool2DBackward0": 0,
    "MaxPool2DWithIndicesBackward0": 0,
    "AdaptiveAvgPool2DBackward0": 0,
}
# The number of dimensions, where a tensor of fewer has channels in place of points.
_DIMENSIONS = {"AvgPool2DBackward0": 4, "MaxPool2DWithIndicesBackward0": 4, "AdaptiveAvgPool2DBackward0": 4}
# Of any number of tensors that broadcast, or that have one matrix for each element of dimension 0.
_ELEMENTWISE = frozenset(
    (
        "AbsBackward0",
        "AddBackward0",
        "BmmBackward0",
        "ClampBackward1",
        "ClampMaxBackward0",
        "ClampMinBackward0",
        "CloneBackward0",
        "CosBackward0",
        "DivBackward0",
        "EluBackward0",
        "ErfBackward0",
        "ExpBackward0",
        "Expm1Backward0",
        "GeluBackward0",
        "HardsigmoidBackward0",
        "HardswishBackward0",
        "HardtanhBackward0",
        "LeakyReluBackward0",
        "LogBackward0",
        "Log1PBackward0",
        "LogSigmoidBackward0",
        "MishBackward0",
        "MulBackward0",
        "NegBackward0",
        "PowBackward0",
        "ReciprocalBackward0",
        "ReluBackward0",
        "RsqrtBackward0",
        "RsubBackward1",
        "SigmoidBackward0",
        "SiluBackward0",
        "SinBackward0",
        "SliceBackward0",  # that leaves dimension 0 as long as it was: whole
        "SoftplusBackward0",
        "SqrtBackward0",
        "SubBackward0",
        "TanhBackward0",
        "ThresholdBackward0",
        "ToCopyBackward0",
    )
)
# Along one dimension or several, or moving some.
_ALONG = {
    "CatBackward0": (saved_dim,),
    "LogSoftmaxBackward0": (saved_dim,),
    "MeanBackward1": (saved_dim,),
    "SelectBackward0": (saved_dim,),
    "SoftmaxBackward0": (saved_dim,),
    "SumBackward1": (saved_dim,),
    "TransposeBackward0": (saved_dim0, saved_dim1),
}
# The same elements in the same order.
_RESHAPED = frozenset(
    ("ReshapeAliasBackward0", "SqueezeBackward1", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0")
)


def keeps_rows_apart(recording: Recording, layouts: Sequence[Layout]) -> bool:
    """Whether the graph alone says that a row of a use's result has an effect on its own point's outputs only."""
    if recording.unseen or recording.is_hooked or recording.output.grad_fn is None:
        return False
    places = [layout.result.place for layout in layouts]
    if any(place is None or place[0] != 0 for place in places):
        return False
    n = len(recording.output)
    return all(_keeps_rows_apart(node, n) for node in recording.nodes)


def _keeps_rows_apart(node: Any, n: int) -> bool:
    name = node.name()
    if name == LEAF:
        return True  # the place of a use's result: whoever takes it looks at its shape
    shapes = [metadata.shape for metadata in input_metadata(node)]
    inputs = {i: _shape(*edge) for i, edge in enumerate(node.next_functions) if edge[0] is not None}
    if not all(shape and shape[0] % n == 0 for shape in (*shapes, *inputs.values())):
        return False
    if name in _RESHAPED:
        return True
    if any(shape[0] != shapes[0][0] for shape in (*shapes, *inputs.values())):
        return False
    if name in _ELEMENTWISE or type(node) in ROW_BY_ROW:
        return all(len(shape) == len(shapes[0]) for shape in inputs.values())
    if name in _OF_ONE_INPUT:
        is_batched = len(shapes[0]) == _DIMENSIONS.get(name, len(shapes[0]))
        return is_batched and set(inputs) == {_OF_ONE_INPUT[name]}
    if name == "NativeLayerNormBackward0":
        return set(inputs) == {0} and len(saved_normalized_shape(node)) < len(shapes[0])
    return name in _ALONG and all(_avoids_first(node, attribute, inputs) for attribute in _ALONG[name])


def _shape(node: Any, index: int) -> torch.Size:
    """Of the tensor that an edge stands for."""
    return node.variable.shape if node.name() == LEAF else input_metadata(node)[index].shape


def _avoids_first(node: Any, attribute: Callable[[Any], Any], inputs: dict[int, torch.Size]) -> bool:
    """Whether a dimension, or several, that a node works along, are others than the first."""
    saved = attribute(node)
    dims = saved if isinstance(saved, tuple) else (saved,)
    ndim = len(next(iter(inputs.values())))
    # Negative ones are handed out as unsigned numbers of 64 bits.
    return bool(dims) and all((dim - (1 << 64) if dim >= 1 << 63 else dim) % ndim != 0 for dim in dims)
