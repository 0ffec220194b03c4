"""From recorded calls to blocks of the Jacobian: rules are given the calls' tensors and gradients, points first."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..maps import pull_back
from ..rules import UnsupportedUse, Use
from ..terms import Term
from .layout import Layout, take_points
from .record import RecordedUse, Recording


def use_terms(use: RecordedUse, gradients: Tensor, n: int, layout: Layout, squared: bool = False) -> list[Term]:
    """The terms of one use at n points, (1, n, …) each. Raises UnsupportedUse where there is no formula.

    :param gradients: g at the use's result, (C, *shape).
    :param squared: Of the squares of whatever the rule is given: sums of the squares of what is summed.
    """
    tensors, g = layout.points_first(use, gradients, n)
    if squared:
        tensors = {name: value.square() if value.is_floating_point() else value for name, value in tensors.items()}
        g = g.square()
    assert layout.result.place is not None
    dim, split = layout.result.place
    try:
        found = use.rule.call(use.rule.rule, {**use.arguments, **tensors}, Use(g, dim, len(use.shape), split))
        if found is None:
            raise UnsupportedUse("it returned None; a rule returns a list of terms, such as use.matrix(...)")
        terms = list(found)
        for term in terms:
            term.check(n, len(gradients))
        terms = pull_back(terms, use.computed, squared)
    except UnsupportedUse:
        raise
    except Exception as error:  # whatever goes wrong in a rule, there is another way
        raise UnsupportedUse(f"{type(error).__name__}: {error}") from error
    return terms


@dataclass
class RecordedPasses:
    """What one forward pass and the backward passes of all outputs have recorded.

    :param gradients: Of each use, g at its result, (C, *shape).
    :param layouts: Of each use, where the points are in its tensors.
    """

    recording: Recording
    gradients: list[Tensor]
    layouts: list[Layout]

    @property
    def num_points(self) -> int:
        return len(self.recording.output)

    def uses(self) -> Iterator[tuple[RecordedUse, Tensor, Layout]]:
        """Every use, with its gradients and its layout."""
        yield from zip(self.recording.uses, self.gradients, self.layouts, strict=True)

    def terms_of_each(self) -> tuple[list[list[Term]], dict[str, str]]:
        """The terms of every use that there is a formula for, and the parameters in the others, with reasons."""
        n, terms = self.num_points, []
        reasons: dict[str, str] = {}
        for use, g, layout in self.uses():
            try:
                terms.append(use_terms(use, g, n, layout))
            except UnsupportedUse as error:
                reasons |= dict.fromkeys(use.names, f"{use.rule.name}: {error}")
        return terms, reasons

    def terms(self, names: Collection[str], squared: bool = False) -> Iterator[Term]:
        """Those of all uses of some parameters; if `squared`, of squares, where that can be told."""
        for use, g, layout in self.uses():
            if not any(name in names for name in use.names):
                continue
            try:
                yield from use_terms(use, g, self.num_points, layout, squared)
            except UnsupportedUse:
                if not squared:
                    raise

    def at(self, rows: Tensor) -> RecordedPasses:
        """The same as if these points alone had been recorded, in memory of its own.

        :param rows: The numbers of the points, (m,).
        """
        n, uses, gradients = self.num_points, [], []
        for use, g, layout in self.uses():
            tensors = {name: layout.arguments[name].take(value, n, rows) for name, value in use.tensors.items()}
            shape = torch.Size(layout.result.shape_at(len(rows)))
            uses.append(replace(use, arguments={**use.arguments, **tensors}, shape=shape, versions=[]))
            assert layout.result.place is not None
            dim, split = layout.result.place
            gradients.append(take_points(g, (dim + 1, split), n, rows))
        recording = replace(self.recording, uses=uses, output=self.recording.output[rows])
        return RecordedPasses(recording, gradients, self.layouts)
