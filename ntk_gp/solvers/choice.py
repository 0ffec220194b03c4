"""Which way to solve: the cheapest exact one that fits in the memory budget, iteration where none does."""

from __future__ import annotations

from .. import settings
from ..stock import chosen_cholesky_size
from .base import Solver
from .one_output import OneOutputSolver, system_of_one_output
from .system import System
from .table import OVER_RANKS, SOLVERS, solvers_for


def choose_solver(system: System) -> Solver:
    """Builds the solver for a system, of the kind that :func:`solver_class` says.

    A solver of that kind for the first rows of the same system is extended instead, where one is in use: new data
    costs what it adds. Where outputs have nothing but features in common, it is that of one output, for all of them.
    """
    one = system_of_one_output(system)
    if one is not None:
        return OneOutputSolver(system, _solver_of(one), _solver_of)
    return _solver_of(system)


def _solver_of(system: System) -> Solver:
    kind = _kind(system)
    solver = _extended(system, kind) or kind(system)
    system.linearization.add_solver(solver)
    return solver


def _extended(system: System, kind: type[Solver]) -> Solver | None:
    if not system.jacobian.shards.is_whole:
        return None  # which solvers are still in use is not the same on all ranks
    for known in system.linearization.solvers:
        if type(known) is kind and system.starts_with(known.system):
            return known.extended(system)
    return None


def solver_class(system: System) -> type[Solver]:
    """The kind of solver for a system, by what each in :mod:`ntk_gp.solvers.table` says of itself.

    Of those that can serve, exact ones come first, and of these the one with the least flops. A
    `gpytorch.settings.max_cholesky_size` that the user has set decides between factorisation and iteration, and
    :class:`ntk_gp.settings.solver` before all else. Where the system consists of one for each output, it is theirs.

    :raises MemoryError: If none can serve, or the one that is set has too little memory.
    :raises ValueError: If the one that is set cannot serve this system.
    """
    return _kind(system_of_one_output(system) or system)


def _kind(system: System) -> type[Solver]:
    name = settings.solver.value()
    if name is not None:
        return _forced(system, name)
    able = [kind for kind in solvers_for(system) if kind.obstacle(system) is None]
    exact = [kind for kind in able if kind.is_exact]
    iterating = [kind for kind in able if not kind.is_exact]
    candidates = (iterating or exact) if is_too_large_to_factorise(system) else (exact or iterating)
    if not candidates:
        raise MemoryError(
            f"{system.batch} systems of {system.num_rows} rows and {system.num_parameters} parameters need more than "
            "ntk_gp.settings.memory_budget; raise it, or use smaller batches."
        )
    return min(candidates, key=lambda kind: kind.cost(system))


def _forced(system: System, name: str) -> type[Solver]:
    (kind,) = (kind for kind in (*SOLVERS, *OVER_RANKS) if kind.name == name)
    obstacle = kind.obstacle(system)
    if obstacle is None:
        return kind
    error = ValueError if kind.fits(system) else MemoryError
    raise error(
        f"ntk_gp.settings.solver is {name!r}, which cannot solve a system of {system.num_rows} rows and "
        f"{system.num_parameters} parameters: it {obstacle}. Raise what is too low, or set another solver, or None for "
        "the cheapest one that can."
    )


def is_too_large_to_factorise(system: System) -> bool:
    """Whether the smaller of N and P exceeds the size that the user has set in GPyTorch, if any."""
    limit = chosen_cholesky_size()
    return limit is not None and min(system.num_rows, system.num_parameters) > limit
