"""Which way to solve: the cheapest exact one that fits in the memory budget, iteration where none does."""

from __future__ import annotations

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
    function space  the Gram matrix (by the engine), N³/3  2 N²
    weight space    N P² (rows of J, and their products)   2 P²
    iteration       4 N P for each step and column         N · landmarks
    ==============  =====================================  ======================
    """
    return solver_class(system)(system)


def solver_class(system: System) -> type[Solver]:
    """The kind of solver, by costs and memory."""
    rows, parameters, batch = system.num_rows, system.num_parameters, system.batch
    costs: dict[type[Solver], float] = {}
    if system.fits(2.0 * batch * rows**2):
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
