"""What a solver over ranks gives, against dense algebra in one process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ntk_gp import settings
from ntk_gp.distributed import cholesky
from ntk_gp.solvers import Solver, choose_solver
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.testing import SolverProblem as Problem
from tests.adapted import AdaptedGP, assert_close
from tests.distributed import problems
from tests.distributed.harness import Ranks

BLOCK = 8
# What one process has in place of what ranks have.
ALONE = {"distributed": "function_space", "distributed_weight_space": "weight_space"}


# So that each rank has several of few rows.
small_blocks = patch.object(cholesky, "_SMALLEST_BLOCK", BLOCK)


def sharded(problem: Problem) -> Solver:
    """The one that is set."""
    solver = choose_solver(problem.system)
    assert solver.name == settings.solver.value(), solver
    return solver


@small_blocks
def answers(name: str, n: int, batches: tuple[int, int, int], outputs: int, noise: float) -> dict[str, Tensor]:
    """All that a solver gives."""
    problem = Problem(n, batches, outputs, noise)
    with settings.distributed(), settings.solver(name):
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


def check(started: Ranks, solver_name: str, *case: Any) -> None:
    """What ranks find with one solver is the same on all of them, and right."""
    found = started.run(answers, solver_name, *case)
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


@small_blocks
def of_models(solver: str, make: Callable[[], AdaptedGP]) -> list[str]:
    """What a model of GPyTorch's gives that is not the same in one process and by ranks, or not on all of them."""
    with settings.solver(ALONE[solver]):
        alone = problems.everything(make())
    with settings.distributed() as group, settings.solver(solver):
        together = problems.everything(make())
        for name, value in together.items():
            group.agree(name, value.detach())
    errors = {name: float((value - alone[name]).norm() / alone[name].norm()) for name, value in together.items()}
    return [f"{name}: {error:.1e}" for name, error in errors.items() if not error < 1e-10]
