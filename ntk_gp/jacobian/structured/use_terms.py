"""From a recorded call to blocks of the Jacobian: a rule is given the call's tensors, points first."""

from __future__ import annotations

from torch import Tensor

from ..rules import UnsupportedUse, Use
from ..terms import Term
from .layout import Layout, points_first
from .record import RecordedUse


def use_terms(use: RecordedUse, gradients: Tensor, n: int, layout: Layout, squared: bool = False) -> list[Term]:
    """The terms of one use at n points, (1, n, …) each. Raises UnsupportedUse where there is no formula.

    :param gradients: g at the use's result, (C, *shape).
    :param squared: Of the squares of whatever the rule is given: sums of the squares of what is summed.
    """
    layout.check(use, n)
    assert layout.result.place is not None
    arguments = dict(use.arguments)
    for name, value in use.tensors().items():
        if use.rule.elementwise:
            arguments[name] = points_first(value.expand(use.shape), layout.result.place, n)
        else:
            arguments[name] = layout.arguments[name].first(value, n)
        if squared and value.is_floating_point():
            arguments[name] = arguments[name].square()
    dim, split = layout.result.place
    g = points_first(gradients.square() if squared else gradients, (dim + 1, split), n)
    g = g.movedim(1 + split, 1)  # (n, C, positions from the split, …)
    try:
        terms = list(use.rule.call(use.rule.rule, arguments, Use(g, dim, len(use.shape), split)))
        for term in terms:
            term.check(n, len(gradients))
    except UnsupportedUse:
        raise
    except Exception as error:  # whatever goes wrong in a rule, there is another way
        raise UnsupportedUse(f"{type(error).__name__}: {error}") from error
    return terms
