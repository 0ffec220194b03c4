"""Which way to solve: the cheapest exact one that fits in the memory budget, iteration where none does."""

from __future__ import annotations

from ..stock import STOCK_CHOLESKY_SIZES as STOCK_CHOLESKY_SIZES
from ..stock import chosen_cholesky_size
from .base import Solver
from .function_space import FunctionSpaceSolver
from .iterative import IterativeSolver
from .system import System
from .weight_space import WeightSpaceSolver


def choose_solver(system: System) -> Solver:
    """Builds the solver for a system.

    ==============  =====================================  ======================
    way             flops                                  float64 numbers held
    ==============  =====================================  ======================
    function space  the Gram matrix (by the engine), N³/3  1.5 N²
    weight space    N P² (rows of J, and their products)   2 P²
    iteration       4 N P for each step and column         N · landmarks
    ==============  =====================================  ======================

    A solver of that kind for the first rows of the same system is extended instead, where one is in use: new data
    costs what it adds. A `gpytorch.settings.max_cholesky_size` that the user has set decides between factorisation and
    iteration.
    """
    kind = solver_class(system)
    solver = _extended(system, kind) or kind(system)
    system.linearization.add_solver(solver)
    return solver


def _extended(system: System, kind: type[Solver]) -> Solver | None:
    for known in system.linearization.solvers:
        if type(known) is kind and system.starts_with(known.system):
            return known.extended(system)
    return None


def solver_class(system: System) -> type[Solver]:
    """The kind of solver, by costs and memory; what the user has set in GPyTorch comes first."""
    rows, parameters, batch = system.num_rows, system.num_parameters, system.batch
    limit = chosen_cholesky_size()
    if limit is not None and min(rows, parameters) > limit and batch == 1:
        return IterativeSolver
    costs: dict[type[Solver], float] = {}
    if FunctionSpaceSolver.fits(system):
        jacobian = system.jacobian
        costs[FunctionSpaceSolver] = jacobian.gram_cost(jacobian) + batch * rows**3 / 3
    if system.fits(2.0 * batch * parameters**2):
        costs[WeightSpaceSolver] = batch * (1.25 * rows * parameters**2 + parameters**3 / 3)
    if costs:
        return min(costs, key=costs.__getitem__)
    if batch > 1:
        raise MemoryError(
            f"{batch} systems of {rows} rows and {parameters} parameters need more than ntk_gp.settings.memory_budget; "
            "raise it, or use smaller batches."
        )
    return IterativeSolver
