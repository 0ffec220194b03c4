"""The structured engine: captures Jacobians at given inputs, as a plan says that was found out at the first ones."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ... import memory
from ...network import FrozenNetwork, NetworkFunction, normal_tensor, some_rows
from .. import rules
from ..autodiff import AutodiffEngine
from ..base import JacobianEngine
from ..terms import Term, merge_terms
from .assembly import joined, tidy
from .captured import Capture, Refuted
from .chunked import ChunkedJacobian
from .held import StructuredJacobian
from .plan import Plan, make_plan
from .verification import NUM_ROWS

logger = logging.getLogger("ntk_gp")


class _Part(NamedTuple):
    """What was captured at a chunk of points: the terms, and f, (B, n, C), where the network was run for them."""

    terms: list[Term]
    values: Tensor | None = None


class StructuredEngine(JacobianEngine):
    """Jacobians as factors: one forward pass and C + 1 backward passes, and then matrix products only.

    In z = W a, the derivative of an output with respect to W is the product of two vectors, the gradient g at z and a.
    Recording the network once at all the inputs gives both; J itself is never formed, and the network is not run again.

    Exact, for any network: a parameter is served by rules if every use of it was recorded and its gradients agree with
    autograd's; the others, alone, are left to the autodiff engine. Every capture is put to the test
    (:mod:`.verification`); a parameter that fails is left to autodiff from then on.

    What was found out about the network (:class:`.plan.Plan`) is kept for each dtype and device, as long as its tensors
    stay what they are.

    :param network: The frozen network.
    :param residual: Serves the parameters that no rule does. (Default: an autodiff engine of its own.)
    """

    def __init__(self, network: FrozenNetwork, residual: AutodiffEngine | None = None):
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
        bytes_per_point = max(1, plan.bytes_per_point * x.shape[0])
        if memory.FACTORS.bytes(x.device) // bytes_per_point < x.shape[1]:
            return self._chunked(function, x, max(1, memory.CHUNK.bytes(x.device) // bytes_per_point))
        return self.capture(function, x, plan)

    def _chunked(self, function: NetworkFunction, x: Tensor, size: int) -> ChunkedJacobian:
        capture, find_plan = partial(self.capture, function), partial(self.plan, function)
        return ChunkedJacobian(function, x, size, capture=capture, linearize=self.linearize, find_plan=find_plan)

    def plan(self, function: NetworkFunction, x: Tensor) -> Plan:
        """What is known about the function; found out at some of the points `x`, the first time."""
        plan = self._kept_plan(function)
        if plan is None or plan.version != rules.version():
            with function.tracing(), torch.no_grad():
                rows = some_rows(x.reshape(-1, x.shape[-1]), NUM_ROWS, partial(function, function.parameters))
            plan = make_plan(self.network, function, rows, {})
            self._remember(function, plan)
        return plan

    def _kept_plan(self, function: NetworkFunction) -> Plan | None:
        with self._lock:
            return self._plans.get(function)

    def _remember(self, function: NetworkFunction, plan: Plan) -> None:
        with self._lock:
            self._plans[function] = plan

    def capture(self, function: NetworkFunction, x: Tensor, plan: Plan | None = None) -> StructuredJacobian:
        """The factors at x (B, n, d), captured chunk by chunk.

        :param plan: What is known about the function, where the caller has just asked for it.
        """
        plan = self.plan(function, x) if plan is None else plan
        while True:  # until the plan does not change: each time fewer parameters are served, or more rules proven
            found = self._parts(function, plan, x)
            changed = self.plan(function, x)
            if changed is plan:
                break
            plan = changed
        if found is None:
            logger.debug("The network does other things at these inputs than at those it was tried with: autodiff.")
            return StructuredJacobian(function, x, [], self.residual.linearize_function(function, x), {})
        values = [part.values for part in found if part.values is not None]
        terms = tidy(joined([part.terms for part in found]))
        rest = self.residual.linearize_function(function.restrict(plan.residual), x) if plan.residual else None
        return StructuredJacobian(function, x, terms, rest, plan.labels, torch.cat(values, dim=1) if values else None)

    def _parts(self, function: NetworkFunction, plan: Plan, x: Tensor) -> list[_Part] | None:
        """Each chunk; None where the network does not do what the plan says, or the plan was revised."""
        per_point = max(1, plan.bytes_per_point, function.bytes_per_point) * x.shape[0]
        size = max(1, memory.CAPTURE.bytes(x.device) // per_point)
        parts: list[_Part] = []
        for chunk in x.split(size, dim=1):
            try:
                part = self._part(function, plan, chunk)
            except Refuted as failure:
                self._revise(function, plan, failure.reasons)
                return None
            except Exception as error:  # the network's own will show again in autodiff
                logger.debug("Recording the network failed (%s: %s).", type(error).__name__, error)
                return None
            if part is None or self._kept_plan(function) is not plan:
                return None
            parts.append(part)
            del part
        return parts

    def _part(self, function: NetworkFunction, plan: Plan, x: Tensor) -> _Part | None:
        """Captured at x (B, n, d), or None where the network does not do what the plan says."""
        if not plan.served:
            return _Part([])
        with function.tracing(), torch.no_grad():
            capture = Capture.make(function, plan, x.reshape(-1, x.shape[-1]))
            if capture is None:
                return None
            parts = capture.terms()
            if plan.unproven:
                self._verify_again(function, plan, capture.telling_rows())
            capture.check(parts)
        terms = merge_terms([term for part in parts for term in part])
        values = capture.values.reshape(*x.shape[:2], -1)
        return _Part(terms if x.shape[0] == 1 else [term.in_batches(*x.shape[:2]) for term in terms], values)

    def _verify_again(self, function: NetworkFunction, plan: Plan, rows: Tensor) -> None:
        """At more inputs, those that rules not yet put to the test have something to say about."""
        if not len(rows):
            return
        renewed = make_plan(self.network, function, torch.cat([plan.rows, rows]), plan.refuted)
        if (renewed.served, renewed.unproven) != (plan.served, plan.unproven):
            self._remember(function, renewed)

    def _revise(self, function: NetworkFunction, plan: Plan, reasons: dict[str, str]) -> None:
        """A plan that leaves these parameters to autodiff."""
        self._remember(function, make_plan(self.network, function, plan.rows, plan.refuted | reasons))
