"""The structured engine: finds out once which parameters its rules serve, and captures Jacobians at given inputs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ... import settings
from ...network import FrozenNetwork, NetworkFunction, normal_tensor, some_rows
from .. import rules
from ..autodiff import AutodiffEngine
from ..base import Jacobian, JacobianEngine
from ..rules import UnsupportedUse
from ..terms import FeatureTerm, MatrixTerm, Term, merge_terms
from .capture import Layout, RecordedUse, Recording, compare_layouts, points_first, record, use_terms
from .gram import is_tiled
from .jacobian import ChunkedJacobian, StructuredJacobian
from .verification import NUM_ROWS, misplaced, wrong_derivatives, wrong_products

logger = logging.getLogger("ntk_gp")

_MISPLACED = "rows at its use are not the points' own, in their order"
# Autograd's intermediate results and gradients take up to about eight times the memory of the factors kept, and may
# have half of the budget.
_CAPTURE_OVERHEAD = 16
# Factors are held if they take this share of the memory budget. Caches may take more, a quarter, so that the factors
# are kept there, and whoever else uses these inputs does not hold them a second time.
_HELD_SHARE = 5
# Otherwise each chunk is what is captured at once; one may still be held while the next is captured.
_CHUNK_SHARE = _CAPTURE_OVERHEAD
# Derivatives are compared with autograd's at a capture of so many rows, or once in so many of smaller ones: what that
# costs must not show.
_COMPARED = 512
# A matrix whose per-point gradients are hardly wider than its two factors is kept as them: one product in place of two.
_DENSE_MARGIN = 16


class ResidualEngine(Protocol):
    """What serves the parameters that no rule does."""

    def linearize_function(self, function: NetworkFunction, x: Tensor) -> Jacobian: ...


@dataclass
class Plan:
    """What is known about a network function: which parameters are served by rules, and how.

    :param served: The parameters served by rules.
    :param residual: The others, with the reason for each.
    :param signature: The list of uses for which this holds.
    :param layouts: Where the points are in every use.
    :param labels: The rules by which each parameter is served.
    :param rows: The inputs at which that was found out.
    :param unproven: The uses that made no difference to the output there: their rules have not been put to the test.
    :param refuted: Those of the residual that were served until a capture went wrong.
    :param version: Of the table of rules.
    :param bytes_per_point: What the factors take.
    :param gram_flops: What a pair of points costs in a Gram matrix.
    :param product_flops: What a point costs in J u, or in Jᵀ v.
    :param capture_flops: What it costs to capture a point.
    """

    served: tuple[str, ...]
    residual: dict[str, str]
    signature: tuple
    layouts: list[Layout]
    labels: dict[str, str]
    rows: Tensor
    unproven: tuple[int, ...] = ()
    refuted: dict[str, str] = field(default_factory=dict)
    version: int = 0
    bytes_per_point: int = 0
    gram_flops: float = 0.0
    product_flops: float = 0.0
    capture_flops: float = 0.0
    rows_since: int = 0  # captured since derivatives were compared with autograd's

    def is_due(self, n: int) -> bool:
        """Whether derivatives are to be compared at n more rows."""
        self.rows_since += n
        due = self.rows_since >= _COMPARED
        if due:
            self.rows_since = 0
        return due


class _Refuted(Exception):
    """A capture that does not pass: the parameters, with the reason for each."""

    def __init__(self, reasons: dict[str, str]):
        super().__init__(reasons)
        self.reasons = reasons


class StructuredEngine(JacobianEngine):
    """Jacobians as factors: one forward pass and C + 1 backward passes, and then matrix products only.

    Exact, for any network: a parameter is served by rules if every use of it was recorded and its gradients agree with
    autograd's; the others, alone, are left to the autodiff engine. Every capture is put to the test
    (:mod:`.verification`); a parameter that fails is left to autodiff from then on.

    :param network: The frozen network.
    :param residual: The engine for what no rule serves.
    """

    def __init__(self, network: FrozenNetwork, residual: ResidualEngine | None = None):
        super().__init__(network)
        self.residual = AutodiffEngine(network) if residual is None else residual
        self._clear()

    def _clear(self) -> None:
        self._plans: WeakKeyDictionary[NetworkFunction, Plan] = WeakKeyDictionary()
        self._lock = threading.Lock()  # of the dictionary

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_plans": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._clear()

    def linearize(self, x: Tensor, function: NetworkFunction | None = None) -> StructuredJacobian | ChunkedJacobian:
        """The Jacobian at `x` (B, n, d). It is not differentiable with respect to `x`."""
        function = self.network.at(x) if function is None else function
        x = normal_tensor(x.detach())
        if x.shape[0] * x.shape[1] == 0:
            return StructuredJacobian(function, x, [], self.residual.linearize_function(function, x), {})
        plan = self.plan(function, x)
        at_once = settings.memory_budget.bytes(x.device) // max(1, plan.bytes_per_point * x.shape[0])
        if at_once // _HELD_SHARE < x.shape[1]:
            return ChunkedJacobian(function, x, self, max(1, at_once // _CHUNK_SHARE))
        return self.capture(function, x)

    def plan(self, function: NetworkFunction, x: Tensor) -> Plan:
        """What is known about the function; found out at some of the points `x`, the first time."""
        with self._lock:
            plan = self._plans.get(function)
        if plan is None or plan.version != rules.version():
            with function.tracing(), torch.no_grad():
                rows = some_rows(x.reshape(-1, x.shape[-1]), NUM_ROWS, partial(function, function.parameters))
            plan = self._make_plan(function, rows, {})
            self._remember(function, plan)
        return plan

    def _remember(self, function: NetworkFunction, plan: Plan) -> None:
        with self._lock:
            self._plans[function] = plan

    def capture(self, function: NetworkFunction, x: Tensor) -> StructuredJacobian:
        """The factors at x (B, n, d), captured chunk by chunk."""
        plan = self.plan(function, x)
        while True:  # until the plan does not change: each time fewer parameters are served, or more rules proven
            parts = self._parts(function, plan, x)
            changed = self.plan(function, x)
            if changed is plan:
                break
            plan = changed
        if parts is None:
            logger.debug("The network does other things at these inputs than at those it was tried with: autodiff.")
            return StructuredJacobian(function, x, [], self.residual.linearize_function(function, x), {})
        rest = self.residual.linearize_function(function.restrict(plan.residual), x) if plan.residual else None
        return StructuredJacobian(function, x, _tidy(_joined(parts)), rest, plan.labels)

    def _parts(self, function: NetworkFunction, plan: Plan, x: Tensor) -> list[list[Term]] | None:
        """The terms of each chunk; None where the network does not do what the plan says, or the plan was revised."""
        budget = settings.memory_budget.bytes(x.device)
        per_point = max(plan.bytes_per_point, function.bytes_per_point) * _CAPTURE_OVERHEAD
        size = max(1, budget // (max(1, per_point) * x.shape[0]))
        parts: list[list[Term]] = []
        for chunk in x.split(size, dim=1):
            try:
                terms = self._terms(function, plan, chunk)
            except _Refuted as failure:
                self._revise(function, plan, failure.reasons)
                return None
            except Exception as error:  # the network's own will show again in autodiff
                logger.debug("Recording the network failed (%s: %s).", type(error).__name__, error)
                return None
            if terms is None or self.plan(function, x) is not plan:
                return None
            parts.append(terms)
            del terms
        return parts

    def _terms(self, function: NetworkFunction, plan: Plan, x: Tensor) -> list[Term] | None:
        """Captured terms at x (B, n, d), or None where the network does not do what the plan says."""
        if not plan.served:
            return []
        flat = x.reshape(-1, x.shape[-1])
        with function.tracing(), torch.no_grad():
            recording = record(function, flat, plan.served)
            if recording.signature != plan.signature:
                return None
            _check_layouts(recording, plan.layouts)
            gradients = recording.gradients()
            rows = _telling_rows(recording, gradients, plan, flat)
            if len(rows):
                self._verify_again(function, plan, rows)
            parts = _recorded_terms(recording, gradients, plan.layouts)
            self._verify(function, flat, recording, gradients, plan, parts)
        terms = [term for part in parts for term in part]
        shape = x.shape[:2]
        return [term.map(lambda t: t.squeeze(0).unflatten(0, shape)) for term in merge_terms(terms)]

    @staticmethod
    def _verify(
        function: NetworkFunction,
        rows: Tensor,
        recording: Recording,
        gradients: list[Tensor],
        plan: Plan,
        terms: list[list[Term]],
    ) -> None:
        """Raises where this capture does not pass."""
        reasons = {}
        if plan.is_due(len(rows)):
            reasons = wrong_derivatives(function, rows, recording, gradients, plan.layouts, terms)
        reasons |= _reasons(misplaced(recording, gradients, plan.layouts), _MISPLACED)
        foreign = [use for use in recording.uses if recording.is_foreign or not use.rule.is_own]
        names = dict.fromkeys(name for use in foreign for name in _names(use) if name not in reasons)
        if names:
            try:
                reasons |= wrong_products(function, rows, recording, gradients, plan.layouts, names)[0]
            except UnsupportedUse as error:
                reasons |= dict.fromkeys(names, str(error))
        if reasons:
            raise _Refuted(reasons)

    def _verify_again(self, function: NetworkFunction, plan: Plan, rows: Tensor) -> None:
        """At more inputs, those that rules not yet put to the test have something to say about."""
        renewed = self._make_plan(function, torch.cat([plan.rows, rows]), plan.refuted)
        if (renewed.served, renewed.unproven) != (plan.served, plan.unproven):
            self._remember(function, renewed)

    def _revise(self, function: NetworkFunction, plan: Plan, reasons: dict[str, str]) -> None:
        """A plan that leaves these parameters to autodiff."""
        self._remember(function, self._make_plan(function, plan.rows, plan.refuted | reasons))

    def _make_plan(self, function: NetworkFunction, rows: Tensor, refuted: dict[str, str]) -> Plan:
        """Found out at these inputs, without the parameters that were refuted at others."""
        version = rules.version()
        if function.runs_again:  # without the recorder, which would make of it another network
            refuted = dict.fromkeys(function.parameters, "backward passes run parts of the network again")
        names = tuple(name for name in function.parameters if name not in refuted)
        try:  # in float64, where a missing term stands out from rounding
            plan = self._try_plan(self.network.exact(rows[:2]), rows.double(), names)
            plan.bytes_per_point = plan.bytes_per_point * rows.element_size() // 8
        except Exception:  # a dtype fixed inside the network, or a device without float64
            try:
                plan = self._try_plan(function, rows, names)
            except Exception as error:  # whatever went wrong, there is another way
                reason = f"recording it failed ({type(error).__name__}: {error})"
                plan = Plan((), dict.fromkeys(names, reason), (), [], {}, rows)
        plan.rows = rows.clone()  # whatever becomes of the inputs
        plan.refuted, plan.version = refuted, version
        reasons = refuted | plan.residual
        plan.residual = {name: reasons[name] for name in function.parameters if name in reasons}
        residual = sum(function.parameters[name].numel() for name in plan.residual)
        plan.gram_flops += 2.0 * function.num_outputs**2 * residual
        plan.product_flops += 5.0 * residual
        for name, reason in plan.residual.items():
            logger.debug("Parameter %s is left to autodiff: %s.", name, reason)
        return plan

    def _try_plan(self, function: NetworkFunction, rows: Tensor, names: tuple[str, ...]) -> Plan:
        with function.tracing(), torch.no_grad():
            first, second, whole = (record(function, part, names) for part in (rows[:2], rows[:3], rows))
            if not first.signature == second.signature == whole.signature:
                reason = "the network calls different functions for different numbers of inputs"
                return Plan((), dict.fromkeys(names, reason), (), [], {}, rows)
            layouts = compare_layouts(first, second)
            gradients = whole.gradients()
            residual = dict.fromkeys(whole.unseen, "it is used in ways that no rule knows")
            labels: dict[str, list[str]] = {}
            terms: list[Term] = []
            for use, g, layout in zip(whole.uses, gradients, layouts, strict=True):
                for name in _names(use):
                    labels.setdefault(name, []).append(use.rule.name)
                try:
                    terms += use_terms(use, g, len(rows), layout)
                except UnsupportedUse as error:
                    residual |= _reasons([use], f"{use.rule.name}: {error}")
            silent: set[str] = set()
            if not residual:
                residual |= _reasons(misplaced(whole, gradients, layouts), _MISPLACED)
                wrong, silent = wrong_products(function, rows, whole, gradients, layouts, labels)
                residual |= wrong
        # A parameter that the output does not depend on has no terms, and is served by having none.
        served = tuple(name for name in names if name not in residual)
        if residual and served:
            # Recorded again without them: what is recorded must be what later captures record.
            plan = self._try_plan(function, rows, served)
            plan.residual |= residual
            return plan
        joined = {name: " + ".join(dict.fromkeys(rules)) for name, rules in labels.items() if name in served}
        unproven = tuple(
            i
            for i, (use, g) in enumerate(zip(whole.uses, gradients, strict=True))
            if not g.any() or any(name in silent for name in _names(use))
        )
        plan = Plan(served, residual, whole.signature, layouts, joined, rows, unproven)
        merged = merge_terms(terms)
        plan.bytes_per_point = sum(term.nbytes for term in terms) // len(rows)
        plan.gram_flops = sum(term.gram_cost() for term in merged)
        plan.product_flops = sum(term.product_cost() for term in merged)
        plan.capture_flops = (2 + function.num_outputs) * plan.product_flops
        return plan


def _names(use: RecordedUse) -> tuple[str, ...]:
    """The parameters in a use."""
    return tuple(dict.fromkeys(view.name for view in use.parameters))


def _reasons(uses: Iterable[RecordedUse], reason: str) -> dict[str, str]:
    return {name: reason for use in uses for name in _names(use)}


def _check_layouts(recording: Recording, layouts: list[Layout]) -> None:
    reasons: dict[str, str] = {}
    for use, layout in zip(recording.uses, layouts, strict=True):
        try:
            layout.check(use, len(recording.output))
        except UnsupportedUse as error:
            reasons |= _reasons([use], str(error))
    if reasons:
        raise _Refuted(reasons)


def _recorded_terms(recording: Recording, gradients: list[Tensor], layouts: list[Layout]) -> list[list[Term]]:
    """Those of every use."""
    terms: list[list[Term]] = []
    reasons: dict[str, str] = {}
    for use, g, layout in zip(recording.uses, gradients, layouts, strict=True):
        try:
            terms.append(use_terms(use, g, len(recording.output), layout))
        except UnsupportedUse as error:
            reasons |= _reasons([use], f"{use.rule.name}: {error}")
    if reasons:
        raise _Refuted(reasons)
    return terms


def _telling_rows(recording: Recording, gradients: list[Tensor], plan: Plan, rows: Tensor) -> Tensor:
    """Some of the inputs at which the output depends on uses that it did not depend on where they were verified."""
    found = []
    for i in plan.unproven:
        place = plan.layouts[i].result.place
        assert place is not None
        alive = points_first(gradients[i], (place[0] + 1, place[1]), len(rows)).flatten(1).any(-1)
        found.append(alive.nonzero().squeeze(-1)[:NUM_ROWS])
    return rows[torch.cat(found).unique()] if found else rows[:0]


def _joined(parts: list[list[Term]]) -> list[Term]:
    """The terms of all chunks, term by term; the chunks are emptied, so that only one term at a time exists twice."""
    terms = []
    while parts[0]:
        first, *others = (part.pop() for part in parts)
        terms.append(_dense(first.concatenate(others) if others else first))
        del first, others
    return terms[::-1]


def _tidy(terms: list[Term]) -> list[Term]:
    """Small dense blocks beside one another, so that a Gram tile takes one product for all of them."""
    small = [term for term in terms if isinstance(term, FeatureTerm) and is_tiled(term)]
    others = [term for term in terms if not (isinstance(term, FeatureTerm) and is_tiled(term))]
    return [FeatureTerm.join(small), *others] if small else others


def _dense(term: Term) -> Term:
    if not isinstance(term, MatrixTerm) or term.num_positions > 1:
        return term
    heads, d_out, _ = term.weight.shape
    if heads * d_out * term.num_columns > heads * (d_out + term.num_columns) + _DENSE_MARGIN:
        return term
    rows = term.gradient_rows(slice(None))  # (B, n, C, H, d_out, columns)
    if term.bias is None or heads * d_out == 1:  # the columns are in the parameters' order
        return FeatureTerm(term.views, rows.flatten(3))
    return FeatureTerm(
        [term.weight, term.bias], torch.cat([rows[..., :-1].flatten(3), rows[..., -1].flatten(3)], dim=-1)
    )
