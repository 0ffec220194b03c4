"""Looking at autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._compat import input_metadata, saved_dim, saved_start, saved_step

# The name of the nodes that stand for leaves, which have a `variable`; a user's function has any attributes it likes.
LEAF = "torch::autograd::AccumulateGrad"


def nodes_below(output: Tensor) -> Iterator[Any]:
    """The nodes of the graph that a tensor was computed by, each once."""
    seen: set[Any] = set()
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(child for child, _ in node.next_functions)


def leaves_below(output: Tensor) -> set[int]:
    """The ids of all the leaves that a tensor was computed from, its own if it is one that requires a gradient."""
    if output.is_leaf:
        return {id(output)} if output.requires_grad else set()
    return {id(node.variable) for node in nodes_below(output) if node.name() == LEAF}


Box = list[tuple[int, int]]
"""Where something begins and ends in each dimension."""

Origin = tuple[Any, Box]
"""A node, or a leaf, and the part of it that a tensor is."""

_VIEWS = frozenset({"SliceBackward0", "ViewBackward0", "UnsqueezeBackward0", "ReshapeAliasBackward0"})


def without_needless_graph(x: Tensor) -> Tensor:
    """The same numbers, detached where they are a slice of a concatenation, of parts that have no derivatives.

    GPyTorch concatenates training and test inputs, or inducing points and a minibatch, and slices the kernel matrix: as
    slices of a tensor that requires gradients, all of them do.
    """
    if not x.requires_grad or x.grad_fn is None:
        return x
    node, box = origin(x)
    return x.detach() if _is_constant(node, box) else x


def are_one_slice(x1: Tensor, x2: Tensor) -> bool:
    """Whether two tensors that require gradients are the same slice of the same tensor."""
    return x1.shape == x2.shape and are_one_origin(origin(x1), origin(x2))


def origin(x: Tensor) -> Origin:
    """What a tensor is a slice of, and where it is in that: the node that computed it, or a leaf.

    Slices of slices are looked through, and dimensions of one element that were put in front.
    """
    node: Any = x.grad_fn
    box = [(0, size) for size in x.shape]
    if node is None:
        return x, box
    while node.name() in _VIEWS:
        ((child, index),) = node.next_functions
        shape = _shape(child, index)
        if shape is None:
            break
        if node.name() == "SliceBackward0":
            dim, start = signed(saved_dim(node)), signed(saved_start(node))
            if saved_step(node) != 1 or len(shape) != len(box):
                break
            start = min(max(start + shape[dim] if start < 0 else start, 0), shape[dim])
            box[dim] = (box[dim][0] + start, box[dim][1] + start)
        else:
            extra = len(box) - len(shape)
            whole = tuple(input_metadata(node)[0].shape[extra:]) == tuple(shape)
            if extra < 0 or not whole or any(place != (0, 1) for place in box[:extra]):
                break
            box = box[extra:]
        node = child
    return (node.variable if node.name() == LEAF else node), box


def are_one_origin(one: Origin, other: Origin) -> bool:
    """Whether two origins are the same part of the same tensor."""
    return one[0] is other[0] and one[1] == other[1]


def _is_constant(node: Any, box: Box) -> bool:
    """Whether this part of a node's result depends on no leaf; False where that is not known."""
    if isinstance(node, Tensor) or node.name() != "CatBackward0":
        return False
    dim = signed(saved_dim(node))
    sizes = _sizes_of_parts(node, dim, len(box))
    if sizes is None:
        return False
    start, stop = box[dim]
    position = 0
    for (child, _), size in zip(node.next_functions, sizes, strict=True):
        if child is not None and max(start, position) < min(stop, position + size):
            return False
        position += size
    return True


def _sizes_of_parts(node: Any, dim: int, dims: int) -> list[int] | None:
    """What was concatenated, by its size along the dimension; None where that is not known of two parts or more."""
    shapes = [_shape(child, index) for child, index in node.next_functions]
    if shapes.count(None) > 1 or any(shape is not None and len(shape) != dims for shape in shapes):
        return None
    known = [0 if shape is None else shape[dim] for shape in shapes]
    rest = input_metadata(node)[0].shape[dim] - sum(known)
    return [rest if shape is None else size for shape, size in zip(shapes, known, strict=True)]


def _shape(node: Any, index: int) -> torch.Size | None:
    """Of the tensor that a node's derivative is taken by; None for a constant."""
    if node is None:
        return None
    return node.variable.shape if node.name() == LEAF else input_metadata(node)[index].shape


def signed(number: int) -> int:
    """A number as it was given: nodes hand negative ones out as unsigned numbers of 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
