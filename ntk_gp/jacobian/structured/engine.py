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
from .capture import Layout, Recording, parameter_names, record, use_terms
from .gram import is_tiled
from .jacobian import ChunkedJacobian, StructuredJacobian

logger = logging.getLogger("ntk_gp")

# Points at which the recorded uses are compared with autograd.
_VERIFIED_POINTS = 8
# Relative difference from autograd that may be rounding: some networks compute a part of themselves in float32.
_TOLERANCE = 1e-5
# Autograd's intermediate results and gradients take up to about this many times the memory of the factors kept.
_CAPTURE_OVERHEAD = 8
# Factors are held if they take this share of the memory budget: they are put together from chunks, so exist twice.
_HELD_SHARE = 3
# Otherwise the chunks are smaller: one may still be held while the next is captured.
_CHUNK_SHARE = 8
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
    :param bytes_per_point: What the factors take.
    """

    served: tuple[str, ...]
    residual: dict[str, str]
    signature: tuple
    layout: Layout
    labels: dict[str, str]
    bytes_per_point: int = 0


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
        return self.capture(function, plan, x)

    def plan(self, function: NetworkFunction, x: Tensor) -> Plan:
        """What is known about the function; found out at some of the points `x`, the first time."""
        if function not in self._plans:
            self._plans[function] = self._make_plan(function, x)
        return self._plans[function]

    def capture(self, function: NetworkFunction, plan: Plan, x: Tensor) -> StructuredJacobian:
        """The factors at x (B, n, d), captured chunk by chunk."""
        budget = settings.memory_budget.bytes(x.device)
        per_point = max(plan.bytes_per_point, function.bytes_per_point) * _CAPTURE_OVERHEAD
        size = max(1, budget // (max(1, per_point) * x.shape[0]))
        parts = []
        for chunk in x.split(size, dim=1):
            terms = self._terms(function, plan, chunk)
            if terms is None:
                return self._all_autodiff(function, x)
            parts.append(terms)
        terms = [first.concatenate(others) if others else first for first, *others in zip(*parts, strict=True)]
        rest = self.residual.linearize_function(function.restrict(plan.residual), x) if plan.residual else None
        return StructuredJacobian(function, x, _tidy(terms), rest, plan.labels)

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
            terms = _recorded_terms(recording, plan.layout, flat.shape[0])
        shape = x.shape[:2]
        return [term.map(lambda t: t.squeeze(0).unflatten(0, shape)) for term in merge_terms(terms)]

    def _make_plan(self, function: NetworkFunction, x: Tensor) -> Plan:
        flat = x.reshape(-1, x.shape[-1])[:_VERIFIED_POINTS]
        rows = flat if len(flat) >= 3 else flat[[0, -1, 0]]
        names = tuple(function.parameters)
        try:  # in float64, where a missing term stands out from rounding
            exact = self.network._convert(torch.float64, rows.device)
            with torch.random.fork_rng(devices=[]):
                exact.probe(rows[:2].double())
            plan = self._try_plan(exact, rows.double(), names)
            plan.bytes_per_point = plan.bytes_per_point * rows.element_size() // 8
        except (RuntimeError, TypeError, ValueError):  # a dtype fixed inside the network, or a device without float64
            plan = self._try_plan(function, rows, names)
        for name, reason in plan.residual.items():
            logger.debug("Parameter %s is left to autodiff: %s.", name, reason)
        return plan

    def _try_plan(self, function: NetworkFunction, rows: Tensor, names: tuple[str, ...]) -> Plan:
        with function.tracing(), torch.no_grad():
            first, second, whole = (record(function, part, names) for part in (rows[:2], rows[:3], rows))
            if not first.signature == second.signature == whole.signature:
                reason = "the network calls different functions for different numbers of inputs"
                return Plan((), dict.fromkeys(names, reason), (), Layout([], []), {})
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
            residual |= _wrong(function, rows, merge_terms(terms), used - residual.keys())
        # A parameter that the output does not depend on has no terms, and is served by having none.
        served = tuple(name for name in names if name not in residual)
        if residual and served:
            # Recorded again without them: what is recorded must be what later captures record.
            plan = self._try_plan(function, rows, served)
            reasons = plan.residual | residual
            plan.residual = {name: reasons[name] for name in names if name in reasons}
            return plan
        joined = {name: " + ".join(dict.fromkeys(rules)) for name, rules in labels.items() if name in served}
        bytes_per_point = sum(term.nbytes for term in terms) // len(rows)
        return Plan(served, residual, whole.signature, layout, joined, bytes_per_point)


def _recorded_terms(recording: Recording, layout: Layout, n: int) -> list[Term]:
    terms: list[Term] = []
    for use, gradients, place, places in zip(
        recording.uses, recording.gradients(), layout.results, layout.arguments, strict=True
    ):
        terms += use_terms(use, gradients, n, place, places)
    return terms


def _wrong(function: NetworkFunction, rows: Tensor, terms: list[Term], names: set[str]) -> dict[str, str]:
    """The parameters for which Jᵀv, for a random v, is not what autograd says."""
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
    wrong = {}
    for (name, leaf), reference in zip(leaves.items(), expected, strict=True):
        reference = torch.zeros_like(leaf) if reference is None else reference
        error = torch.linalg.vector_norm(pieces[name][0] - reference)
        if name in names and not error <= tolerance * torch.linalg.vector_norm(reference):
            wrong[name] = "its gradients by the recorded uses differ from autograd's"
    return wrong


def _tidy(terms: list[Term]) -> list[Term]:
    """Small dense blocks beside one another, so that a Gram tile takes one product for all of them."""
    terms = [_dense(term) for term in terms]
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
    if term.bias is None:
        return FeatureTerm([term.weight], rows.flatten(3))
    return FeatureTerm(
        [term.weight, term.bias], torch.cat([rows[..., :-1].flatten(3), rows[..., -1].flatten(3)], dim=-1)
    )
