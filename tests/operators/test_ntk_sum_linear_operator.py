"""Sums with a neural tangent kernel matrix: upstream's own suites, and exact solves at every size that fits."""

import unittest

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, KroneckerProductLinearOperator
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
from torch import Tensor

from ntk_gp import NTKLinearOperator, settings
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.operators.ntk_sum_linear_operator import NTKSumAddedDiagLinearOperator, NTKSumLinearOperator
from tests import references
from tests.adapted import assert_close, data, network

# Its parts are tested with either engine: NTKLinearOperator, and the solvers by their contract.
pytestmark = pytest.mark.engine_independent


class _Suite:
    seed = 0
    should_test_sample = True
    should_call_cg = False
    should_call_cholesky = False
    should_call_lanczos = False
    x_shape: tuple[int, ...] = (5, 3)

    def parts(self) -> tuple[NTKLinearOperator, DenseLinearOperator]:
        x = (2 * torch.randn(self.x_shape)).requires_grad_()
        variances = (torch.rand(1, 1) + 0.5).requires_grad_()
        root = torch.randn(*self.x_shape[:-1], 5)
        other = (root @ root.mT + torch.eye(5)).requires_grad_()
        linearization = Linearization(FrozenNetwork(network()))
        return NTKLinearOperator(x, x, variances, linearization=linearization), DenseLinearOperator(other)

    def create_linear_op(self):
        kernel_matrix, other = self.parts()
        return kernel_matrix + other

    def evaluate_linear_op(self, linear_op) -> Tensor:
        x1, x2, variances, other = linear_op.representation()[:4]
        net = network().to(x1.dtype)
        return (references.jacobian(net, x1) * variances) @ references.jacobian(net, x2).mT + other


@pytest.mark.thorough
class TestNTKSumLinearOperator(_Suite, LinearOperatorTestCase, unittest.TestCase):
    pass


class TestNTKSumLinearOperatorBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (3, 5, 3)


class TestNTKSumAddedDiagLinearOperator(_Suite, LinearOperatorTestCase, unittest.TestCase):
    def create_linear_op(self):
        return super().create_linear_op() + DiagLinearOperator((torch.rand(5) + 0.5).requires_grad_())

    def evaluate_linear_op(self, linear_op) -> Tensor:
        return super().evaluate_linear_op(linear_op) + torch.diag_embed(linear_op.representation()[-1])


class TestNTKProductLinearOperator(_Suite, LinearOperatorTestCase, unittest.TestCase):
    """Whose matrices are positive definite by Schur's theorem."""

    def create_linear_op(self):
        kernel_matrix, other = self.parts()
        return kernel_matrix * other

    def evaluate_linear_op(self, linear_op) -> Tensor:
        x1, x2, variances, other = linear_op.representation()
        net = network().to(x1.dtype)
        return (references.jacobian(net, x1) * variances) @ references.jacobian(net, x2).mT * other


@pytest.mark.thorough
class TestNTKProductLinearOperatorBatch(TestNTKProductLinearOperator):
    x_shape = (3, 5, 3)


class TestNTKProductLinearOperatorRectangular(RectangularLinearOperatorTestCase, unittest.TestCase):
    seed = 0

    def create_linear_op(self):
        x = torch.randn(5, 3).requires_grad_()
        variances = torch.ones(1, 1).requires_grad_()
        kernel_matrix = NTKLinearOperator(x, x[:4], variances, linearization=Linearization(FrozenNetwork(network())))
        return kernel_matrix * DenseLinearOperator(torch.randn(5, 4).requires_grad_())

    def evaluate_linear_op(self, linear_op) -> Tensor:
        x1, x2, variances, other = linear_op.representation()
        net = network().to(x1.dtype)
        return (references.jacobian(net, x1) * variances) @ references.jacobian(net, x2).mT * other


def make(n: int) -> tuple[NTKSumLinearOperator, Tensor, tuple[Tensor, ...]]:
    net, x = network(), data(n)[0]
    variances = torch.full((1, 1), 1.3, dtype=torch.float64).requires_grad_()
    kernel_matrix = NTKLinearOperator(x, x, variances, linearization=Linearization(FrozenNetwork(net)))
    scale = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    other = scale * (-torch.cdist(x, x)).exp()
    dense = variances * references.kernel(net, x) + other
    return kernel_matrix + DenseLinearOperator(other), dense, (variances, scale)


@pytest.mark.parametrize("n", [12, 850])
@pytest.mark.parametrize("noise", ["diagonal", "correlated"])
def test_solves_and_log_determinants_with_derivatives(n, noise):
    operator, dense, leaves = make(n)
    if noise == "diagonal":
        diagonal = torch.linspace(0.1, 0.3, n, dtype=torch.float64).requires_grad_()
        operator, dense = operator + DiagLinearOperator(diagonal), dense + diagonal.diag()
        assert isinstance(operator, NTKSumAddedDiagLinearOperator)
    else:
        block = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64).requires_grad_()
        identity = torch.eye(n // 2, dtype=torch.float64)
        operator = operator + KroneckerProductLinearOperator(DenseLinearOperator(identity), DenseLinearOperator(block))
        dense = dense + torch.kron(identity, block)
        assert isinstance(operator, NTKSumLinearOperator)
    rhs = torch.randn(n, 2, dtype=torch.float64).requires_grad_()
    solution, expected = operator.solve(rhs), torch.linalg.solve(dense, rhs)
    assert_close(solution, expected)
    inv_quad, logdet = operator.inv_quad_logdet(rhs, logdet=True)
    assert_close(inv_quad, (rhs * expected).sum())
    assert_close(logdet, dense.logdet())
    for a, b in (
        ((solution.sin().sum()), expected.sin().sum()),
        (inv_quad + logdet, (rhs * expected).sum() + dense.logdet()),
    ):
        actual_grads = torch.autograd.grad(a, (rhs, *leaves), retain_graph=True, allow_unused=True)
        expected_grads = torch.autograd.grad(b, (rhs, *leaves), retain_graph=True, allow_unused=True)
        for actual, wanted in zip(actual_grads, expected_grads, strict=True):
            assert_close(actual, wanted)


def test_too_large_to_be_dense_it_iterates_at_this_packages_tolerance():
    operator, dense, _ = make(900)
    operator = operator + DiagLinearOperator(torch.full((900,), 0.5, dtype=torch.float64))
    dense = dense + 0.5 * torch.eye(900, dtype=torch.float64)
    rhs = torch.randn(900, 2, dtype=torch.float64)
    with settings.memory_budget(8 * 900**2), torch.no_grad():
        assert not operator._is_dense
        solution = operator.solve(rhs)
    assert ((dense @ solution - rhs).norm(dim=0) / rhs.norm(dim=0)).max() <= 2e-4


def test_multiples_stay_exact():
    operator, dense, _ = make(12)
    scaled = operator.mul(torch.tensor(2.0, dtype=torch.float64))
    assert isinstance(scaled, NTKSumLinearOperator)
    assert_close(scaled.to_dense(), 2 * dense)
