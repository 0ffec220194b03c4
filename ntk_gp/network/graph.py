"""Looking at autograd's graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

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
