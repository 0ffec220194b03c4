import copy
import pickle
import unittest

import pytest
import torch
from linear_operator.test.linear_operator_test_case import LinearOperatorTestCase, RectangularLinearOperatorTestCase
from torch import nn

from ntk_gp import NTKKernel, NTKLinearOperator
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from tests import references


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def layer_of(name: str) -> str:
    return name.split(".")[0]


class _Suite:
    """An operator on a small network, against its Jacobian written out by autograd."""

    seed = 0
    should_test_sample = True
    should_call_lanczos = False
    outputs = 1
    x_shape: tuple[int, ...] = (5, 4)
    x2_shape: tuple[int, ...] | None = None  # square if None
    variances_shape: tuple[int, ...] = (1, 1)

    def create_linear_op(self) -> NTKLinearOperator:
        self.network = make_network(self.outputs)
        network = FrozenNetwork(
            self.network,
            output="all" if self.outputs > 1 else None,
            group_by=layer_of if self.variances_shape[-1] > 1 else None,
        )
        # far apart, so that the matrix is well conditioned
        x1 = (3 * torch.randn(self.x_shape)).requires_grad_()
        x2 = x1 if self.x2_shape is None else (3 * torch.randn(self.x2_shape)).requires_grad_()
        variances = (torch.rand(self.variances_shape) + 0.5).requires_grad_()
        return NTKLinearOperator(x1, x2, variances, linearization=Linearization(network))

    def evaluate_linear_op(self, linear_op: NTKLinearOperator) -> torch.Tensor:
        x1, x2, variances = linear_op.representation()
        network = copy.deepcopy(self.network).to(x1.dtype)
        if variances.shape[-1] > 1:
            sizes = [sum(p.numel() for p in network[layer].parameters()) for layer in (0, 2)]
            variances = variances.repeat_interleave(torch.tensor(sizes), dim=-1)
        return (references.jacobian(network, x1) * variances) @ references.jacobian(network, x2).mT


class TestNTKLinearOperator(_Suite, LinearOperatorTestCase, unittest.TestCase):
    pass


@pytest.mark.thorough
class TestNTKLinearOperatorBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (3, 5, 4)


class TestNTKLinearOperatorMultiBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (2, 3, 5, 4)
    variances_shape = (2, 1, 1, 1)
    skip_slq_tests = True  # as upstream's own multi-batch cases


@pytest.mark.thorough
class TestNTKLinearOperatorGroups(_Suite, LinearOperatorTestCase, unittest.TestCase):
    variances_shape = (1, 2)


class TestNTKLinearOperatorGroupsBatch(_Suite, LinearOperatorTestCase, unittest.TestCase):
    x_shape = (5, 4)
    variances_shape = (3, 1, 2)


class TestNTKLinearOperatorMultiOutput(_Suite, LinearOperatorTestCase, unittest.TestCase):
    outputs = 3
    x_shape = (3, 4)


@pytest.mark.thorough
class TestNTKLinearOperatorRectangular(_Suite, RectangularLinearOperatorTestCase, unittest.TestCase):
    x2_shape = (4, 4)


class TestNTKLinearOperatorRectangularBroadcast(_Suite, RectangularLinearOperatorTestCase, unittest.TestCase):
    x_shape = (3, 1, 5, 4)
    x2_shape = (2, 4, 4)


class TestNTKLinearOperatorRectangularMultiOutput(_Suite, RectangularLinearOperatorTestCase, unittest.TestCase):
    outputs = 2
    x_shape = (3, 2, 4)
    x2_shape = (3, 4, 4)


class TestStates:
    """What a matrix says of the network that it was bound to, and what is kept of it."""

    @staticmethod
    def matrix_and_kernel() -> tuple[NTKLinearOperator, NTKKernel, torch.Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        kernel, x = NTKKernel(network), torch.randn(6, 3, dtype=torch.float64)
        return kernel(x).evaluate_kernel(), kernel, x

    def test_a_matrix_and_what_is_made_of_it_are_of_one_state(self):
        matrix, kernel, _ = self.matrix_and_kernel()
        state = kernel.network.fingerprint()
        for other in (matrix, matrix[:3, :3], matrix * 2.0, matrix.mT, matrix.representation_tree()(*matrix._args)):
            assert other.network_state == state
        double(kernel)
        assert matrix.network_state == state != kernel.network.fingerprint()

    def test_copies_look_for_themselves(self):
        matrix, _, _ = self.matrix_and_kernel()
        for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
            assert other._function is None
            torch.testing.assert_close(other.to_dense(), matrix.to_dense())

    def test_a_matrix_of_an_earlier_state_leaves_nothing_to_the_next(self):
        matrix, kernel, x = self.matrix_and_kernel()
        matrix.diagonal()  # it has its Jacobians from now on
        double(kernel)
        matrix.to_dense()
        fresh = NTKKernel(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double())
        fresh.network.load_state_dict(kernel.network.state_dict())
        torch.testing.assert_close(kernel(x).to_dense(), fresh(x).to_dense(), rtol=1e-12, atol=1e-13)


def double(kernel: NTKKernel) -> None:
    kernel.network.load_state_dict({name: 2 * tensor for name, tensor in kernel.network.state_dict().items()})
