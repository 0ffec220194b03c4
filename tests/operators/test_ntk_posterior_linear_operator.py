"""The posterior covariance as a lazy matrix: upstream's own suites, and blocks of variances."""

import copy
import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
from torch import Size, Tensor

from ntk_gp import settings
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.operators.ntk_posterior_linear_operator import NTKPosteriorLinearOperator
from ntk_gp.solvers import LandmarkVariance, System
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from tests import references
from tests.adapted import SMALL, assert_close, data, network

# Its parts are tested with either engine: NTKLinearOperator, and the solvers by their contract.
pytestmark = pytest.mark.engine_independent


def system_of(outputs: int = 1, batch: int = 1, n: int = SMALL) -> System:
    frozen = FrozenNetwork(network(outputs=outputs), output="all" if outputs > 1 else None)
    x = data(n, batch)[0]
    noise = torch.full((1, n * outputs), 0.3, dtype=torch.float64)
    return System(Linearization(frozen), x, torch.ones(1, 1, dtype=torch.float64), noise)


def posterior(system: System, x1: Tensor, x2: Tensor, outputs: int = 1) -> Tensor:
    """Closed form, (*batch, m₁·C, m₂·C), in the inputs' dtype."""
    net = network(outputs=outputs)
    jacobian = references.jacobian(net, system.x if system.batch > 1 else system.x[0])
    matrix = jacobian @ jacobian.mT + 0.3 * torch.eye(jacobian.shape[-2], dtype=torch.float64)
    test1, test2 = (references.jacobian(copy.deepcopy(net), x.double()) for x in (x1, x2))
    explained = (test1 @ jacobian.mT) @ torch.linalg.solve(matrix, jacobian @ test2.mT)
    return (test1 @ test2.mT - explained).to(x1.dtype)


class _Suite:
    """Few points, far apart, so that the matrix is well conditioned in float32."""

    seed = 0
    should_test_sample = True
    should_call_lanczos = False
    should_call_cg = False
    outputs = 1
    x_shape: tuple[int, ...] = (5, 3)
    x2_shape: tuple[int, ...] | None = None
    solver = FunctionSpaceSolver

    def create_linear_op(self) -> NTKPosteriorLinearOperator:
        self.system = system_of(self.outputs)
        x1 = (3 * torch.randn(self.x_shape)).requires_grad_()
        x2 = x1 if self.x2_shape is None else (3 * torch.randn(self.x2_shape)).requires_grad_()
        return NTKPosteriorLinearOperator(x1, x2, source=self.solver(self.system))

    def evaluate_linear_op(self, linear_op: NTKPosteriorLinearOperator) -> Tensor:
        return posterior(self.system, *linear_op.representation(), self.outputs)


class TestFunctionSpace(_Suite, LinearOperatorTestCase, unittest.TestCase):
    pass


@pytest.mark.thorough
class TestWeightSpace(_Suite, LinearOperatorTestCase, unittest.TestCase):
    solver = WeightSpaceSolver


class TestBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (3, 5, 3)
    skip_slq_tests = True


@pytest.mark.thorough
class TestRectangular(_Suite, RectangularLinearOperatorTestCase, unittest.TestCase):
    x2_shape = (4, 3)


class TestRectangularBatch(_Suite, RectangularLinearOperatorTestCase, unittest.TestCase):
    x_shape = (2, 5, 3)
    x2_shape = (2, 4, 3)


@pytest.mark.parametrize("source", [FunctionSpaceSolver, WeightSpaceSolver, LandmarkVariance])
@pytest.mark.parametrize("outputs", [1, 2])
def test_blocks_of_variances(source, outputs, monkeypatch):
    """However many points one block may have, the variances are the same."""
    with settings.love_tolerance(1e-10):
        source = source(system_of(outputs))
    x = data(23, seed=1)[0]
    expected = posterior(source.system, x, x, outputs)
    for size in (1, 5, 23, 100):
        monkeypatch.setattr(type(source), "points_per_block", lambda self, outputs: size)  # noqa: B023
        operator = NTKPosteriorLinearOperator(x, x, source=source)
        assert_close(operator.diagonal(), expected.diagonal(), 1e-7)
    assert_close(operator.to_dense(), expected, 1e-7)


@pytest.mark.parametrize("solver", [FunctionSpaceSolver, WeightSpaceSolver])
@pytest.mark.parametrize("test_batch", [(3,), (4, 3)])
@pytest.mark.parametrize("size", [2, 100])
def test_batches_of_training_data(solver, test_batch, size, monkeypatch):
    system = system_of(batch=3)
    x1, x2 = data(6, *test_batch, seed=1)[0], data(4, *test_batch, seed=2)[0]
    monkeypatch.setattr(solver, "points_per_block", lambda self, outputs: size)
    source = solver(system)
    square = NTKPosteriorLinearOperator(x1, x1, source=source, batch_shape=Size([3]))
    cross = NTKPosteriorLinearOperator(x1, x2, source=source, batch_shape=Size([3]))
    expected = posterior(system, x1, x1)
    assert_close(square.to_dense(), expected)
    assert_close(square.diagonal(dim1=-2, dim2=-1), expected.diagonal(dim1=-2, dim2=-1))
    assert_close(cross.to_dense(), posterior(system, x1, x2))
    assert_close(square[..., 1:4, 2:].to_dense(), expected[..., 1:4, 2:])
    assert_close(square[..., 0, :, :].to_dense(), expected[..., 0, :, :])
    assert_close(square[0].to_dense(), expected[0])


def test_one_block_never_holds_more_than_the_budget():
    solver = FunctionSpaceSolver(system_of(n=200))
    with settings.memory_budget(8 * 8 * 200 * 3):
        assert solver.points_per_block(1) == 3
        assert solver.points_per_block(2) == 1
