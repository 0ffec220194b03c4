"""Function space over ranks, against dense algebra in one process."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning

from ntk_gp import settings
from ntk_gp.distributed.cholesky import Layout, traffic
from ntk_gp.distributed.function_space import DistributedFunctionSpaceSolver
from ntk_gp.solvers import System, choose_solver, solver_class
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.testing import SolverProblem as Problem
from tests.distributed.answers import sharded, small_blocks

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case]

NAME = "distributed"


@small_blocks
def sent(batches: tuple[int, int, int]) -> list[tuple[Counter, Counter]]:
    """The bytes that this rank sends, and those that it should: making the solver, solving, variances."""
    problem = Problem(61, batches)
    with settings.distributed() as group:
        system, found = problem.system, []
        jacobian = system.jacobian_at(problem.test_x)
        batch, points = system.batch, problem.test_x.shape[1]
        most = max(rows.stop - rows.start for rows in system.jacobian.shards.rows)
        layout = Layout([rows.stop - rows.start for rows in system.jacobian.shards.rows])

        def count(call: Callable[[], Any], model: str, columns: int, **beside: int) -> Any:
            group.traffic.clear()
            result = call()
            each = traffic(layout, group.rank, columns)[model]
            found.append(
                (+group.traffic, Counter({name: batch * value for name, value in each.items()}) + Counter(beside))
            )
            return result

        others = group.size - 1
        beside = {"gather": 8 * others * batch * most, "sum": 2 * 8 * others * batch // group.size}
        solver = count(lambda: DistributedFunctionSpaceSolver(system), "factorise", 1, **beside)
        count(lambda: solver.solve(problem.rhs), "solve", problem.rhs.shape[-1])
        numbers = 2 * others * batch * points // group.size
        count(lambda: solver.variance(jacobian), "forward", points, sum=2 * 8 * numbers, largest=numbers)
    return found


def test_bytes_are_those_of_the_model(two):
    for found in two.run(sent, (3, 1, 1)):
        for counted, expected_ in found:
            assert counted == expected_


@small_blocks
def with_little_noise(noise: float) -> dict[str, Any]:
    problem = Problem(60, noise=noise)
    with settings.distributed(), settings.solver(NAME), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solver = sharded(problem)
        jacobian = solver.system.jacobian_at(problem.test_x)
        return {
            "refined": solver.is_refined,
            "warnings": [str(each.message) for each in caught if each.category is NumericalWarning],
            "variance": solver.variance(jacobian),
            "covariance": solver.covariance(jacobian, jacobian),
            "weights": solver.mean_weights(problem.rhs.mT),
        }


def test_digits_that_rounding_costs_are_restored(two):
    """Compared with weight space in one process, which has them."""
    noise = 1e-8
    problem = Problem(60, noise=noise)
    with settings.solver("weight_space"):
        reference = choose_solver(problem.system)
    jacobian = problem.system.jacobian_at(problem.test_x)
    wanted = {
        "variance": reference.variance(jacobian),
        "covariance": reference.covariance(jacobian, jacobian),
        "weights": reference.mean_weights(problem.rhs.mT),
    }
    first, second = two.run(with_little_noise, noise)
    assert first["refined"] and not first["warnings"]
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - value).norm() < 1e-6 * value.norm(), name


def test_what_is_lost_is_said(two):
    for answer in two.run(with_little_noise, 1e-13):
        assert len(answer["warnings"]) == 1
        assert "not orthogonalised over ranks" in answer["warnings"][0]


@small_blocks
def refusal(noise: float, value: float | None) -> str:
    problem = Problem(60, noise=noise)
    if value is not None:
        problem.system.x[0, 7] = value
    with settings.distributed(), settings.solver(NAME):
        try:
            sharded(problem)
        except (NotPSDError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "none"


@pytest.mark.parametrize(
    ("noise", "value", "message"),
    [
        (1e-18, None, "NotPSDError: K [+] D of 60 rows is not positive definite.*not orthogonalised"),
        (0.1, 1e200, "ValueError: The network's Jacobian is NaN"),
    ],
)
def test_all_ranks_refuse_alike(two, noise, value, message):
    for answer in two.run(refusal, noise, value):
        assert re.match(message, answer), answer


def choices() -> list[str]:
    """Of few rows and of many, and what a rank would hold of the latter."""
    with settings.distributed():
        small = Problem(60).system
        x = torch.randn(1, 2500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        large = System(small.linearization, x, small.variances, x.new_ones(1, 2500))
        with settings.solver(NAME):
            forced = solver_class(small).name
        chosen = solver_class(small).name
        costs = [kind.cost(large) for kind in (FunctionSpaceSolver, DistributedFunctionSpaceSolver)]
        bytes_needed = DistributedFunctionSpaceSolver.nbytes_needed(large) / (8 * 2500**2)
    return [forced, chosen, costs[1] < costs[0], bytes_needed]


def test_the_choice(two):
    """With few rows, messages take longer than a factorisation; with many, ranks are faster, in less memory."""
    for forced, small, is_cheaper, needed in two.run(choices):
        assert forced == "distributed"
        assert small in ("function_space", "weight_space")
        assert is_cheaper
        assert 0.25 < needed < 0.6


def test_one_process_is_told_what_it_is_for():
    with settings.solver(NAME), pytest.raises(ValueError, match="sharded over ranks"):
        choose_solver(Problem(12).system)
