"""Kernels divided by their mean diagonal."""

from __future__ import annotations

import copy
import pickle

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from torch import Size, Tensor, nn

from ntk_gp import NTKKernel
from tests import references
from tests.in_threads import in_threads

pytestmark = pytest.mark.engine_independent


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("groups", [None, "layer"])
def test_mean_diagonal_is_one_at_the_first_inputs_and_the_constant_stays(outputs, groups):
    network, x, z = make_network(outputs), randn(6, 3), 3 * randn(4, 3)
    kernel = NTKKernel(network, output="all", normalize=True, variance_groups=groups)
    if groups is not None:
        kernel.variance = torch.ones(1, 2, dtype=torch.float64)
    assert torch.isnan(kernel.normalization.value)
    constant = references.kernel(network, x).diagonal().mean()
    assert_close(kernel(x).to_dense(), references.kernel(network, x) / constant)
    assert_close(kernel(z, x).to_dense(), references.kernel(network, z, x) / constant)
    assert_close(kernel(z, diag=True), references.kernel(network, z).diagonal() / constant)
    assert_close(kernel.normalization.value, constant)


def test_constant_is_of_variances_of_one_and_has_no_derivative():
    network, x = make_network(), randn(5, 3)
    kernel = NTKKernel(network, normalize=True, variance_groups="layer")
    kernel.variance = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    mean = references.kernel(network, x).diagonal().mean()
    weights = torch.tensor([2.0] * 32 + [0.5] * 9, dtype=torch.float64)
    expected = references.kernel(network, x, variances=weights) / mean
    assert_close(kernel(x).to_dense(), expected)
    total = kernel(x).to_dense().sum()
    gradient = torch.autograd.grad(total, kernel.raw_variance)[0]
    slopes = torch.autograd.grad((kernel.variance * torch.eye(2, dtype=torch.float64)).sum(), kernel.raw_variance)[0]
    jacobian = references.jacobian(network, x)
    sums = torch.stack([part.sum(0).square().sum() for part in jacobian.split([32, 9], dim=-1)])
    assert_close(gradient, sums / mean * slopes, 1e-10)


def test_a_number_is_the_constant():
    network, x = make_network(), randn(5, 3)
    assert_close(NTKKernel(network, normalize=4.0)(x).to_dense(), references.kernel(network, x) / 4)


@pytest.mark.parametrize("normalize", [0.0, -1.0, float("nan"), float("inf"), "yes", None])
def test_other_numbers_are_refused(normalize):
    with pytest.raises(ValueError, match="normalize must be"):
        NTKKernel(make_network(), normalize=normalize)


def test_is_part_of_the_state():
    network, x, z = make_network(), randn(5, 3), 2 * randn(4, 3)
    kernel = NTKKernel(network, normalize=True)
    expected = kernel(x).to_dense()
    for copied in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
        copied(z).to_dense()
        assert_close(copied(x).to_dense(), expected)
    other = NTKKernel(network, normalize=True)
    other(z).to_dense()
    other.load_state_dict(kernel.state_dict())
    assert_close(other(x).to_dense(), expected)
    before = NTKKernel(network, normalize=True)
    before.load_state_dict(NTKKernel(network, normalize=True).state_dict())
    assert torch.isnan(before.normalization.value)
    assert_close(before(x).to_dense(), expected)
    assert "normalization.value" not in NTKKernel(network).state_dict()


def test_copies_are_independent():
    network, x, z = make_network(), randn(5, 3), 2 * randn(4, 3)
    kernel = NTKKernel(network, normalize=True)
    copied = copy.deepcopy(kernel)
    kernel(x).to_dense()
    copied(z).to_dense()
    assert kernel.normalization.value != copied.normalization.value


def test_kernels_of_some_batches_have_the_constant_of_all():
    network, x, z = make_network(), randn(5, 3), 2 * randn(4, 3)
    kernel = NTKKernel(network, normalize=True, batch_shape=Size([2]))
    kernel[0](x).to_dense()
    assert_close(kernel.normalization.value, references.kernel(network, x).diagonal().mean())
    kernel(z).to_dense()
    assert_close(kernel.normalization.value, references.kernel(network, x).diagonal().mean())


def test_other_inputs_and_another_network():
    network, x, z = make_network(), randn(5, 3), 2 * randn(4, 3)
    kernel = NTKKernel(network, normalize=True)
    kernel(x).to_dense()
    kernel.normalize_at(z)
    assert_close(kernel(z).to_dense().diagonal().mean(), torch.ones((), dtype=torch.float64))
    kernel.linearize(make_network())
    assert_close(kernel(x).to_dense().diagonal().mean(), torch.ones((), dtype=torch.float64))
    given = NTKKernel(network, normalize=4.0)
    given.linearize(network)
    assert given.normalization.value == 4.0
    with pytest.raises(RuntimeError, match="normalize=True"):
        NTKKernel(network).normalize_at(x)


def test_no_inputs_settle_nothing():
    kernel = NTKKernel(make_network(), normalize=True)
    assert kernel(randn(0, 3), randn(2, 3)).to_dense().shape == (0, 2)
    assert torch.isnan(kernel.normalization.value)


def test_a_mean_of_zero_is_refused():
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    with pytest.raises(ValueError, match="mean diagonal"):
        NTKKernel(network, normalize=True)(torch.zeros(4, 3, dtype=torch.float64)).to_dense()


def test_under_inference_mode_and_in_single_precision():
    network, x = make_network(), randn(5, 3)
    with torch.inference_mode():
        kernel = NTKKernel(network.float(), normalize=True)
        kernel(x.float()).to_dense()
    kernel = kernel.double()
    assert kernel.normalization.value.dtype == torch.float64
    expected = references.kernel(network.double(), x)
    assert_close(kernel(x).to_dense(), expected / expected.diagonal().mean(), 1e-5)


def test_threads_settle_one_constant():
    network = make_network()
    inputs = [randn(5, 3) for _ in range(4)]
    kernel, found = NTKKernel(network, normalize=True), [0.0] * 4

    def work(number: int) -> None:
        matrix = kernel(inputs[number]).to_dense().detach()
        found[number] = float(references_of[number].trace() / matrix.trace())

    references_of = [references.kernel(network, x) for x in inputs]
    in_threads(work)
    assert max(found) - min(found) < 1e-9


def test_predictions_are_those_with_the_outputscale_divided():
    network, x, y, z = make_network(), randn(12, 3), randn(12), randn(4, 3)

    class Model(gpytorch.models.ExactGP):
        def __init__(self, kernel: gpytorch.kernels.Kernel):
            super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), ScaleKernel(kernel)

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    kernel = NTKKernel(network, normalize=True)
    kernel.normalize_at(x)
    model = Model(kernel).double().eval()
    scale = model.covar_module.outputscale / references.kernel(network, x).diagonal().mean()
    both = torch.cat([x, z])
    prior = (scale * references.kernel(network, both)).detach()
    mean, covariance = references.posterior(torch.zeros(16).double(), prior, model.likelihood.noise.detach(), y)
    with torch.no_grad():
        assert_close(model(z).mean, mean, 1e-10)
        assert_close(model(z).covariance_matrix, covariance, 1e-10)
