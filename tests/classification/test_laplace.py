"""Laplace's approximation: mode, evidence, its gradients, and the posterior, against dense algebra."""

import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.means import ConstantMean, MultitaskMean

import ntk_gp
from ntk_gp import GainKernel, LaplaceMarginalLogLikelihood, NetworkMean, NTKKernel

from .problems import LIKELIHOODS, Classifier, Problem, Reference, likelihood_of

SPACES = ("function_space", "weight_space")


@pytest.fixture(params=LIKELIHOODS)
def problem(request) -> Problem:
    return Problem(request.param)


@pytest.fixture(params=SPACES)
def space(request):
    with ntk_gp.settings.solver(request.param):
        yield request.param


def evidence(model) -> torch.Tensor:
    """log q(y), from the mean over labels."""
    model.train()
    mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
    return mll(model(*model.train_inputs), model.train_targets) * len(model.train_targets)


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    evidence(model).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def by_raw(model, expected: torch.Tensor) -> dict[str, torch.Tensor]:
    """A function of the model's hyperparameters, differentiated by autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(expected, parameters), strict=True))


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_mode_evidence_and_posterior(problem, space):
    model = problem.model()
    reference = Reference(problem.name, problem.gram(problem.variances), problem.values(problem.x), problem.labels)
    close(evidence(model).detach(), reference.log_evidence)
    model.eval()
    close(model.approximation.latent_mean.reshape(-1), reference.f)
    cross = (problem.jacobian * problem.variances[problem.groups]) @ problem.test_jacobian.mT
    prior = (problem.test_jacobian * problem.variances[problem.groups]) @ problem.test_jacobian.mT
    mean, covariance = reference.posterior(cross, prior, problem.values(problem.test_x).reshape(-1))
    posterior = model(problem.test_x)
    close(posterior.mean.reshape(-1).detach(), mean)
    close(posterior.covariance_matrix.detach(), covariance)
    close(posterior.variance.reshape(-1).detach(), covariance.diagonal())


def test_gradients_by_scale_and_variances(problem, space):
    model = problem.model()
    kernel = model.covar_module
    variances = kernel.outputscale * kernel.base_kernel.variance.reshape(-1)
    mean = problem.values(problem.x)
    reference = Reference(problem.name, problem.gram(variances), mean, problem.labels)
    expected = by_raw(model, reference.log_evidence)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-8)


def test_gradients_are_central_differences(problem, space):
    model = problem.model()
    found = gradients(model)["covar_module.raw_outputscale"]
    raw, step = model.covar_module.raw_outputscale, 1e-4
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            raw += sign * step
        values.append(evidence(model).detach())
        with torch.no_grad():
            raw -= sign * step
    close(found, (values[0] - values[1]) / (2 * step), 1e-7)


def test_known_features_beside_and_a_mean_that_is_learned(space):
    problem = Problem("softmax")
    kernel = ScaleKernel(problem.kernel()) + ScaleKernel(GainKernel(problem.network, output="all"))
    model = problem.model(kernel, MultitaskMean(ConstantMean(), num_tasks=problem.outputs))
    with torch.no_grad():
        for mean, value in zip(model.mean_module.base_means, (0.1, -0.4, 0.3), strict=True):
            mean.constant.fill_(value)
    tangent, gain = kernel.kernels
    values = problem.values(problem.x)
    features = torch.cat(
        [torch.diag_embed(values).reshape(-1, problem.outputs), torch.eye(3).double().repeat(8, 1)], -1
    )
    inner = gain.base_kernel
    own = torch.cat([v.reshape(1).expand(3) for v in (inner.gain_variance, inner.offset_variance)])
    matrix = problem.gram(tangent.outputscale.expand(2)) + (features * gain.outputscale * own) @ features.mT
    mean = torch.stack([mean.constant for mean in model.mean_module.base_means]).expand(8, -1)
    reference = Reference("softmax", matrix, mean, problem.labels)
    close(evidence(model).detach(), reference.log_evidence.detach())
    expected, found = by_raw(model, reference.log_evidence), gradients(model)
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-8)


@pytest.mark.parametrize("with_tangent", [True, False])
def test_any_other_kernel(with_tangent):
    """A sum with an RBF kernel, and one alone: function space, whatever they are."""
    problem = Problem("probit")
    rbf = ScaleKernel(RBFKernel())
    model = problem.model(ScaleKernel(problem.kernel()) + rbf if with_tangent else rbf)

    tangent = model.covar_module.kernels[0].outputscale if with_tangent else 0.0

    def matrix(x, y, jacobian_x, jacobian_y):
        distances = (x.unsqueeze(-2) - y).square().sum(-1)
        stationary = torch.exp(-distances / (2 * rbf.base_kernel.lengthscale.square()))
        return rbf.outputscale * stationary + tangent * jacobian_x @ jacobian_y.mT

    x, test_x = problem.x, problem.test_x
    train = matrix(x, x, problem.jacobian, problem.jacobian)
    reference = Reference("probit", train, problem.values(x), problem.labels)
    close(evidence(model).detach(), reference.log_evidence.detach())
    expected, found = by_raw(model, reference.log_evidence), gradients(model)
    for name, gradient in found.items():
        close(gradient, expected[name], 1e-8)
    model.eval()
    with torch.no_grad():
        cross = matrix(x, test_x, problem.jacobian, problem.test_jacobian)
        prior = matrix(test_x, test_x, problem.test_jacobian, problem.test_jacobian)
        mean, covariance = reference.posterior(cross, prior, problem.values(test_x).reshape(-1))
        posterior = model(test_x)
        close(posterior.mean, mean)
        close(posterior.covariance_matrix, covariance)
        variance = covariance.diagonal()
        close(model.predict_proba(test_x), torch.special.ndtr(mean / (1 + variance).sqrt()))


def test_one_kernel_for_each_class():
    """Classes that are independent a priori, each with a scale of its own."""
    problem = Problem("softmax")

    class Batch(Classifier):
        def forward(self, x):
            each = MultivariateNormal(self.mean_module(x), self.covar_module(x))
            return MultitaskMultivariateNormal.from_batch_mvn(each)

    kernel = ScaleKernel(NTKKernel(problem.network, output="batch"), batch_shape=torch.Size([3]))
    mean = NetworkMean(problem.network, output="batch")
    model = Batch(problem.x, problem.labels, likelihood_of("softmax"), mean, kernel).double()
    kernel.outputscale = torch.tensor([0.5, 1.0, 2.0])
    classes = torch.arange(problem.outputs).repeat(len(problem.x))
    roots = kernel.outputscale.sqrt()[classes].unsqueeze(-1) * problem.jacobian
    matrix = (roots @ roots.mT) * (classes == classes.unsqueeze(-1))
    reference = Reference("softmax", matrix, problem.values(problem.x), problem.labels)
    close(evidence(model).detach(), reference.log_evidence.detach())
    expected, found = by_raw(model, reference.log_evidence), gradients(model)
    close(found["covar_module.raw_outputscale"], expected["covar_module.raw_outputscale"], 1e-8)
    probabilities = model.eval().predict_proba(problem.test_x)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(5).double())
