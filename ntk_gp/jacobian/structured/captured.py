"""One capture: a network recorded at given inputs as its plan says, put to the test, and turned into terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...network import NetworkFunction
from ..rules import UnsupportedUse
from ..terms import Term
from .layout import points_first
from .passes import RecordedPasses
from .plan import Plan
from .record import record
from .verification import NUM_ROWS, misplaced, wrong_derivatives, wrong_products


class Refuted(Exception):
    """A capture that does not pass: the parameters, with the reason for each."""

    def __init__(self, reasons: dict[str, str]):
        super().__init__(reasons)
        self.reasons = reasons


@dataclass
class Capture:
    """What was recorded at the rows (n, d)."""

    function: NetworkFunction
    plan: Plan
    rows: Tensor
    passes: RecordedPasses

    @classmethod
    def make(cls, function: NetworkFunction, plan: Plan, rows: Tensor) -> Capture | None:
        """None where the network does not do what the plan says."""
        recording = record(function, rows, plan.served, plan.spread)
        if recording.signature != plan.signature:
            return None
        return cls(function, plan, rows, RecordedPasses(recording, recording.gradients(), plan.layouts))

    @property
    def values(self) -> Tensor:
        """f at the rows, (n, C), in memory of its own."""
        return self.passes.recording.output.detach().clone()

    def telling_rows(self) -> Tensor:
        """Some of the rows at which the output depends on uses that it did not depend on where they were verified.

        Asked where the plan has such uses, and once there are terms: shapes follow then.
        """
        found = []
        for i in self.plan.unproven:
            place = self.plan.layouts[i].result.place
            assert place is not None
            alive = points_first(self.passes.gradients[i], (place[0] + 1, place[1]), len(self.rows)).flatten(1).any(-1)
            found.append(alive.nonzero().squeeze(-1)[:NUM_ROWS])
        return self.rows[torch.cat(found).unique()]

    def terms(self) -> list[list[Term]]:
        """Those of every use, (1, n, …) each. Raises Refuted where shapes do not follow, or a rule has no formula."""
        terms, reasons = self.passes.terms_of_each()
        if reasons:
            raise Refuted(reasons)
        return terms

    def check(self, terms: list[list[Term]]) -> None:
        """Raises Refuted where this capture does not pass, given its terms."""
        reasons = {}
        if self.plan.is_due(len(self.rows)):
            reasons = wrong_derivatives(self.function, self.rows, self.passes, terms)
        reasons |= misplaced(self.passes)
        names = dict.fromkeys(name for name in self._names_to_compare() if name not in reasons)
        if names:
            try:
                reasons |= wrong_products(self.function, self.rows, self.passes, names)[0]
            except UnsupportedUse as error:
                reasons |= dict.fromkeys(names, str(error))
        if reasons:
            raise Refuted(reasons)

    def _names_to_compare(self) -> list[str]:
        """The parameters in uses that a rule or a decomposition of the user's had a part in."""
        recording = self.passes.recording
        foreign = [use for use in recording.uses if recording.is_foreign or not use.is_own]
        return [name for use in foreign for name in use.names]
