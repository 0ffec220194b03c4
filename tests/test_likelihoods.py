"""Known noise for each point and output, in either order of a multitask distribution."""

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal

from ntk_gp import FixedNoiseMultitaskGaussianLikelihood

pytestmark = pytest.mark.engine_independent

N, C = 4, 3
NOISE = 0.1 + torch.rand(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def covariance() -> torch.Tensor:
    root = torch.randn(N * C, N * C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return root @ root.mT


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("additional", [False, True])
def test_noise_is_added_to_its_own_entry(interleaved, additional):
    likelihood = FixedNoiseMultitaskGaussianLikelihood(NOISE, learn_additional_noise=additional).double()
    second = 0.0
    if additional:
        likelihood.second_noise = 0.25
        second = 0.25
    mean = torch.zeros(N, C, dtype=torch.float64)
    observed = likelihood(MultitaskMultivariateNormal(mean, covariance(), interleaved=interleaved))
    diagonal = (NOISE + second if interleaved else (NOISE + second).mT).flatten()
    torch.testing.assert_close(observed.covariance_matrix, covariance() + torch.diag(diagonal))
    torch.testing.assert_close(likelihood.noise, NOISE + second)
    prior = MultitaskMultivariateNormal(mean, covariance(), interleaved=interleaved)
    torch.testing.assert_close(observed.variance, prior.variance + NOISE + second)


def test_noise_of_other_points_is_given():
    likelihood = FixedNoiseMultitaskGaussianLikelihood(NOISE)
    other = MultitaskMultivariateNormal(torch.zeros(2, C).double(), torch.eye(2 * C).double())
    with pytest.raises(ValueError, match=r"\(2, 3\), that of the training points has shape \(4, 3\)"):
        likelihood(other)
    torch.testing.assert_close(likelihood(other, noise=NOISE[:2]).variance, 1 + NOISE[:2])
    more = likelihood.get_fantasy_likelihood(noise=NOISE[:2])
    torch.testing.assert_close(more.noise, torch.cat([NOISE, NOISE[:2]]))
    torch.testing.assert_close(likelihood.noise, NOISE)
    batch = likelihood.get_fantasy_likelihood(noise=NOISE[:2].expand(5, 2, C))
    assert batch.noise.shape == (5, N + 2, C)
    with pytest.raises(RuntimeError, match="noise="):
        likelihood.get_fantasy_likelihood()


def test_densities_are_those_of_each_entry():
    likelihood = FixedNoiseMultitaskGaussianLikelihood(NOISE)
    prior = MultitaskMultivariateNormal(torch.zeros(N, C).double(), covariance())
    y = torch.ones(N, C, dtype=torch.float64)
    variances = covariance().diagonal().reshape(N, C)
    expected = torch.distributions.Normal(0.0, (variances + NOISE).sqrt()).log_prob(y).sum(-1)
    torch.testing.assert_close(likelihood.log_marginal(y, prior), expected)
    inner = torch.distributions.Normal(0.0, NOISE.sqrt()).log_prob(y) - variances / (2 * NOISE)
    torch.testing.assert_close(likelihood.expected_log_prob(y, prior), inner.sum(-1))


def test_what_is_of_one_output_is_refused():
    with pytest.raises(ValueError, match=r"\(\*batch, n, C\)"):
        FixedNoiseMultitaskGaussianLikelihood(NOISE[:, 0])
    with pytest.raises(TypeError, match="FixedNoiseGaussianLikelihood"):
        FixedNoiseMultitaskGaussianLikelihood(NOISE)(MultivariateNormal(torch.zeros(N), torch.eye(N)))
    assert issubclass(FixedNoiseMultitaskGaussianLikelihood, gpytorch.likelihoods.FixedNoiseGaussianLikelihood)
