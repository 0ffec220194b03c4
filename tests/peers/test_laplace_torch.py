"""Posteriors around trained weights beside laplace-torch's, in float64.

Its mean is the network's, whatever the labels: the two posteriors have one covariance, and one mean and evidence where
the weights are the mode.
"""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood, SoftmaxLikelihood
from gpytorch.means import MultitaskMean, ZeroMean
from torch import Tensor, nn

from ntk_gp import LaplaceGP, LaplaceMarginalLogLikelihood, NetworkMean, NTKKernel
from ntk_gp.testing import explicit_jacobian
from tests.adapted import data, network
from tests.peers.processes import ask

PEER = "laplace_torch"
NOISE, PRECISION = 0.04, 2.5
PARAMETERS = {"all": None, "last_layer": ["2.*"]}


def close(actual: Tensor, expected, tolerance: float = 1e-8) -> None:
    expected = torch.as_tensor(expected).reshape(actual.shape)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def ask_for_posterior(net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, **options):
    defaults = {"subset_of_weights": "all", "hessian_structure": "full", "independent_outputs": False}
    question = {"x": x, "y": y, "test_x": test_x, "prior_precision": PRECISION, **defaults, **options}
    return ask(PEER, "posterior", **question, **net.state_dict())


class Model(gpytorch.models.ExactGP):
    """Weights ~ N(trained ones, 1 / precision); with mean="zero", ~ N(0, 1 / precision) where f is linear in them."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, mean: str = "network", **options):
        likelihood, zero, distribution = GaussianLikelihood(), ZeroMean(), MultivariateNormal
        if options.get("output") == "all":
            likelihood = MultitaskGaussianLikelihood(y.shape[-1], rank=0, has_task_noise=False)
            zero, distribution = MultitaskMean(zero, y.shape[-1]), MultitaskMultivariateNormal
        super().__init__(x, y, likelihood.double())
        self.mean_module = NetworkMean(net, output=options.get("output")) if mean == "network" else zero
        self.covar_module = ScaleKernel(NTKKernel(net, **options)).double()
        self.distribution = distribution
        # Numbers would be rounded to float32.
        self.covar_module.outputscale = torch.tensor(1 / PRECISION, dtype=torch.float64)
        self.likelihood.noise = torch.tensor(NOISE, dtype=torch.float64)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return self.distribution(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("structure", ["gp", "full"])
@pytest.mark.parametrize("subset", PARAMETERS)
def test_regression(subset, structure):
    net, (x, y), test_x = network(), data(12), data(5, seed=1)[0]
    answer = ask_for_posterior(
        net, x, y[:, None], test_x, noise=NOISE, subset_of_weights=subset, hessian_structure=structure
    )
    posterior = Model(net, x, y, parameters=PARAMETERS[subset]).eval()(test_x)
    close(posterior.covariance_matrix, answer["covariance"])


@pytest.mark.parametrize("structure", ["gp", "full"])
@pytest.mark.parametrize("subset", PARAMETERS)
def test_several_outputs(subset, structure):
    net, (x, y), test_x = network(outputs=3), data(12, outputs=3), data(5, seed=1)[0]
    answer = ask_for_posterior(net, x, y, test_x, noise=NOISE, subset_of_weights=subset, hessian_structure=structure)
    posterior = Model(net, x, y, output="all", parameters=PARAMETERS[subset]).eval()(test_x)
    close(posterior.covariance_matrix, answer["covariance"])


@pytest.mark.parametrize("subset", PARAMETERS)
def test_independent_outputs(subset):
    """A Gaussian process for each output, of that output's kernel."""
    net, (x, y), test_x = network(outputs=3), data(12, outputs=3), data(5, seed=1)[0]
    answer = ask_for_posterior(
        net, x, y, test_x, noise=NOISE, subset_of_weights=subset, hessian_structure="gp", independent_outputs=True
    )
    covariance = torch.as_tensor(answer["covariance"]).reshape(5, 3, 5, 3)
    for c in range(3):
        posterior = Model(net, x, y[:, c], output=c, parameters=PARAMETERS[subset]).eval()(test_x)
        close(posterior.covariance_matrix, covariance[:, c, :, c])
        assert (covariance[:, c, :, [k for k in range(3) if k != c]] == 0).all()


def test_mean_and_evidence_at_the_mode():
    """The last layer is the ridge regression of the labels on the features, and with a prior mean of zero."""
    net, (x, y), test_x = network(outputs=2), data(12, outputs=2), data(5, seed=1)[0]
    with torch.no_grad():
        features = torch.cat([net[:2](x), torch.ones(len(x), 1, dtype=x.dtype)], dim=-1)
        gram = features.mT @ features / NOISE + PRECISION * torch.eye(features.shape[-1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, features.mT @ y / NOISE)
        net[2].weight.copy_(weights[:-1].mT), net[2].bias.copy_(weights[-1])
    answer = ask_for_posterior(net, x, y, test_x, noise=NOISE, subset_of_weights="last_layer")
    model = Model(net, x, y, mean="zero", output="all", parameters=PARAMETERS["last_layer"])
    with torch.no_grad():
        evidence = model.likelihood(model(x)).log_prob(y)
        posterior = model.eval()(test_x)
    close(evidence, answer["evidence"])
    close(posterior.mean, answer["mean"])
    close(posterior.covariance_matrix, answer["covariance"])


class Classifier(LaplaceGP):
    """Weights ~ N(trained ones, 1 / precision), and the softmax's curvature at the network's own outputs."""

    def __init__(self, net: nn.Module, x: Tensor, labels: Tensor, **options):
        likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False)
        super().__init__(x, labels, likelihood, expand_at="prior_mean")
        self.mean_module = NetworkMean(net, output="all")
        self.covar_module = ScaleKernel(NTKKernel(net, output="all", **options)).double()
        self.covar_module.outputscale = torch.tensor(1 / PRECISION, dtype=torch.float64)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("subset", PARAMETERS)
def test_classification(subset):
    """Covariance and probit approximation; also by Λ = I / variance + Jᵀ H J, which shares no code with either."""
    net, (x, _), test_x = network(outputs=3), data(12), data(5, seed=1)[0]
    labels = torch.arange(12) % 3
    answer = ask_for_posterior(net, x, labels, test_x, subset_of_weights=subset)
    jacobian, test_jacobian = (explicit_jacobian(net, each, parameters=PARAMETERS[subset]) for each in (x, test_x))
    p = net(x).detach().softmax(-1)
    hessian = torch.block_diag(*(torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)))
    precision = PRECISION * torch.eye(jacobian.shape[-1], dtype=x.dtype) + jacobian.mT @ hessian @ jacobian
    close(test_jacobian @ torch.linalg.solve(precision, test_jacobian.mT), answer["covariance"])
    model = Classifier(net, x, labels, parameters=PARAMETERS[subset]).eval()
    with torch.no_grad():
        close(model(test_x).covariance_matrix, answer["covariance"])
        close(model.predict_proba(test_x), answer["probabilities"])


@pytest.mark.parametrize("subset", PARAMETERS)
def test_evidence_of_classification(subset):
    """Of the weights themselves, N(0, 1 / precision) a priori."""
    net, (x, _), test_x = network(outputs=3), data(12), data(5, seed=1)[0]
    labels = torch.arange(12) % 3
    answer = ask_for_posterior(net, x, labels, test_x, subset_of_weights=subset)
    model = Classifier(net, x, labels, parameters=PARAMETERS[subset]).train()
    with torch.no_grad():
        evidence = LaplaceMarginalLogLikelihood(model.likelihood, model)(model(x), labels) * len(x)
    close(evidence, answer["evidence"])
