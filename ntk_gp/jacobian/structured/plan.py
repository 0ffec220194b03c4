"""What is found out about a network once, at a few inputs, so that every later capture need only follow it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from ...network import FrozenNetwork, NetworkFunction
from .. import rules
from ..terms import Term, merge_terms
from .gram import is_tiled
from .layout import Layout, compare_layouts
from .passes import RecordedPasses
from .record import Recording, record
from .verification import misplaced, wrong_products

logger = logging.getLogger("ntk_gp")

# Derivatives are compared with autograd's at a capture of so many rows, or once in so many of smaller ones: what that
# costs must not show.
_COMPARED = 512
# Calls of parameters alone that have a row for each point, such as a class token's: of more, no call is looked at.
_MOST_SPREAD = 16


@dataclass
class Plan:
    """What later captures of a network follow: which of its parameters rules serve, and which calls they must meet.

    It is found out by recording the network at a few inputs, and holds for others as long as the network makes the same
    calls there. A capture that disproves a part of it leads to another plan, in which the parameters in question are
    left to autodiff.

    :param served: The parameters served by rules.
    :param residual: The others, which autodiff serves, with the reason for each.
    :param signature: What every recording must have in common with the one that this was found out from: the calls in
        their order, with the rule, the parameters and the numbers of dimensions of each.
    :param layouts: For each of these calls, which dimension of its tensors runs over the points.
    :param spread: As in :class:`.tracked.Tracker`: calls of parameters alone whose results have rows for the points.
    :param labels: The names of the rules that serve each parameter, for reports.
    :param rows: The inputs at which that was found out, (m, d).
    :param unproven: The places in that list of calls that made no difference to the output at these inputs (a dead
        unit, say): nothing has been compared there, and will be at the first inputs where they do.
    :param refuted: Parameters of `residual` that rules served until a capture went wrong.
    :param version: The version of the table of rules; with another one, everything is found out again.
    :param bytes_per_point: What the factors of one point take in memory.
    :param gram_flops: What a pair of points costs in a Gram matrix.
    :param gradient_flops: What it costs to form a point's gradients, of terms that take part in Gram matrices by them.
    :param product_flops: What a point costs in J u, or in Jᵀ v.
    :param capture_flops: What it costs to capture a point.
    :param rows_since: How many rows were captured since derivatives were last compared with autograd's.
    """

    served: tuple[str, ...]
    residual: dict[str, str]
    signature: tuple
    layouts: list[Layout]
    labels: dict[str, str]
    rows: Tensor
    spread: frozenset[int] | None = None
    unproven: tuple[int, ...] = ()
    refuted: dict[str, str] = field(default_factory=dict)
    version: int = 0
    bytes_per_point: int = 0
    gram_flops: float = 0.0
    gradient_flops: float = 0.0
    product_flops: float = 0.0
    capture_flops: float = 0.0
    rows_since: int = 0

    @classmethod
    def without_rules(cls, reasons: dict[str, str], rows: Tensor) -> Plan:
        """All of these parameters are autodiff's."""
        return cls((), reasons, (), [], {}, rows)

    def is_due(self, n: int) -> bool:
        """Whether derivatives are to be compared at n more rows."""
        self.rows_since += n
        due = self.rows_since >= _COMPARED
        if due:
            self.rows_since = 0
        return due


def make_plan(network: FrozenNetwork, function: NetworkFunction, rows: Tensor, refuted: dict[str, str]) -> Plan:
    """Finds out at these inputs what rules serve.

    :param function: The network in the dtype of the captures to come.
    :param rows: A few inputs, (m, d).
    :param refuted: The parameters that went wrong at other inputs, with the reason for each: autodiff's from the start.
    """
    version = rules.version()
    if function.runs_again:  # without the recorder, which would make of it another network
        refuted = dict.fromkeys(function.parameters, "backward passes run parts of the network again")
    names = tuple(name for name in function.parameters if name not in refuted)
    plan = _try_in_float64(network, function, rows, names)
    plan.rows = rows.clone()  # whatever becomes of the inputs
    plan.refuted, plan.version = refuted, version
    reasons = refuted | plan.residual
    plan.residual = {name: reasons[name] for name in function.parameters if name in reasons}
    _add_residual_costs(plan, function)
    for name, reason in plan.residual.items():
        logger.debug("Parameter %s is left to autodiff: %s.", name, reason)
    return plan


def _add_residual_costs(plan: Plan, function: NetworkFunction) -> None:
    residual = sum(function.parameters[name].numel() for name in plan.residual)
    plan.gram_flops += 2.0 * function.num_outputs**2 * residual
    plan.product_flops += 5.0 * residual


def _try_in_float64(network: FrozenNetwork, function: NetworkFunction, rows: Tensor, names: tuple[str, ...]) -> Plan:
    """In float64, where a missing term stands out from rounding; in the function's own dtype where that fails."""
    try:
        plan = _drop_failing(network.exact(rows[:2]), rows.double(), names)
        plan.bytes_per_point = plan.bytes_per_point * rows.element_size() // 8
        return plan
    except Exception:  # a dtype fixed inside the network, or a device without float64
        pass
    try:
        return _drop_failing(function, rows, names)
    except Exception as error:  # whatever went wrong, there is another way
        reason = f"recording it failed ({type(error).__name__}: {error})"
        return Plan.without_rules(dict.fromkeys(names, reason), rows)


def _drop_failing(function: NetworkFunction, rows: Tensor, names: tuple[str, ...]) -> Plan:
    """Tries the parameters, and those that pass again without the others, until nothing fails.

    What is recorded last, without what failed, is what later captures record.
    """
    failed: dict[str, str] = {}
    while True:
        with function.tracing(), torch.no_grad():
            trial = _try(function, rows, names)
        if trial is None:
            reason = "the network calls different functions for different numbers of inputs"
            return Plan.without_rules(failed | dict.fromkeys(names, reason), rows)
        failed |= trial.failed
        passed = trial.passed
        if not trial.failed or not passed:
            return trial.plan(function, rows, failed)
        names = passed


@dataclass
class _Trial:
    """What a recording at all of the rows showed.

    :param names: The parameters that were recorded.
    :param terms: Of all the uses for which there is a formula.
    :param failed: The parameters that rules do not serve, with the reason for each.
    :param silent: The parameters on which the output does not depend at these rows.
    :param spread: As in the plan.
    """

    names: tuple[str, ...]
    passes: RecordedPasses
    terms: list[Term]
    failed: dict[str, str]
    silent: set[str]
    spread: frozenset[int] | None

    @property
    def passed(self) -> tuple[str, ...]:
        """One that the output does not depend on is among them: it has no terms, and is served by having none."""
        return tuple(name for name in self.names if name not in self.failed)

    def plan(self, function: NetworkFunction, rows: Tensor, failed: dict[str, str]) -> Plan:
        """For later captures.

        :param failed: Of this trial and of those before.
        """
        signature, layouts = self.passes.recording.signature, self.passes.layouts
        plan = Plan(self.passed, failed, signature, layouts, self.labels(), rows, self.spread, self.unproven())
        merged = merge_terms(self.terms)
        plan.bytes_per_point = sum(term.nbytes for term in self.terms) // len(rows)
        plan.gram_flops = sum(term.gram_cost() for term in merged)
        plan.gradient_flops = sum(term.gradient_cost() for term in merged if not is_tiled(term))
        plan.product_flops = sum(term.product_cost() for term in merged)
        plan.capture_flops = (2 + function.num_outputs) * plan.product_flops
        return plan

    def labels(self) -> dict[str, str]:
        """The rules that serve each parameter."""
        found: dict[str, dict[str, None]] = {}
        for use in self.passes.recording.uses:
            for name in use.names:
                found.setdefault(name, {})[use.label(name)] = None
        return {name: " + ".join(labels) for name, labels in found.items() if name in self.passed}

    def unproven(self) -> tuple[int, ...]:
        """The uses that made no difference to the output, or have a parameter in them that made none."""
        uses = enumerate(self.passes.uses())
        return tuple(i for i, (use, g, _) in uses if not g.any() or not self.silent.isdisjoint(use.names))


def _try(function: NetworkFunction, rows: Tensor, names: tuple[str, ...]) -> _Trial | None:
    """What rules make of these parameters; None where the network's calls depend on the number of points."""
    first, second, spread = _record_twice(function, rows, names)
    whole = record(function, rows, names, spread)
    if not first.signature == second.signature == whole.signature:
        return None
    passes = RecordedPasses(whole, whole.gradients(), compare_layouts(first, second))
    parts, reasons = passes.terms_of_each()
    terms = [term for part in parts for term in part]
    failed = dict.fromkeys(whole.unseen, "it is used in ways that no rule knows") | reasons
    silent: set[str] = set()
    if not failed:
        failed |= misplaced(passes)
        wrong, silent = wrong_products(function, rows, passes, names)  # those without uses, too: one may be lost
        failed |= wrong
    return _Trial(names, passes, terms, failed, silent, spread)


def _record_twice(
    function: NetworkFunction, rows: Tensor, names: tuple[str, ...]
) -> tuple[Recording, Recording, frozenset[int] | None]:
    """Recordings at two and at three rows, and the calls of parameters alone that have a row for each point: one after
    the other, for what is made of such a result is no longer of parameters alone.
    """
    spread: frozenset[int] | None = frozenset()
    for _ in range(_MOST_SPREAD):
        first, second = (record(function, rows[:n], names, spread) for n in (2, 3))
        pairs = enumerate(zip_longest(first.shapes, second.shapes))
        differing = next((i for i, (shapes, others) in pairs if shapes != others), None)
        if differing is None or spread is None:
            return first, second, spread
        spread = spread | {differing} if differing < min(len(first.shapes), len(second.shapes)) else None
    return *(record(function, rows[:n], names, None) for n in (2, 3)), None  # type: ignore[return-value]
