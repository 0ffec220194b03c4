import copy
import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import RectangularLinearOperatorTestCase
from torch import nn

from ntk_gp import JacobianLinearOperator, NTKKernel
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from tests import references


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, outputs))


def make_operator(network: nn.Module, x: torch.Tensor, transposed: bool = False) -> JacobianLinearOperator:
    output = "all" if network[-1].out_features > 1 else None
    linearization = Linearization(FrozenNetwork(network, output=output))
    return JacobianLinearOperator(x, linearization=linearization, transposed=transposed)


class Times(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class _Suite(RectangularLinearOperatorTestCase):
    """The Jacobian of a small network, against the one written out by autograd."""

    seed = 0
    outputs = 1
    x_shape: tuple[int, ...] = (5, 2)
    transposed = False

    def create_linear_op(self) -> JacobianLinearOperator:
        self.network = make_network(self.outputs)
        return make_operator(self.network, torch.randn(self.x_shape, requires_grad=True), self.transposed)

    def evaluate_linear_op(self, linear_op: JacobianLinearOperator) -> torch.Tensor:
        (x,) = linear_op.representation()
        jacobian = references.jacobian(copy.deepcopy(self.network).to(x.dtype), x)
        return jacobian.mT if self.transposed else jacobian


@pytest.mark.thorough
class TestJacobianLinearOperator(_Suite, unittest.TestCase):
    pass


class TestJacobianLinearOperatorTransposed(_Suite, unittest.TestCase):
    transposed = True


@pytest.mark.thorough
class TestJacobianLinearOperatorBatch(_Suite, unittest.TestCase):
    x_shape = (3, 5, 2)


class TestJacobianLinearOperatorMultiBatchTransposed(_Suite, unittest.TestCase):
    x_shape = (2, 3, 5, 2)
    transposed = True


@pytest.mark.thorough
class TestJacobianLinearOperatorMultiOutput(_Suite, unittest.TestCase):
    outputs = 3
    x_shape = (4, 2)


class TestJacobianLinearOperatorMultiOutputBatchTransposed(_Suite, unittest.TestCase):
    outputs = 2
    x_shape = (3, 3, 2)
    transposed = True


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 3)])
def test_products_equal_the_explicit_jacobian(outputs, batch_shape):
    network = make_network(outputs).double()
    x = torch.randn(*batch_shape, 5, 2, dtype=torch.float64)
    operator, expected = make_operator(network, x), references.jacobian(network, x)
    u = torch.randn(*batch_shape, operator.shape[-1], 7, dtype=torch.float64)
    v = torch.randn(*batch_shape, operator.shape[-2], 7, dtype=torch.float64)
    torch.testing.assert_close(operator @ u, expected @ u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.mT @ v, expected.mT @ v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_a_last_layer_is_what_it_is_given_and_the_caller_owns_the_copy(bias, factor):
    """Where its output is the network's, J is the layer's inputs, which are kept as they are."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1, bias=bias), Times(factor)).double()
    x = torch.randn(5, 2, dtype=torch.float64)
    kernel = NTKKernel(network, parameters="last_layer")
    expected = references.jacobian(network, x, list(network[2].parameters()))
    for _ in range(2):
        dense = kernel.jacobian(x).to_dense()
        torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(kernel(x).to_dense(), expected @ expected.mT, rtol=1e-12, atol=1e-12)
        dense.zero_()


def test_shape_and_dtype():
    operator = make_operator(make_network(3), torch.randn(2, 5, 2))
    assert operator.shape == (2, 15, 21)
    assert operator.mT.shape == (2, 21, 15)
    assert operator.double().dtype == torch.float64
    assert (operator.double() @ torch.zeros(21, 1, dtype=torch.float64)).dtype == torch.float64
