"""The derivatives of log p(y | f), against autograd's in float64 and arithmetic of many digits."""

import math

import gpytorch
import numpy as np
import pytest
import torch

from ntk_gp.classification.log_densities import ProbitDensity, SoftmaxDensity, log_density

from .problems import CLASSES, LIKELIHOODS, likelihood_of, log_likelihood

pytestmark = pytest.mark.engine_independent


@pytest.fixture(params=LIKELIHOODS)
def name(request):
    return request.param


def latent(name: str, n: int = 6) -> torch.Tensor:
    return 2 * torch.randn(n, CLASSES if name == "softmax" else 1, dtype=torch.float64)


def density(name: str, n: int = 6):
    return log_density(likelihood_of(name), torch.arange(n) % (CLASSES if name == "softmax" else 2))


def test_value_and_gradient(name):
    f, p = latent(name), density(name)
    torch.testing.assert_close(p.value(f), log_likelihood(name, f, p.labels), rtol=1e-12, atol=0)
    expected = torch.func.grad(lambda f: log_likelihood(name, f, p.labels))(f)
    torch.testing.assert_close(p.gradient(f), expected, rtol=1e-11, atol=1e-13)


def hessians(name: str, f: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each point, (n, C, C)."""
    whole = -torch.func.hessian(lambda f: log_likelihood(name, f, labels))(f)
    return whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def test_curvature_and_its_derivative(name):
    f, p = latent(name), density(name)
    root = p.curvature_root(f)
    assert root.shape[-1] == p.rank == max(1, p.num_outputs - 1)
    torch.testing.assert_close(root @ root.mT, hessians(name, f, p.labels), rtol=1e-10, atol=1e-12)
    covariance = torch.randn(*f.shape, f.shape[-1], dtype=f.dtype)
    covariance = covariance @ covariance.mT
    expected = torch.func.grad(lambda f: (covariance * hessians(name, f, p.labels)).sum())(f)
    torch.testing.assert_close(p.curvature_trace_gradient(f, covariance), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("margin", [40.0, 300.0])
def test_certain_classes_keep_their_digits(margin):
    """1 − p, as small as e^{-300}: with two classes its gradient and curvature are known in closed form."""
    f, p = torch.tensor([[margin, 0.0]], dtype=torch.float64), SoftmaxDensity(torch.tensor([0]), 2)
    torch.testing.assert_close(p.gradient(f)[0, 0].item(), math.exp(-margin), rtol=1e-12, atol=0)
    root = p.curvature_root(f)[0, :, 0]
    torch.testing.assert_close(root.square(), torch.full_like(root, math.exp(-margin)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("z", [-5.0, -19.9, -20.1, -1e4])
def test_probit_far_from_its_label(z):
    """With x = −z, Φ(z) / N(z) is the integral of e^{−xt − t²/2} over t > 0, and what ρ exceeds x by the mean of t."""
    nodes, weights = np.polynomial.laguerre.laggauss(60)
    weights = weights * np.exp(-((nodes / z) ** 2) / 2)
    ratio = -z / weights.sum()
    excess = (weights * nodes / z**2).sum() * ratio
    f, p = torch.tensor([[z]], dtype=torch.float64), ProbitDensity(torch.tensor([1]))
    torch.testing.assert_close(p.gradient(f).item(), ratio, rtol=1e-13, atol=0)
    curvature = p.curvature_root(f).square().item()
    torch.testing.assert_close(curvature, ratio * excess, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3]), "got 3 in row 2"),
        (torch.tensor([0, -1, 2]), "got -1 in row 1"),
        (torch.tensor([0.0, 0.5, 1.0]), "got 0.5 in row 1"),
        (torch.tensor([0.0, float("nan"), 1.0]), "got nan in row 1"),
        (torch.eye(3), "argmax"),
    ],
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(ValueError, match=message):
        log_density(likelihood_of("softmax"), labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_labels_of_any_dtype(dtype):
    assert log_density(likelihood_of("logistic"), torch.tensor([0, 1]).to(dtype)).labels.tolist() == [0, 1]


def test_likelihoods_that_are_not_served():
    with pytest.raises(TypeError, match="mixing_weights=False"):
        log_density(gpytorch.likelihoods.SoftmaxLikelihood(num_classes=3, num_features=3), torch.tensor([0]))
    with pytest.raises(TypeError, match="got GaussianLikelihood"):
        log_density(gpytorch.likelihoods.GaussianLikelihood(), torch.tensor([0]))


class TestLogisticLikelihood:
    """GPyTorch's own interface of the likelihood that is added."""

    def test_marginal_probability(self):
        mean, variance = torch.tensor([0.3, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
        grid = torch.linspace(-30, 30, 200001).double()
        density = torch.distributions.Normal(mean[:, None], variance.sqrt()[:, None]).log_prob(grid).exp()
        expected = torch.trapezoid(density * torch.sigmoid(grid), grid)
        prior = gpytorch.distributions.MultivariateNormal(mean, variance.diag())
        likelihood = likelihood_of("logistic")
        torch.testing.assert_close(likelihood(prior).probs, expected, rtol=1e-5, atol=0)  # what 20 nodes give
        expected = torch.trapezoid(density * torch.nn.functional.logsigmoid(-grid), grid)
        found = likelihood.expected_log_prob(torch.zeros(2), prior)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        found = likelihood.log_marginal(torch.ones(2).double(), prior)
        torch.testing.assert_close(found, likelihood(prior).probs.log())
