"""K + D: upstream's own suite, and exact solves and log-determinants with their derivatives."""

import unittest

import pytest
import torch
from linear_operator.operators import ConstantDiagLinearOperator, DenseLinearOperator, DiagLinearOperator
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from torch import Size, Tensor

from ntk_gp import NTKLinearOperator
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.operators import NTKAddedDiagLinearOperator
from ntk_gp.operators.ntk_sum_linear_operator import NTKSumAddedDiagLinearOperator
from tests import references
from tests.adapted import LARGE, SMALL, assert_close, network

# Its parts are tested with either engine: NTKLinearOperator, and the solvers by their contract.
pytestmark = pytest.mark.engine_independent


class _Suite:
    """In float32, the network's 41 parameters against 5 points."""

    seed = 0
    should_test_sample = True
    should_call_cg = False
    should_call_cholesky = False
    should_call_lanczos = False
    x_shape: tuple[int, ...] = (5, 3)
    noise_shape: tuple[int, ...] = (5,)

    def create_linear_op(self) -> NTKAddedDiagLinearOperator:
        x = (2 * torch.randn(self.x_shape)).requires_grad_()
        variances = (torch.rand(1, 1) + 0.5).requires_grad_()
        noise = (torch.rand(self.noise_shape) + 0.5).requires_grad_()
        kernel_matrix = NTKLinearOperator(x, x, variances, linearization=Linearization(FrozenNetwork(network())))
        return kernel_matrix + DiagLinearOperator(noise)

    def evaluate_linear_op(self, linear_op: NTKAddedDiagLinearOperator) -> Tensor:
        x1, x2, variances, noise = linear_op.representation()
        net = network().to(x1.dtype)
        gram = (references.jacobian(net, x1) * variances) @ references.jacobian(net, x2).mT
        return gram + torch.diag_embed(noise)


class TestNTKAddedDiagLinearOperator(_Suite, LinearOperatorTestCase, unittest.TestCase):
    pass


@pytest.mark.thorough
class TestNTKAddedDiagLinearOperatorBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (3, 5, 3)
    noise_shape = (3, 5)


class TestNTKAddedDiagLinearOperatorMultiBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (2, 3, 5, 3)
    noise_shape = (2, 3, 5)
    skip_slq_tests = True  # as upstream's own multi-batch cases


def make(n: int, x_batch=(), variance_batch=(), noise_batch=(), constant: bool = False, requires_grad: bool = True):
    """The operator, what it is made of, and the dense matrix as a function of that."""
    generator = torch.Generator().manual_seed(0)
    net = network()
    x = torch.randn(*x_batch, n, 3, dtype=torch.float64, generator=generator)
    variances = torch.rand(*variance_batch, 1, 1, dtype=torch.float64, generator=generator) + 0.5
    size = 1 if constant else n
    noise = torch.rand(*noise_batch, size, dtype=torch.float64, generator=generator) + 0.1
    if requires_grad:
        variances.requires_grad_()
        noise.requires_grad_()
    batch = torch.broadcast_shapes(x_batch, variance_batch, noise_batch)
    diagonal = (
        ConstantDiagLinearOperator(noise.expand(*batch, 1), diag_shape=n)
        if constant
        else DiagLinearOperator(noise.expand(*batch, n))
    )
    linearization = Linearization(FrozenNetwork(net))
    operator = NTKLinearOperator(x, x, variances, linearization=linearization).expand(*batch, n, n) + diagonal
    jacobian = references.jacobian(net, x)

    def dense() -> Tensor:
        return (variances * (jacobian @ jacobian.mT) + torch.diag_embed(noise.expand(*batch, n))).expand(*batch, n, n)

    return operator, (variances, noise), dense


BATCHES = [
    {},
    {"x_batch": (3,)},
    pytest.param({"variance_batch": (3,)}, marks=pytest.mark.thorough),
    {"noise_batch": (3,)},
    pytest.param({"x_batch": (2, 1), "noise_batch": (3,)}, marks=pytest.mark.thorough),
    {"x_batch": (2, 3), "variance_batch": (2, 1), "noise_batch": (3,)},
]


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("constant", [True, False])
class TestExact:
    @pytest.mark.parametrize("rhs_batch", [(), (2, 3), (4, 2, 3)])
    def test_solve(self, n, batches, constant, rhs_batch):
        operator, leaves, dense = make(n, constant=constant, **batches)
        assert isinstance(operator, NTKAddedDiagLinearOperator)
        rhs = torch.randn(*rhs_batch, n, 2, dtype=torch.float64).requires_grad_()
        try:
            torch.broadcast_shapes(rhs_batch, operator.batch_shape)
        except RuntimeError:
            pytest.skip("batches that do not broadcast")
        solution, expected = operator.solve(rhs), torch.linalg.solve(dense(), rhs)
        assert_close(solution, expected)
        left = torch.randn_like(solution)
        inputs = (rhs, *leaves)
        actual_grads = torch.autograd.grad((solution * left).sum(), inputs)
        expected_grads = torch.autograd.grad((expected * left).sum(), inputs)
        for a, b in zip(actual_grads, expected_grads, strict=True):
            assert_close(a, b)

    @pytest.mark.parametrize("reduce", [True, False])
    def test_inverse_quadratic_forms_and_log_determinants(self, n, batches, constant, reduce):
        operator, leaves, dense = make(n, constant=constant, **batches)
        rhs = torch.randn(*operator.batch_shape, n, 2, dtype=torch.float64).requires_grad_()
        inv_quad, logdet = operator.inv_quad_logdet(rhs, logdet=True, reduce_inv_quad=reduce)
        matrix = dense()
        expected = (rhs * torch.linalg.solve(matrix, rhs)).sum(-2)
        expected = expected.sum(-1) if reduce else expected
        assert_close(inv_quad, expected)
        assert_close(logdet, matrix.logdet())
        inputs = (rhs, *leaves)
        actual_grads = torch.autograd.grad(inv_quad.sin().sum() + logdet.cos().sum(), inputs)
        expected_grads = torch.autograd.grad(expected.sin().sum() + matrix.logdet().cos().sum(), inputs)
        for a, b in zip(actual_grads, expected_grads, strict=True):
            assert_close(a, b, 1e-7)

    def test_one_of_both(self, n, batches, constant):
        operator, _, dense = make(n, constant=constant, requires_grad=False, **batches)
        assert_close(operator.logdet(), dense().logdet())
        rhs = torch.randn(n, dtype=torch.float64)
        assert_close(
            operator.inv_quad(rhs.expand(*operator.batch_shape, n).unsqueeze(-1)),
            (rhs * torch.linalg.solve(dense(), rhs.unsqueeze(-1)).squeeze(-1)).sum(-1),
        )


class TestWhatItBecomes:
    def test_more_noise(self):
        operator, _, dense = make(SMALL)
        more = operator + DiagLinearOperator(torch.full((SMALL,), 0.3, dtype=torch.float64))
        assert isinstance(more, NTKAddedDiagLinearOperator)
        identity = torch.eye(SMALL, dtype=torch.float64)
        assert_close(more.to_dense(), dense() + 0.3 * identity)
        assert_close(operator.add_jitter(0.2).to_dense(), dense() + 0.2 * identity)
        assert_close(operator.add_jitter(0.2).logdet(), (dense() + 0.2 * identity).logdet())

    def test_another_matrix_added(self):
        operator, _, dense = make(SMALL)
        root = torch.randn(SMALL, 2, dtype=torch.float64)
        total = operator + DenseLinearOperator(root @ root.mT)
        assert isinstance(total, NTKSumAddedDiagLinearOperator)
        matrix = dense() + root @ root.mT
        rhs = torch.randn(SMALL, 2, dtype=torch.float64)
        assert_close(total.to_dense(), matrix)
        assert_close(total.solve(rhs), torch.linalg.solve(matrix, rhs))
        assert_close(total.logdet(), matrix.logdet())

    def test_multiples(self):
        operator, _, dense = make(SMALL)
        for multiple in (operator * 2.0, operator.mul(torch.tensor(2.0, dtype=torch.float64))):
            assert_close(multiple.to_dense(), 2 * dense())
            rhs = torch.randn(SMALL, 2, dtype=torch.float64)
            assert_close(multiple.solve(rhs), torch.linalg.solve(2 * dense(), rhs))

    def test_without_noise_it_is_still_solved(self):
        """Past the sizes that GPyTorch factorises, where K is invertible."""
        net = network(inputs=100, width=30)
        x = torch.randn(850, 100, dtype=torch.float64)
        scale = torch.ones(1, 1, dtype=torch.float64)
        kernel_matrix = NTKLinearOperator(x, x, scale, linearization=Linearization(FrozenNetwork(net)))
        total = kernel_matrix + DiagLinearOperator(torch.zeros(850, dtype=torch.float64))
        matrix = references.kernel(net, x)
        rhs = torch.randn(850, 2, dtype=torch.float64)
        assert_close(total.solve(rhs), torch.linalg.solve(matrix, rhs), 1e-7)
        assert_close(total.logdet(), matrix.logdet())


def test_right_hand_sides_are_checked():
    operator, _, _ = make(SMALL)
    with pytest.raises(ValueError, match="NaN or infinite"):
        operator.solve(torch.full((SMALL, 1), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="no training data"):
        operator.inv_quad_logdet(torch.zeros(0, 1, dtype=torch.float64), logdet=True)


def test_equal_operators_share_one_solver():
    operator, _, _ = make(LARGE, requires_grad=False)
    rhs = torch.randn(LARGE, 1, dtype=torch.float64)
    operator.solve(rhs)
    again = operator._linear_op + DiagLinearOperator(operator._diag_tensor._diag.clone())
    assert again.solver is operator.solver
    other = operator._linear_op + DiagLinearOperator(operator._diag_tensor._diag + 1e-12)
    assert other.solver is not operator.solver
    assert Size(operator.shape) == (LARGE, LARGE)
