"""Which solver a system gets, what each would cost, and why the others are not taken: what users are told."""

from __future__ import annotations

from dataclasses import dataclass

from .. import memory, settings
from .base import Solver, readable_bytes
from .choice import is_too_large_to_factorise, solver_class
from .one_output import OneOutputSolver, system_of_one_output
from .system import System
from .table import solvers_for


@dataclass(frozen=True)
class SolverCandidate:
    """What one solver would cost for a system.

    :param name: What :class:`ntk_gp.settings.solver` calls it.
    :param flops: About how many it takes until the first right-hand side is solved.
    :param nbytes: The most bytes that it holds at once while it is made.
    :param verdict: `"taken"`, or why it is not.
    """

    name: str
    flops: float
    nbytes: int
    verdict: str


@dataclass(frozen=True)
class SolverReport:
    """Which solver serves a model's training system K + D, and why; `print` shows all of it.

    :param solver: Its name as :class:`ntk_gp.settings.solver` has it; None where none of this package's serves.
    :param reason: Why this one; where `solver` is None, how the matrix is solved instead, or why it cannot be.
    :param is_in_use: Whether it is built already, so that the model's next predictions come from it whatever settings
        say now.
    :param num_rows: N, outputs times training points.
    :param num_parameters: P.
    :param batch: How many systems there are, one for each batch.
    :param memory_budget: Bytes that one computation may take, :class:`ntk_gp.settings.memory_budget`.
    :param candidates: All of this package's solvers; empty where the matrix is solved in another way.
    """

    solver: str | None
    reason: str
    is_in_use: bool = False
    num_rows: int = 0
    num_parameters: int = 0
    batch: int = 1
    memory_budget: int = 0
    candidates: tuple[SolverCandidate, ...] = ()

    def __str__(self) -> str:
        if not self.candidates:
            return self.reason
        batches = "" if self.batch == 1 else f", {self.batch} batches"
        size = f"N = {self.num_rows} rows, P = {self.num_parameters} parameters{batches}"
        who = f"{self.solver} {'solves' if self.is_in_use else 'would solve'}" if self.solver else "Nothing can solve"
        width = max(15, *(len(one.name) + 1 for one in self.candidates))
        lines = [
            f"  {one.name:<{width}}{one.flops:>8.1e} flops{readable_bytes(one.nbytes):>11}   {one.verdict}"
            for one in self.candidates
        ]
        budget = f"  {'memory budget':<{width}}{readable_bytes(self.memory_budget):>25}"
        return "\n".join([f"{who} K + D with {size}: {self.reason}", *lines, budget])


def report_on(system: System, used: Solver | None = None) -> SolverReport:
    """What is or would be chosen for a system, without building it.

    :param system: K + D.
    :param used: The solver that serves it already, if there is one.
    """
    one = system_of_one_output(system)
    system, outputs = (system, 1) if one is None else (one, system.jacobian.function.num_outputs)
    used = used.one if isinstance(used, OneOutputSolver) else used
    chosen, reason = _choice(system)
    if one is not None:
        reason = f"one system serves each of {outputs} outputs, which share no parameters; {reason}"
    taken = chosen if used is None else type(used)
    if taken is not chosen:
        reason = "it was chosen when predictions were prepared, by the settings of then"
    return SolverReport(
        solver=None if taken is None else taken.name,
        reason=reason,
        is_in_use=used is not None,
        num_rows=system.num_rows,
        num_parameters=system.num_parameters,
        batch=system.batch,
        memory_budget=memory.SYSTEM.bytes(system.x.device),
        candidates=tuple(_candidate(system, kind, taken, chosen) for kind in solvers_for(system)),
    )


def _choice(system: System) -> tuple[type[Solver] | None, str]:
    """What is chosen by the present settings, and why; None and what is wrong, where nothing can be."""
    try:
        chosen = solver_class(system)
    except (MemoryError, ValueError) as error:
        return None, str(error)
    if settings.solver.value() is not None:
        return chosen, "ntk_gp.settings.solver is set to it"
    if not chosen.is_exact:
        limited = is_too_large_to_factorise(system)
        return chosen, "gpytorch.settings.max_cholesky_size is less than N and P" if limited else "nothing exact fits"
    rivals = [kind for kind in solvers_for(system) if kind.is_exact and kind.obstacle(system) is None]
    return chosen, "exact, with the least flops" if len(rivals) > 1 else "exact, and the only such one that can serve"


def _candidate(
    system: System, kind: type[Solver], taken: type[Solver] | None, chosen: type[Solver] | None
) -> SolverCandidate:
    if kind is taken:
        verdict = "taken"
    elif kind is chosen:
        verdict = "would be taken now: call model.train() and model.eval()"
    else:
        verdict = _objection(system, kind, chosen)
    return SolverCandidate(kind.name, kind.cost(system), round(kind.nbytes_needed(system)), verdict)


def _objection(system: System, kind: type[Solver], chosen: type[Solver] | None) -> str:
    """Why one solver is not what is chosen by the present settings."""
    obstacle = kind.obstacle(system)
    if obstacle is not None:
        return obstacle
    if chosen is None or settings.solver.value() is not None:
        return "not the one that ntk_gp.settings.solver is set to"
    if not kind.is_exact and chosen.is_exact:
        return "iterates to a tolerance: taken where nothing exact can serve"
    if kind.is_exact and not chosen.is_exact:
        return "factorises more than gpytorch.settings.max_cholesky_size"
    ratio = kind.cost(system) / chosen.cost(system)
    return f"{ratio:,.2f} times the flops" if ratio < 10 else f"{ratio:,.0f} times the flops"
