"""Which solver is taken, over a grid of sizes, precisions and settings: the rule, written out once more."""

from itertools import product

import gpytorch
import pytest
import torch

from ntk_gp import settings
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import SOLVERS, System, solver_class
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.iterative import IterativeSolver
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from tests.adapted import data, network

pytestmark = pytest.mark.engine_independent

ROWS = (5, 12, 41, 60, 130, 400, 1200)
BUDGETS = (2000, 27_000, 100_000, 12_500_000, 20_000_000, None)
LIMITS = (None, 30, 41, 800)


def system_of(n: int, width: int, outputs: int, batch: int, dtype: torch.dtype, noise: float) -> System:
    net = FrozenNetwork(network(outputs=outputs, width=width).to(dtype), output="all")
    x = data(n, batch)[0].to(dtype)
    return System(Linearization(net), x, x.new_ones(1, 1), x.new_full((1, n * outputs), noise))


def expected(system: System, budget: int, limit: int | None) -> type:
    """The least flops of what fits, an exact one first; a size that the user has set in GPyTorch before all else."""
    rows, parameters, batch = system.num_rows, system.num_parameters, system.batch
    if limit is not None and batch == 1 and min(rows, parameters) > limit:
        return IterativeSolver
    costs = {}
    if 8 * batch * rows**2 * (1.5 if rows >= 1024 else 2) <= budget:
        gram = system.jacobian.gram_cost(system.jacobian)
        costs[FunctionSpaceSolver] = gram + batch * rows**3 / 3
    if 8 * batch * parameters**2 * 2 <= budget:
        costs[WeightSpaceSolver] = batch * (1.25 * rows * parameters**2 + parameters**3 / 3)
    if costs:
        return min(costs, key=costs.get)
    return IterativeSolver if batch == 1 else MemoryError


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float64, 0.1), (torch.float64, 1e-12), (torch.float32, 1e-3)])
@pytest.mark.parametrize(("width", "outputs", "batch"), [(8, 1, 1), (8, 2, 1), (40, 1, 1), (5, 3, 1), (8, 1, 3)])
def test_the_rule(width, outputs, batch, dtype, noise):
    taken = set()
    for n in ROWS:
        system = system_of(n, width, outputs, batch, dtype, noise)
        for budget, limit in product(BUDGETS, LIMITS):
            with settings.memory_budget(budget):
                bytes_allowed = settings.memory_budget.bytes(system.x.device)
                wanted = expected(system, bytes_allowed, limit)
                with gpytorch.settings.max_cholesky_size(limit or gpytorch.settings.max_cholesky_size.value()):
                    if wanted is MemoryError:
                        with pytest.raises(MemoryError, match="memory_budget"):
                            solver_class(system)
                    else:
                        assert solver_class(system) is wanted, (n, budget, limit)
            taken.add(wanted)
    last = MemoryError if batch > 1 else IterativeSolver
    assert taken == {FunctionSpaceSolver, WeightSpaceSolver, last}


class TestTable:
    def test_a_solver_with_a_line_in_the_table_is_considered(self, monkeypatch):
        """The choice knows of solvers what they say of themselves, and nothing else."""

        class Free(FunctionSpaceSolver):
            name = "free"
            cost = classmethod(lambda cls, system: 0.0)
            nbytes_needed = classmethod(lambda cls, system: 2000.0)

        monkeypatch.setattr("ntk_gp.solvers.table.SOLVERS", (*SOLVERS, Free))
        system = system_of(12, 8, 1, 1, torch.float64, 0.1)
        assert solver_class(system) is Free
        with settings.memory_budget(1999):
            assert solver_class(system) is IterativeSolver

    def test_what_is_needed_is_what_is_held(self):
        """Of memory: the factors, twice while they are made; JᵀJ, where noise is constant, for the next time; of the
        preconditioner, one of its matrices."""
        system = system_of(130, 8, 1, 1, torch.float64, 0.1)
        for kind in SOLVERS:
            copies = 8 if not kind.is_exact else 3 if kind is WeightSpaceSolver else 2
            assert kind.nbytes_needed(system) == copies * kind(system).nbytes, kind
        needed = 8 * 2.0 * system.num_parameters**2
        with settings.memory_budget(1.9 * needed):  # too little room to keep it
            assert WeightSpaceSolver.nbytes_needed(system) == needed
        uneven = System(system.linearization, system.x, system.variances, system.noise * (1 + system.noise.cumsum(-1)))
        assert WeightSpaceSolver.nbytes_needed(uneven) == needed

    def test_costs_are_those_of_the_work(self):
        """Twice the rows: eight times the flops of a factor in function space, twice those in weight space."""
        small, large = (system_of(n, 8, 1, 1, torch.float64, 0.1) for n in (2000, 4000))
        assert 4 < FunctionSpaceSolver.cost(large) / FunctionSpaceSolver.cost(small) < 8
        assert 1.9 < WeightSpaceSolver.cost(large) / WeightSpaceSolver.cost(small) < 2
        assert 1.9 < IterativeSolver.cost(large) / IterativeSolver.cost(small) < 2.2
