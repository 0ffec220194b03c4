"""Function space over ranks, against dense algebra in one process."""

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from ntk_gp import settings
from ntk_gp.distributed import cholesky
from ntk_gp.distributed.cholesky import Layout, traffic
from ntk_gp.distributed.function_space import DistributedFunctionSpaceSolver
from ntk_gp.solvers import System, choose_solver, solver_class
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.testing import SolverProblem as Problem
from tests.adapted import LARGE, SMALL, AdaptedGP, assert_close
from tests.distributed import problems
from tests.distributed.harness import Ranks

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case]

BLOCK = 8


# So that each rank has several of few rows.
small_blocks = patch.object(cholesky, "_SMALLEST_BLOCK", BLOCK)


def sharded(problem: Problem) -> DistributedFunctionSpaceSolver:
    solver = choose_solver(problem.system)
    assert isinstance(solver, DistributedFunctionSpaceSolver), solver
    return solver


@small_blocks
def answers(n: int, batches: tuple[int, int, int], outputs: int, noise: float) -> dict[str, Tensor]:
    """All that a solver gives."""
    problem = Problem(n, batches, outputs, noise)
    with settings.distributed(), settings.solver("distributed"):
        solver = sharded(problem)
        jacobian = solver.system.jacobian_at(problem.test_x)
        by_group, by_noise = solver.logdet_derivatives()
        x = problem.test_x[:, :2].clone().requires_grad_()
        at_x = solver.system.jacobian_at(x)
        variance, covariance = solver.variance(at_x), solver.covariance(at_x, at_x)
        (slope,) = torch.autograd.grad(variance.square().sum() + covariance[:, 0].sum(), x)
        rhs = problem.rhs.clone().requires_grad_()
        solved = solver.solve(rhs)
        (by_rhs,) = torch.autograd.grad(solved.square().sum(), rhs)
        again = pickle.loads(pickle.dumps(solver))
        return {
            "solve": solved.detach(),
            "by rhs": by_rhs,
            "logdet": solver.logdet(),
            "weights": solver.mean_weights(problem.rhs.mT),
            "covariance": solver.covariance(jacobian, jacobian),
            "some covariance": solver.covariance(jacobian[slice(0, 3)], jacobian),
            "variance": solver.variance(jacobian),
            "by group": by_group,
            "by noise": by_noise,
            "by test inputs": slope,
            "pickled": again.solve(problem.rhs),
            "pickle": torch.frombuffer(bytearray(pickle.dumps(solver)), dtype=torch.uint8),
        }


def expected(n: int, batches: tuple[int, int, int], outputs: int, noise: float) -> dict[str, Tensor]:
    """The same from explicit Jacobians; by test inputs, of the solver of one process."""
    problem = Problem(n, batches, outputs, noise)
    inverse = problem.matrix.inverse()
    solved = torch.linalg.solve(problem.matrix, problem.rhs)
    parts = [problem.jacobian[..., problem.groups == group] for group in (0, 1)]
    x = problem.test_x[:, :2].clone().requires_grad_()
    one = FunctionSpaceSolver(problem.system)
    at_x = problem.system.jacobian_at(x)
    variance, covariance = one.variance(at_x), one.covariance(at_x, at_x)
    return {
        "solve": solved,
        "by rhs": 2 * torch.linalg.solve(problem.matrix, solved),
        "logdet": problem.matrix.logdet(),
        "weights": ((problem.jacobian * problem.parameter_variances.unsqueeze(-2)).mT @ solved).mT,
        "covariance": problem.covariance,
        "some covariance": problem.covariance[:, : 3 * outputs],
        "variance": problem.covariance.diagonal(dim1=-2, dim2=-1),
        "by group": torch.stack([(inverse * (part @ part.mT)).sum((-2, -1)) for part in parts], dim=-1),
        "by noise": inverse.diagonal(dim1=-2, dim2=-1),
        "by test inputs": torch.autograd.grad(variance.square().sum() + covariance[:, 0].sum(), x)[0],
        "pickled": solved,
    }


def check(started: Ranks, *case: Any) -> None:
    found = started.run(answers, *case)
    for name, wanted in expected(*case).items():
        values = [answer[name] for answer in found]
        assert all(torch.equal(values[0], value) for value in values), name
        assert values[0].shape == wanted.shape, name
        error = (values[0] - wanted).norm() / wanted.norm()
        assert error < 1e-10, (name, float(error))
    # By this process alone.
    solver, problem = pickle.loads(found[0]["pickle"].numpy().tobytes()), Problem(*case)
    assert_close(solver.solve(problem.rhs), torch.linalg.solve(problem.matrix, problem.rhs), 1e-10)
    variance = solver.variance(solver.system.jacobian_at(problem.test_x))
    assert_close(variance, problem.covariance.diagonal(dim1=-2, dim2=-1), 1e-10)


# The second has more parameters than rows, the third batches of inputs, the last of everything else.
@pytest.mark.parametrize(
    ("n", "batches", "outputs"),
    [(61, (1, 1, 1), 1), (12, (1, 1, 1), 2), (26, (3, 1, 1), 1), (26, (1, 3, 3), 1)],
)
def test_two_ranks(two, n, batches, outputs):
    check(two, n, batches, outputs, 0.1)


def test_four_ranks(four):
    check(four, 45, (1, 1, 1), 1, 0.1)


@small_blocks
def of_models(make: Callable[[], AdaptedGP]) -> list[str]:
    """What a model of GPyTorch's gives that is not the same in one process and by ranks, or not on all of them."""
    with settings.solver("function_space"):
        alone = problems.everything(make())
    with settings.distributed() as group, settings.solver("distributed"):
        together = problems.everything(make())
        for name, value in together.items():
            group.agree(name, value.detach())
    errors = {name: float((value - alone[name]).norm() / alone[name].norm()) for name, value in together.items()}
    return [f"{name}: {error:.1e}" for name, error in errors.items() if not error < 1e-10]


@pytest.mark.parametrize(
    "make",
    [
        partial(problems.model_of, "layers", LARGE),
        partial(problems.model_of, "gain", SMALL + 1),
        problems.batched,
        partial(problems.multitask, last_layer=True),
    ],
)
def test_models(two, make):
    """Training and predictions as users have them: known features beside J, batches, outputs with and without
    parameters in common."""
    assert two.run(of_models, make) == [[], []]


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
    with settings.distributed(), settings.solver("distributed"), warnings.catch_warnings(record=True) as caught:
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
    with settings.distributed(), settings.solver("distributed"):
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
        with settings.solver("distributed"):
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
    with settings.solver("distributed"), pytest.raises(ValueError, match="sharded over ranks"):
        choose_solver(Problem(12).system)
