"""Structured matrices with a neural tangent kernel in them: upstream's own suites."""

import unittest

import pytest
import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    ConstantDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    InterpolatedLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
)
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase
from torch import Tensor

from ntk_gp import NTKLinearOperator
from ntk_gp.bridge.exactly_solved import exactly_solved
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.operators.ntk_block_linear_operators import NTKBlockDiagLinearOperator, NTKBlockInterleavedLinearOperator
from ntk_gp.operators.ntk_interpolated_linear_operator import NTKInterpolatedLinearOperator
from ntk_gp.operators.ntk_kronecker_linear_operator import NTKKroneckerLinearOperator
from tests import references
from tests.adapted import network

# Its parts are tested with either engine: NTKLinearOperator, and the solvers by their contract.
pytestmark = pytest.mark.engine_independent


class _Suite:
    seed = 0
    should_call_cg = False
    should_call_cholesky = False
    should_call_lanczos = False
    batch: tuple[int, ...] = ()

    def kernel_matrix(self, n: int) -> NTKLinearOperator:
        x = (2 * torch.randn(*self.batch, n, 3)).requires_grad_()
        variances = (torch.rand(1, 1) + 0.5).requires_grad_()
        return NTKLinearOperator(x, x, variances, linearization=Linearization(FrozenNetwork(network())))

    def dense(self, x1: Tensor, x2: Tensor, variances: Tensor) -> Tensor:
        net = network().to(x1.dtype)
        return (references.jacobian(net, x1) * variances) @ references.jacobian(net, x2).mT


class TestKronecker(_Suite, LinearOperatorTestCase, unittest.TestCase):
    def create_linear_op(self) -> LinearOperator:
        root = torch.randn(*self.batch, 2, 2)
        task = (root @ root.mT + torch.eye(2)).requires_grad_()
        noise = (torch.rand(*self.batch, 1) + 0.5).requires_grad_()
        product = KroneckerProductLinearOperator(self.kernel_matrix(4), DenseLinearOperator(task))
        operator = exactly_solved(product + ConstantDiagLinearOperator(noise, diag_shape=8))
        assert isinstance(operator, NTKKroneckerLinearOperator)
        return operator

    def evaluate_linear_op(self, linear_op) -> Tensor:
        x1, x2, variances, task, noise = linear_op.representation()
        kernel = self.dense(x1, x2, variances)
        product = (kernel[..., :, None, :, None] * task[..., None, :, None, :]).flatten(-4, -3).flatten(-2)
        return product + torch.diag_embed(noise.expand(*self.batch, 8))


@pytest.mark.thorough
class TestKroneckerBatch(TestKronecker):
    batch = (3,)


class TestBlockDiagonal(_Suite, LinearOperatorTestCase, unittest.TestCase):
    batch = (3,)
    kind = BlockDiagLinearOperator
    becomes = NTKBlockDiagLinearOperator

    def create_linear_op(self) -> LinearOperator:
        noise = (torch.rand(9) + 0.5).requires_grad_()
        operator = exactly_solved(self.kind(self.kernel_matrix(3)) + DiagLinearOperator(noise))
        assert isinstance(operator, self.becomes)
        return operator

    def evaluate_linear_op(self, linear_op) -> Tensor:
        x1, x2, variances, noise = linear_op.representation()
        return self.arranged(self.dense(x1, x2, variances) + torch.diag_embed(noise))

    def arranged(self, blocks: Tensor) -> Tensor:
        return torch.block_diag(*blocks)


class TestBlockInterleaved(TestBlockDiagonal):
    kind = BlockInterleavedLinearOperator
    becomes = NTKBlockInterleavedLinearOperator

    def arranged(self, blocks: Tensor) -> Tensor:
        order = torch.arange(9).reshape(3, 3).mT.reshape(-1)
        return torch.block_diag(*blocks)[order][:, order]


class TestInterpolated(_Suite, LinearOperatorTestCase, unittest.TestCase):
    @unittest.expectedFailure
    def test_bilinear_derivative(self):
        """Upstream's derivative of an interpolation has zeros for its indices, where autograd has nothing."""
        super().test_bilinear_derivative()

    def create_linear_op(self) -> LinearOperator:
        indices, values = torch.randint(2, (9, 2)), torch.rand(9, 2).requires_grad_()
        kernel = InterpolatedLinearOperator(self.kernel_matrix(2), indices, values, indices, values)
        operator = exactly_solved(kernel + DiagLinearOperator((torch.rand(9) + 0.5).requires_grad_()))
        assert isinstance(operator, NTKInterpolatedLinearOperator)
        return operator

    def evaluate_linear_op(self, linear_op) -> Tensor:
        x1, x2, variances, *sides, noise = linear_op.representation()
        left, right = (
            torch.zeros(9, 2, dtype=values.dtype).scatter_add(1, indices, values)
            for indices, values in (sides[:2], sides[2:])
        )
        return left @ self.dense(x1, x2, variances) @ right.mT + noise.diag()
