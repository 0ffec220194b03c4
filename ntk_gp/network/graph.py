"""Looking at autograd's graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def leaves_below(output: Tensor) -> set[int]:
    """The ids of all the leaves that a tensor was computed from, its own if it is one that requires a gradient."""
    if output.is_leaf:
        return {id(output)} if output.requires_grad else set()
    leaves: set[int] = set()
    seen: set[Any] = set()
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        pending.extend(child for child, _ in node.next_functions)
    return leaves
