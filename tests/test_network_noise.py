"""Noise that a network tells, against closed forms."""

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from torch import nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel, averaged
from ntk_gp.likelihoods import NetworkNoiseLikelihood
from tests import references
from tests.adapted import assert_close, data, network


class _Head(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[:, :1]


class _Model(gpytorch.models.ExactGP):
    def __init__(self, x, y, net):
        super().__init__(x, y, NetworkNoiseLikelihood(net, noise_output=1))
        self.mean_module = NetworkMean(net, output=0)
        self.covar_module = ScaleKernel(NTKKernel(net, output=0)).double()

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.fixture
def model():
    net = network(outputs=2)
    made = _Model(*data(12), net)
    made.likelihood.noise_factor = 0.3
    return made, net


def _closed_form(model, net, z):
    x = model.train_inputs[0]
    scale, factor = model.covar_module.outputscale.detach(), model.likelihood.noise_factor.detach()
    joint = torch.cat([x, z])
    noise = factor * net(joint)[:, 1].exp().detach()
    mean = net(joint)[:, 0].detach()
    return mean, scale * references.kernel(_Head(net), joint).detach(), noise


def test_predictions(model):
    model, net = model
    z = data(4, seed=1)[0]
    mean, prior, noise = _closed_form(model, net, z)
    mean, covariance = references.posterior(mean, prior, noise[:12], model.train_targets)
    model.eval()
    with torch.no_grad():
        prediction = model.likelihood(model(z), z)
        assert_close(prediction.mean, mean, tolerance=1e-9)
        assert_close(prediction.covariance_matrix, covariance + noise[12:].diag(), tolerance=1e-9)


def test_marginal_likelihood_and_its_slope(model):
    model, net = model
    x, y = model.train_inputs[0], model.train_targets
    mean, prior, noise = _closed_form(model, net, x[:0])
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model.train())
    value = objective(model(x), y, x)
    factor = model.likelihood.noise_factor.detach().clone().requires_grad_()
    expected = references.log_marginal_likelihood(y - mean, prior + (noise / factor.detach() * factor).diag())
    assert_close(value, expected.detach(), tolerance=1e-9)
    value.backward()
    expected.backward()
    raw = model.likelihood.raw_noise_factor
    slope = factor.grad * torch.sigmoid(raw.detach())  # of the softplus
    torch.testing.assert_close(raw.grad, slope, rtol=1e-8, atol=1e-10)


def test_averages_and_the_ready_model():
    net, (x, y), z = network(outputs=2), data(12), data(4, seed=1)[0]
    model = ntk_gp.AdaptedGP(x, y, net, terms=("gain", "tangent"), output=0, noise_output=1)
    assert isinstance(model.likelihood, NetworkNoiseLikelihood)
    prediction = model.predict(z, draws=8)
    assert prediction.mean.isfinite().all() and (prediction.variance > 0).all()
    fitted = model.fit()
    noise = fitted.likelihood(fitted(z), z).variance - fitted(z).variance
    torch.testing.assert_close(noise, fitted.likelihood.noise_factor * net(z)[:, 1].exp(), rtol=1e-6, atol=1e-9)
    assert averaged(model, draws=4).predict(z, z).mean.shape == (4,)
    with pytest.raises(TypeError, match="leave likelihood= out"):
        ntk_gp.AdaptedGP(x, y, net, output=0, noise_output=1, likelihood=gpytorch.likelihoods.GaussianLikelihood())
    with pytest.raises(ValueError, match="are both 1"):
        ntk_gp.AdaptedGP(x, y, net, output=1, noise_output=1)


def test_the_network_is_frozen_and_the_factor_may_be(model):
    model, net = model
    names = [name for name, _ in model.likelihood.named_parameters()]
    assert names == ["raw_noise_factor"]
    assert not NetworkNoiseLikelihood(net, 1, learn_factor=False).raw_noise_factor.requires_grad


def test_what_is_refused(model):
    model, net = model
    x = model.train_inputs[0]
    for several in ("all", "batch", [0, 1], None):
        with pytest.raises(ValueError, match="noise_output must be one output"):
            NetworkNoiseLikelihood(net, noise_output=several)
    prior = MultivariateNormal(torch.zeros(12).double(), torch.eye(12).double())
    with pytest.raises(ValueError, match="output"):
        NetworkNoiseLikelihood(net, noise_output=2)(prior, x)
    with pytest.raises(RuntimeError, match="none came"):
        model.likelihood(prior)
    for bias in (800.0, -800.0):
        with torch.no_grad():
            net[-1].bias[1] = bias
        with pytest.raises(ValueError, match="no positive finite number"):
            NetworkNoiseLikelihood(net, noise_output=1)(prior, x)
