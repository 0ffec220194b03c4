"""Kernels made of neural tangent kernels: dtype, device and gradients of their matrices."""

import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ProductKernel, RBFKernel, ScaleKernel
from torch import nn

from ntk_gp import NTKKernel
from tests import references
from tests.adapted import assert_close


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))


def ntk() -> Kernel:
    return NTKKernel(make_network())


COMPOSITES = {
    "plain": ntk,
    "scaled": lambda: ScaleKernel(ntk()),
    "sum": lambda: ntk() + ntk(),
    "product": lambda: ntk() * ntk(),
    "additive": lambda: AdditiveKernel(ntk(), ntk(), ntk()),
    "nested": lambda: AdditiveKernel(ProductKernel(ntk(), ntk()), ntk() + ntk()),
    "nested twice": lambda: ProductKernel(AdditiveKernel(ntk() * ntk(), ntk()), ntk()),
    "scaled sum": lambda: ScaleKernel(ntk() + ntk()) * ntk(),
}
each_composite = pytest.mark.parametrize("name", COMPOSITES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@each_composite
@each_dtype
@pytest.mark.parametrize("converted", [False, True])
def test_dtype_is_that_of_the_inputs(name, dtype, converted):
    kernel = COMPOSITES[name]()
    kernel = kernel.to(dtype) if converted else kernel
    x = torch.randn(5, 3, dtype=dtype)
    matrix = kernel(x)
    assert (matrix.dtype, matrix.device) == (dtype, x.device)
    assert matrix.to_dense().dtype == matrix.evaluate_kernel().dtype == matrix.diagonal().dtype == dtype
    assert matrix[1:3, :2].dtype == kernel(x, x[:2]).dtype == dtype
    distribution = MultivariateNormal(torch.zeros(5, dtype=dtype), matrix)
    torch.manual_seed(1)
    assert distribution.rsample(torch.Size([3])).dtype == dtype
    assert distribution.variance.dtype == distribution.log_prob(torch.zeros(5, dtype=dtype)).dtype == dtype


@each_composite
def test_kernels_have_the_dtype_and_device_of_their_network(name):
    kernel = COMPOSITES[name]()
    assert (kernel.dtype, kernel.device) == (torch.float32, torch.device("cpu"))
    assert (kernel.double().dtype, kernel.device) == (torch.float64, torch.device("cpu"))
    assert kernel.to("meta").device == torch.device("meta")


@each_composite
def test_gradients_are_those_of_where_it_was_formed(name):
    kernel, x = COMPOSITES[name](), torch.randn(5, 3, requires_grad=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            matrices = [kernel(x), kernel(x, x[:3]), kernel(x).evaluate_kernel()]
        for matrix in matrices:
            assert matrix.to_dense().requires_grad == enabled
            assert (matrix @ torch.ones(matrix.shape[-1], 1)).requires_grad == enabled
        assert matrices[0].diagonal().requires_grad == enabled


def test_gradients_in_the_inputs_are_right():
    kernel = COMPOSITES["nested"]().double()
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    network = make_network().double()

    def explicit(x: torch.Tensor) -> torch.Tensor:
        gram = references.kernel(network, x)
        return (gram * gram + 2 * gram).square().sum()

    (expected,) = torch.autograd.grad(explicit(x), x)
    (found,) = torch.autograd.grad(kernel(x).to_dense().square().sum(), x)
    assert_close(found, expected)


@each_dtype
def test_kernels_without_one_are_gpytorchs(dtype):
    x = torch.randn(4, 3, dtype=dtype)
    kernel = ScaleKernel(RBFKernel() + MaternKernel())
    assert kernel(x).dtype == kernel.dtype == torch.float32
    assert AdditiveKernel().dtype == torch.get_default_dtype()
    assert AdditiveKernel().device is None


class OfThree(RBFKernel):
    """A batch of three, as its class says."""

    @property
    def batch_shape(self) -> torch.Size:
        return torch.Size([3])


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (RBFKernel() + ScaleKernel(MaternKernel()), ()),
        (ScaleKernel(RBFKernel(batch_shape=torch.Size([2])) * RBFKernel()), (2,)),
        (ScaleKernel(RBFKernel(batch_shape=torch.Size([2])), batch_shape=torch.Size([2])), (2,)),
        (ScaleKernel(RBFKernel() + ScaleKernel(OfThree())), (3,)),
        (RBFKernel(batch_shape=torch.Size([2, 1])) + OfThree(), (2, 3)),
    ],
)
def test_batch_shapes_are_broadcast(kernel, expected):
    assert kernel.batch_shape == torch.Size(expected)
