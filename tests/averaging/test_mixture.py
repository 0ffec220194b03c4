"""Mixtures against torch's own, point by point, and their samples."""

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ntk_gp.averaging import Mixture

pytestmark = pytest.mark.engine_independent
S, N = 5, 4


def components(
    requires_grad: bool = False,
) -> tuple[torch.Tensor, list[MultivariateNormal], torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    weights = torch.rand(S, dtype=torch.float64).softmax(0)
    means = (3 * torch.randn(S, N, dtype=torch.float64)).requires_grad_(requires_grad)
    roots = torch.randn(S, N, N, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.1 * torch.eye(N, dtype=torch.float64)
    return weights, [MultivariateNormal(m, c) for m, c in zip(means, covariances, strict=True)], means, covariances


def reference(weights, means, covariances) -> MixtureSameFamily:
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    parts = Normal(means.mT, variances.sqrt().mT)
    return MixtureSameFamily(Categorical(weights.expand(N, S)), parts)


def test_moments_density_and_cdf():
    weights, parts, means, covariances = components()
    mixture, expected = Mixture(weights, parts), reference(weights, means, covariances)
    value = 4 * torch.randn(7, N, dtype=torch.float64)
    torch.testing.assert_close(mixture.mean, expected.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.variance, expected.variance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.stddev, expected.stddev, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.log_prob(value), expected.log_prob(value), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixture.cdf(value), expected.cdf(value), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mixture.log_prob(value[0]), expected.log_prob(value[0]), rtol=1e-11, atol=1e-11)


def test_covariance_is_that_of_samples_in_the_limit():
    """E[x xᵀ] - E[x] E[x]ᵀ, written out over components."""
    weights, parts, means, covariances = components()
    second = sum(w * (c + torch.outer(m, m)) for w, m, c in zip(weights, means, covariances, strict=True))
    mean = weights @ means
    mixture = Mixture(weights, parts)
    torch.testing.assert_close(mixture.covariance_matrix, second - torch.outer(mean, mean), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mixture.covariance_matrix.diagonal(), mixture.variance, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("probability", [1e-9, 0.025, 0.5, 0.975, 1 - 1e-9])
def test_quantiles_invert_the_cdf(probability):
    weights, parts, means, covariances = components()
    mixture = Mixture(weights, parts)
    quantile = mixture.quantile(probability)
    assert quantile.shape == (N,)
    cdf = reference(weights, means, covariances).cdf(quantile)
    torch.testing.assert_close(cdf, torch.full_like(cdf, probability), rtol=1e-8, atol=1e-15)


def test_quantiles_of_several_probabilities():
    weights, parts, *_ = components()
    mixture = Mixture(weights, parts)
    probabilities = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64)
    quantiles = mixture.quantile(probabilities)
    assert quantiles.shape == (1, 3, N)
    for i in range(3):
        torch.testing.assert_close(quantiles[0, i], mixture.quantile(float(probabilities[0, i])), rtol=0, atol=1e-12)
    low, high = mixture.confidence_region(0.8)
    torch.testing.assert_close(torch.stack([low, high]), quantiles[0, [0, 2]], rtol=0, atol=1e-10)
    each = mixture.icdf(torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.float64))
    torch.testing.assert_close(each[2], mixture.quantile(0.5)[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_probabilities_are_between_zero_and_one(probability):
    with pytest.raises(ValueError, match="between 0 and 1"):
        Mixture(*components()[:2]).quantile(probability)


def test_quantiles_are_differentiable():
    weights, _, means, covariances = components(requires_grad=True)

    def quantile(means):
        parts = [MultivariateNormal(m, c) for m, c in zip(means, covariances, strict=True)]
        return Mixture(weights, parts).quantile(0.3)

    assert torch.autograd.gradcheck(quantile, (means,), atol=1e-6, fast_mode=True)


def test_samples_are_joint():
    """Of 40,000 draws mean and covariance are within five standard errors, and the draws of one point alone follow its
    cdf (Kolmogorov's statistic at 1e-6: 2.7 / √n)."""
    weights, parts, *_ = components()
    mixture = Mixture(weights, parts)
    torch.manual_seed(0)
    draws = mixture.sample(torch.Size([200, 200])).reshape(-1, N)
    error = mixture.stddev / len(draws) ** 0.5
    assert ((draws.mean(0) - mixture.mean).abs() < 5 * error).all()
    products = (draws - mixture.mean).unsqueeze(-1) * (draws - mixture.mean).unsqueeze(-2)
    error = products.std(0) / len(draws) ** 0.5
    assert ((products.mean(0) - mixture.covariance_matrix).abs() < 5 * error).all()
    empirical = (torch.arange(len(draws), dtype=torch.float64) + 0.5) / len(draws)
    cdf = mixture.cdf(draws.sort(dim=0).values)
    assert (cdf - empirical.unsqueeze(-1)).abs().max() < 2.7 / len(draws) ** 0.5


def test_samples_have_gradients_within_components():
    weights, parts, means, _ = components(requires_grad=True)
    sample = Mixture(weights, parts).rsample(torch.Size([50]))
    (gradient,) = torch.autograd.grad(sample.sum(), means)
    assert gradient.sum().item() == pytest.approx(50 * N)
    assert Mixture(weights, parts).sample().shape == (N,)


def test_several_outputs():
    weights, _, _, _ = components()
    means = torch.randn(S, 3, 2, dtype=torch.float64)
    roots = torch.randn(S, 6, 6, dtype=torch.float64)
    covariances = roots @ roots.mT + torch.eye(6, dtype=torch.float64)
    parts = [MultitaskMultivariateNormal(m, c) for m, c in zip(means, covariances, strict=True)]
    mixture = Mixture(weights, parts)
    assert mixture.mean.shape == mixture.quantile(0.5).shape == (3, 2)
    flat = Mixture(weights, [MultivariateNormal(m.flatten(), c) for m, c in zip(means, covariances, strict=True)])
    torch.testing.assert_close(mixture.variance.flatten(), flat.variance, rtol=1e-12, atol=0)
    torch.testing.assert_close(mixture.covariance_matrix, flat.covariance_matrix, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.cdf(means[0]).flatten(), flat.cdf(means[0].flatten()), rtol=1e-12, atol=1e-12)
    assert mixture.sample(torch.Size([5])).shape == (5, 3, 2)


def test_dtype():
    weights, parts, *_ = components()
    mixture = Mixture(weights, parts, dtype=torch.float32)
    value = torch.zeros(N)
    for out in (mixture.mean, mixture.variance, mixture.quantile(0.5), mixture.log_prob(value), mixture.sample()):
        assert out.dtype == torch.float32


def test_one_component_is_itself():
    _, parts, *_ = components()
    mixture = Mixture(torch.ones(1, dtype=torch.float64), parts[:1])
    torch.testing.assert_close(mixture.variance, parts[0].variance)
    normal = Normal(parts[0].mean, parts[0].stddev)
    torch.testing.assert_close(mixture.quantile(0.9), normal.icdf(torch.tensor(0.9, dtype=torch.float64)))
