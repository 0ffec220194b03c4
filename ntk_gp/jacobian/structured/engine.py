"""The structured engine: finds out once which parameters its rules serve, and captures Jacobians at given inputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ... import settings
from ...network import FrozenNetwork, NetworkFunction, normal_tensor
from ..autodiff import AutodiffEngine
from ..base import Jacobian, JacobianEngine
from ..rules import UnsupportedUse
from ..terms import FeatureTerm, MatrixTerm, Term, merge_terms
from .capture import Layout, Recording, parameter_names, points_first, record, use_terms
from .gram import is_tiled
from .jacobian import ChunkedJacobian, StructuredJacobian

logger = logging.getLogger("ntk_gp")

# Points at which the recorded uses are compared with autograd.
_VERIFIED_POINTS = 8
# Relative difference from autograd that may be rounding: some networks compute a part of themselves in float32.
_TOLERANCE = 1e-5
# Autograd's intermediate results and gradients take up to about eight times the memory of the factors kept, and may
# have half of the budget.
_CAPTURE_OVERHEAD = 16
# Factors are held if they take this share of the memory budget. Caches may take more, a quarter, so that the factors
# are kept there, and whoever else uses these inputs does not hold them a second time.
_HELD_SHARE = 5
# Otherwise each chunk is what is captured at once; one may still be held while the next is captured.
_CHUNK_SHARE = _CAPTURE_OVERHEAD
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
    :param layout: Where the points are in every use.
    :param labels: The rules by which each parameter is served.
    :param rows: The inputs at which that was found out.
    :param unproven: The uses that made no difference to the output there: their rules have not been put to the test.
    :param bytes_per_point: What the factors take.
    :param gram_flops: What a pair of points costs in a Gram matrix.
    :param product_flops: What a point costs in J u, or in Jᵀ v.
    :param capture_flops: What it costs to capture a point.
    """

    served: tuple[str, ...]
    residual: dict[str, str]
    signature: tuple
    layout: Layout
    labels: dict[str, str]
    rows: Tensor
    unproven: frozenset[int] = frozenset()
    bytes_per_point: int = 0
    gram_flops: float = 0.0
    product_flops: float = 0.0
    capture_flops: float = 0.0


class StructuredEngine(JacobianEngine):
    """Jacobians as factors: one forward pass and C backward passes, and then matrix products only.

    Exact, for any network: a parameter is served by rules if every use of it was recorded and its gradients agree with
    autograd's; the others, alone, are left to the autodiff engine.

    :param network: The frozen network.
    :param residual: The engine for what no rule serves.
    """

    def __init__(self, network: FrozenNetwork, residual: ResidualEngine | None = None):
        super().__init__(network)
        self.residual = AutodiffEngine(network) if residual is None else residual
        self._plans: WeakKeyDictionary[NetworkFunction, Plan] = WeakKeyDictionary()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_plans": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._plans = WeakKeyDictionary()

    def linearize(self, x: Tensor) -> StructuredJacobian | ChunkedJacobian:
        """The Jacobian at `x` (B, n, d). It is not differentiable with respect to `x`."""
        self.network.check(x)
        function = self.network.function(x.dtype, x.device)
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
        if function not in self._plans:
            rows = x.reshape(-1, x.shape[-1])[:_VERIFIED_POINTS]
            self._plans[function] = self._make_plan(function, rows if len(rows) >= 3 else rows[[0, -1, 0]])
        return self._plans[function]

    def capture(self, function: NetworkFunction, x: Tensor) -> StructuredJacobian:
        """The factors at x (B, n, d), captured chunk by chunk."""
        plan = self.plan(function, x)
        budget = settings.memory_budget.bytes(x.device)
        per_point = max(plan.bytes_per_point, function.bytes_per_point) * _CAPTURE_OVERHEAD
        size = max(1, budget // (max(1, per_point) * x.shape[0]))
        parts: list[list[Term]] = []
        for chunk in x.split(size, dim=1):
            terms = self._terms(function, plan, chunk)
            if terms is None:
                return self._all_autodiff(function, x)
            if self.plan(function, x) is not plan:  # these points have told more about the rules
                return self.capture(function, x)
            parts.append(terms)
            del terms
        rest = self.residual.linearize_function(function.restrict(plan.residual), x) if plan.residual else None
        return StructuredJacobian(function, x, _tidy(_joined(parts)), rest, plan.labels)

    def _all_autodiff(self, function: NetworkFunction, x: Tensor) -> StructuredJacobian:
        logger.debug("The network calls other functions at these inputs than at those it was tried with: autodiff.")
        return StructuredJacobian(function, x, [], self.residual.linearize_function(function, x), {})

    def _terms(self, function: NetworkFunction, plan: Plan, x: Tensor) -> list[Term] | None:
        """Captured terms at x (B, n, d), or None where the network does not do what the plan says."""
        if not plan.served:
            return []
        flat = x.reshape(-1, x.shape[-1])
        with function.tracing(), torch.no_grad():
            recording = record(function, flat, plan.served)
            if recording.signature != plan.signature:
                return None
            gradients = recording.gradients()
            rows = _telling_rows(recording, gradients, plan, flat)
            if len(rows):
                self._verify_again(function, plan, rows)
            terms = _recorded_terms(recording, gradients, plan.layout, flat.shape[0])
        shape = x.shape[:2]
        return [term.map(lambda t: t.squeeze(0).unflatten(0, shape)) for term in merge_terms(terms)]

    def _verify_again(self, function: NetworkFunction, plan: Plan, rows: Tensor) -> None:
        """At more inputs, those that rules not yet put to the test have something to say about."""
        renewed = self._make_plan(function, torch.cat([plan.rows, rows]))
        if (renewed.served, renewed.unproven) != (plan.served, plan.unproven):
            self._plans[function] = renewed

    def _make_plan(self, function: NetworkFunction, rows: Tensor) -> Plan:
        names = tuple(function.parameters)
        try:  # in float64, where a missing term stands out from rounding
            exact = self.network._convert(torch.float64, rows.device)
            with torch.random.fork_rng(devices=[]):
                exact.probe(rows[:2].double())
            plan = self._try_plan(exact, rows.double(), names)
            plan.bytes_per_point = plan.bytes_per_point * rows.element_size() // 8
        except (RuntimeError, TypeError, ValueError):  # a dtype fixed inside the network, or a device without float64
            plan = self._try_plan(function, rows, names)
        plan.rows = rows.clone()  # whatever becomes of the inputs
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
                return Plan((), dict.fromkeys(names, reason), (), Layout([], []), {}, rows)
            layout = Layout.compare(first, second)
            residual = dict.fromkeys(whole.unseen, "it is used in ways that no rule knows")
            used = set(parameter_names(whole.uses))
            gradients = whole.gradients()
            terms: list[Term] = []
            labels: dict[str, list[str]] = {}
            for i, use in enumerate(whole.uses):
                for name in {view.name for view in use.parameters}:
                    labels.setdefault(name, []).append(use.rule.name)
                try:
                    terms += use_terms(use, gradients[i], len(rows), layout.results[i], layout.arguments[i])
                except UnsupportedUse as error:
                    residual |= dict.fromkeys((view.name for view in use.parameters), f"{use.rule.name}: {error}")
            merged = merge_terms(terms)
            wrong, silent = _verify(function, rows, merged, used - residual.keys())
            residual |= wrong
        # A parameter that the output does not depend on has no terms, and is served by having none.
        served = tuple(name for name in names if name not in residual)
        if residual and served:
            # Recorded again without them: what is recorded must be what later captures record.
            plan = self._try_plan(function, rows, served)
            reasons = plan.residual | residual
            plan.residual = {name: reasons[name] for name in names if name in reasons}
            return plan
        joined = {name: " + ".join(dict.fromkeys(rules)) for name, rules in labels.items() if name in served}
        unproven = frozenset(
            i
            for i, (use, g) in enumerate(zip(whole.uses, gradients, strict=True))
            if not g.any() or any(view.name in silent for view in use.parameters)
        )
        plan = Plan(served, residual, whole.signature, layout, joined, rows, unproven)
        plan.bytes_per_point = sum(term.nbytes for term in terms) // len(rows)
        plan.gram_flops = sum(term.gram_cost() for term in merged)
        plan.product_flops = sum(term.product_cost() for term in merged)
        plan.capture_flops = (1 + function.num_outputs) * plan.product_flops
        return plan


def _recorded_terms(recording: Recording, gradients: list[Tensor], layout: Layout, n: int) -> list[Term]:
    terms: list[Term] = []
    for use, g, place, places in zip(recording.uses, gradients, layout.results, layout.arguments, strict=True):
        terms += use_terms(use, g, n, place, places)
    return terms


def _telling_rows(recording: Recording, gradients: list[Tensor], plan: Plan, rows: Tensor) -> Tensor:
    """Some of the inputs at which the output depends on uses that it did not depend on where they were verified."""
    found = []
    for i in plan.unproven:
        place = plan.layout.results[i]
        assert place is not None
        alive = points_first(gradients[i], (place[0] + 1, place[1]), len(rows)).flatten(1).any(-1)
        found.append(alive.nonzero().squeeze(-1)[:_VERIFIED_POINTS])
    return rows[torch.cat(found).unique()] if found else rows[:0]


def _verify(
    function: NetworkFunction, rows: Tensor, terms: list[Term], names: set[str]
) -> tuple[dict[str, str], set[str]]:
    """The parameters for which Jᵀv, for a random v, is not what autograd says, and those for which it says zero."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(rows), function.num_outputs, generator=generator, dtype=torch.float64).to(rows)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in function.parameters.items()}
    with torch.enable_grad():
        output = function(leaves, rows)
    expected = torch.autograd.grad(output, list(leaves.values()), v, allow_unused=True)
    actual = rows.new_zeros(1, 1, function.num_parameters)
    for term in terms:
        term.vjp(v[None, None], actual)
    pieces = function.split(actual[0])
    tolerance = max(_TOLERANCE, torch.finfo(rows.dtype).eps ** 0.5)
    wrong, silent = {}, set()
    for (name, leaf), reference in zip(leaves.items(), expected, strict=True):
        reference = torch.zeros_like(leaf) if reference is None else reference
        error, size = torch.linalg.vector_norm(pieces[name][0] - reference), torch.linalg.vector_norm(reference)
        if name in names and not error <= tolerance * size:
            wrong[name] = "its gradients by the recorded uses differ from autograd's"
        elif size == 0:
            silent.add(name)
    return wrong, silent


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
