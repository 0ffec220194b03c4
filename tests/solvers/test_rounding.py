"""Little noise: posteriors keep the digits that K + D loses, whose condition number is the features' squared."""

import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from ntk_gp import settings
from ntk_gp.solvers import function_space, rounding, weight_space
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from tests.adapted import LARGE, SMALL
from tests.solvers.test_solvers import Problem

pytestmark = pytest.mark.engine_independent

NOISE = 1e-9
PROMISE = 1e-8


class Spectral:
    """The posterior by the singular values of the whitened features: nothing is squared."""

    def __init__(self, problem: Problem):
        roots = problem.parameter_variances.sqrt().unsqueeze(-2)
        scale = problem.noise.rsqrt().unsqueeze(-1)
        left, values, right = torch.linalg.svd(scale * problem.jacobian * roots, full_matrices=False)
        targets = left.mT @ (scale * problem.rhs)
        self.mean_weights = roots.mT * (right.mT @ ((values / (1 + values.square())).unsqueeze(-1) * targets))
        features = problem.test_jacobian * roots
        known = features @ right.mT
        rest = features - known @ right
        shrunk = known / (1 + values.square()).unsqueeze(-2)
        self.covariance = shrunk @ known.mT + rest @ rest.mT


def error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).abs() / expected.abs().amax((-2, -1), keepdim=True)).max())


def errors(solver, problem: Problem) -> dict[str, float]:
    expected = Spectral(problem)
    jacobian = problem.system.jacobian_at(problem.test_x)
    variance = expected.covariance.diagonal(dim1=-2, dim2=-1)
    mean = problem.test_jacobian @ expected.mean_weights
    return {
        "variance": float(((solver.variance(jacobian) - variance) / variance).abs().max()),
        "covariance": error(solver.covariance(jacobian, jacobian), expected.covariance),
        "block": error(
            solver.covariance(jacobian[slice(0, 3)], jacobian), expected.covariance[:, : 3 * problem.outputs]
        ),
        "mean": error(problem.test_jacobian @ solver.mean_weights(problem.rhs.mT).mT, mean),
    }


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize(("batches", "outputs"), [((1, 1, 1), 1), ((1, 1, 1), 2), ((3, 3, 3), 1)])
def test_errors_stay_within_the_promise(way, n, batches, outputs, monkeypatch):
    problem = Problem(n, batches, outputs, noise=NOISE)
    found = errors(way(problem.system), problem)
    assert max(found.values()) < PROMISE, found
    monkeypatch.setattr(rounding, "accuracy", lambda system: float("inf"))
    for module in (function_space, weight_space):
        monkeypatch.setattr(module, "accuracy", rounding.accuracy)
        monkeypatch.setattr(module, "needs_orthogonalisation", lambda system, factor: factor is None)
    if (
        rounding.rounding_error(way(problem.system).cholesky) > 1e-7
    ):  # where the plain way loses digits, this way had to act
        assert max(errors(way(problem.system), problem).values()) > 10 * max(found.values())


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
def test_added_data(way):
    problem = Problem(LARGE, noise=NOISE)
    first = problem.system.__class__(
        problem.system.linearization, problem.x[:, :-5], problem.group_variances, problem.noise[:, :-5]
    )
    solver = way(first).extended(problem.system) or way(problem.system)  # orthogonalised features start anew
    assert max(errors(solver, problem).values()) < PROMISE


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
def test_gradients_of_variances(way):
    problem = Problem(SMALL, noise=NOISE)
    solver = way(problem.system)
    x = problem.test_x.clone().requires_grad_()
    solver.variance(problem.system.jacobian_at(x)).sum().backward()
    step = 1e-5 * torch.ones_like(x)
    ends = [solver.variance(problem.system.jacobian_at(problem.test_x + s * step)).sum() for s in (1, -1)]
    slope = (ends[0] - ends[1]) / 2
    assert abs((x.grad * step).sum() - slope) < 1e-3 * abs(slope)


def test_without_memory_it_is_said():
    problem = Problem(LARGE, noise=NOISE)
    size = problem.system.num_parameters
    with (
        settings.memory_budget(8 * 3 * size**2),
        pytest.warns(NumericalWarning, match="rounding leaves a relative error"),
    ):
        WeightSpaceSolver(problem.system)


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
def test_single_precision_asks_for_less(way):
    problem = Problem(LARGE, noise=1e-7)
    single = problem.system.__class__(
        problem.system.linearization, problem.x, problem.group_variances, problem.noise, torch.float32
    )
    assert rounding.accuracy(single) > rounding.accuracy(problem.system)
    assert max(errors(way(single), problem).values()) < 5e-3


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("noise", [NOISE, 1e-6])
def test_a_covariance_is_formed_in_blocks_that_fit(outputs, noise, monkeypatch):
    problem = Problem(LARGE, (1, 1, 1), outputs, noise=noise)
    solver = FunctionSpaceSolver(problem.system)
    assert solver.is_refined == (noise > NOISE)
    assert (solver.basis is None) == (noise > NOISE)
    jacobian, other = problem.system.jacobian_at(problem.test_x), problem.system.jacobian_at(problem.test_x + 0.1)
    expected = [solver.covariance(jacobian, second) for second in (jacobian, other)]
    heights = []
    original = solver._remainder_at
    monkeypatch.setattr(solver, "_remainder_at", lambda block: heights.append(block.num_points) or original(block))
    with settings.memory_budget(8 * 8 * outputs * solver.whitened_size() * 6):
        found = [solver.covariance(jacobian, second) for second in (jacobian, other)]
    assert max(heights) == 3 < jacobian.num_points
    for covariance, whole in zip(found, expected, strict=True):
        assert error(covariance, whole) < 1e-10  # of 1e-9: what is left of features of size one
    torch.testing.assert_close(found[0], found[0].mT, rtol=1e-12, atol=0)
