"""Probabilities at test points, in batches and blocks; expansion at the prior mean."""

import math

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

import ntk_gp
from ntk_gp import LaplaceMarginalLogLikelihood, NetworkMean, NTKKernel

from .problems import LIKELIHOODS, Classifier, Problem, likelihood_of, log_likelihood

pytestmark = pytest.mark.engine_independent

SPACES = ("function_space", "weight_space")


@pytest.fixture(params=SPACES)
def space(request):
    with ntk_gp.settings.solver(request.param):
        yield request.param


def of_points(model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (m, C) and covariance (m, C, C) of each point, from the joint one."""
    posterior = model(x)
    mean = posterior.mean.reshape(len(x), -1).detach()
    covariance = posterior.covariance_matrix.detach().reshape(*mean.shape, *mean.shape)
    return mean, covariance.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def softmax_probit(mean, covariance):
    return (mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()).softmax(-1)


def test_probit_is_the_formula(space):
    problem = Problem("softmax")
    model = problem.model().eval()
    found = model.predict_proba(problem.test_x)
    torch.testing.assert_close(found, softmax_probit(*of_points(model, problem.test_x)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(5).double())


@pytest.mark.parametrize("name", ["logistic", "probit"])
def test_two_classes_by_one_output(name, space):
    problem = Problem(name)
    model = problem.model().eval()
    mean, variance = (moment.reshape(-1) for moment in of_points(model, problem.test_x))
    found = model.predict_proba(problem.test_x)
    expected = (
        torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt())
        if name == "logistic"
        else model.likelihood(model(problem.test_x)).probs.detach()
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    drawn = model.predict_proba(
        problem.test_x, "monte_carlo", samples=20000, generator=torch.Generator().manual_seed(0)
    )
    exact = model.likelihood(model(problem.test_x)).probs.detach()  # quadrature, or closed form
    assert (drawn - exact).abs().max() < 3 / (2 * 20000**0.5)


def test_monte_carlo_of_two_softmax_classes_is_quadrature(space):
    """The difference of both latent functions is all that counts, and has one dimension."""
    problem = Problem("softmax", classes=2)
    model = problem.model().eval()
    mean, covariance = of_points(model, problem.test_x)
    contrast = torch.tensor([-1.0, 1.0]).double()
    difference, variance = mean @ contrast, covariance @ contrast @ contrast
    nodes, weights = (torch.as_tensor(part) for part in __import__("numpy").polynomial.hermite.hermgauss(60))
    values = torch.sigmoid(difference[:, None] + (2 * variance[:, None]).sqrt() * nodes)
    expected = values @ weights / math.sqrt(math.pi)
    found = model.predict_proba(
        problem.test_x, "monte_carlo", samples=20000, generator=torch.Generator().manual_seed(1)
    )
    assert (found[:, 1] - expected).abs().max() < 3 / (2 * 20000**0.5)


def test_samples_are_those_of_each_point_alone():
    problem = Problem("softmax")
    model = problem.model().eval()

    def drawn(x):
        return model.predict_proba(x, "monte_carlo", samples=50, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(drawn(problem.test_x)[2:3], drawn(problem.test_x[2:3]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_rbf", [False, True])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_blocks_and_batches(name, with_rbf):
    """A budget for a few points at a time, and test points in batches, give what all of them give at once."""
    problem = Problem(name)
    kernel = ScaleKernel(problem.kernel())
    if with_rbf and name == "softmax":
        kernel = gpytorch.kernels.MultitaskKernel(RBFKernel(), num_tasks=problem.outputs)
    elif with_rbf:
        kernel = kernel + ScaleKernel(RBFKernel())
    model = problem.model(kernel).eval()
    x = torch.randn(2, 3, 2).double()
    whole = model.predict_proba(x.reshape(6, 2))
    batches = model.predict_proba(x)
    torch.testing.assert_close(batches.reshape(whole.shape), whole, rtol=1e-10, atol=1e-12)
    posterior = model(x)
    for i in range(2):
        alone = model(x[i])
        torch.testing.assert_close(posterior.mean[i], alone.mean, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(posterior.covariance_matrix[i], alone.covariance_matrix, rtol=1e-9, atol=1e-10)
    one_by_one = torch.cat([model.predict_proba(point) for point in x.reshape(6, 1, 2)])
    torch.testing.assert_close(one_by_one, whole, rtol=1e-9, atol=1e-11)


def test_blocks_keep_to_the_budget(monkeypatch):
    problem = Problem("softmax")
    model = problem.model().eval()
    whole = model.predict_proba(problem.test_x)
    sizes = []
    original = model._marginals
    monkeypatch.setattr(model, "_marginals", lambda x: sizes.append(len(x)) or original(x))
    coordinates = model.approximation.prior.space.num_coordinates
    with ntk_gp.settings.memory_budget(8 * 2 * 8 * 3 * 3 * coordinates):  # an eighth of it for two points
        found = model.predict_proba(problem.test_x)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(found, whole)


def test_likelihood_of_the_posterior_is_gpytorchs():
    problem = Problem("softmax")
    model = problem.model().eval()
    x = torch.randn(4, 2).double()
    with gpytorch.settings.num_likelihood_samples(4000):
        probabilities = model.likelihood(model(x)).probs.mean(0)
    expected = model.predict_proba(x, "monte_carlo", samples=4000)
    assert (probabilities - expected).abs().max() < 6 / (2 * 4000**0.5)


def test_gradients_by_test_inputs(space):
    """As an acquisition function takes them, against central differences."""
    problem = Problem("softmax")
    model = problem.model().eval()
    x = problem.test_x[:1].clone().requires_grad_()
    posterior = model(x)
    (posterior.mean.sum() + posterior.covariance_matrix.square().sum()).backward()
    step = torch.tensor([[1e-5, 0.0]]).double()

    def at(x):
        posterior = model(x)
        return (posterior.mean.sum() + posterior.covariance_matrix.square().sum()).detach()

    expected = (at(x.detach() + step) - at(x.detach() - step)) / 2e-5
    torch.testing.assert_close(x.grad[0, 0], expected, rtol=1e-6, atol=0)


class TestAtThePriorMean:
    """What laplace-torch does with all weights and the generalised Gauss-Newton matrix, for labels seen in training."""

    @pytest.fixture(params=["softmax", "logistic"])
    def problem(self, request) -> Problem:
        return Problem(request.param)

    @staticmethod
    def precision(problem: Problem, variances: torch.Tensor) -> torch.Tensor:
        """Σ⁻¹ + Jᵀ H J, (P, P)."""
        f = problem.values(problem.x)
        likelihood = lambda f: log_likelihood(problem.name, f.reshape(len(problem.x), -1), problem.labels)  # noqa: E731
        hessian = -torch.func.hessian(likelihood)(f.reshape(-1))
        return torch.diag(1 / variances[problem.groups]) + problem.jacobian.mT @ hessian @ problem.jacobian

    def test_posterior(self, problem, space):
        model = problem.model(expand_at="prior_mean").eval()
        posterior = model(problem.test_x)
        torch.testing.assert_close(posterior.mean.reshape(5, -1), problem.values(problem.test_x))
        inverse = torch.linalg.inv(self.precision(problem, problem.variances))
        expected = problem.test_jacobian @ inverse @ problem.test_jacobian.mT
        torch.testing.assert_close(posterior.covariance_matrix, expected, rtol=1e-9, atol=1e-10)

    def test_evidence_and_its_gradient(self, problem, space):
        model = problem.model(expand_at="prior_mean")
        kernel = model.covar_module
        variances = kernel.outputscale * kernel.base_kernel.variance.reshape(-1)
        weights = torch.cat([p.detach().reshape(-1) for p in problem.network.parameters()])
        by_weight = variances[problem.groups]
        logdet = torch.logdet(self.precision(problem, variances)) + by_weight.log().sum()
        value = log_likelihood(problem.name, problem.values(problem.x), problem.labels)
        expected = value - (weights.square() / by_weight).sum() / 2 - logdet / 2
        mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
        found = mll(model(problem.x), problem.labels) * len(problem.x)
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-10)
        _, parameters = zip(*model.named_parameters(), strict=True)
        for gradient, other in zip(
            torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
        ):
            torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)

    def test_evidence_of_what_is_no_network(self):
        model = Problem("logistic").model(mean=gpytorch.means.ZeroMean(), expand_at="prior_mean")
        mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
        with pytest.raises(TypeError, match="NetworkMean of one network"):
            mll(model(*model.train_inputs), model.train_targets)


def test_inputs_that_are_integers():
    network = torch.nn.Sequential(torch.nn.EmbeddingBag(10, 4), torch.nn.Linear(4, 3)).double()
    options = {"output": "all", "input_dtype": torch.long}
    x, labels = torch.randint(0, 10, (8, 3)), torch.arange(8) % 3
    mean, kernel = NetworkMean(network, **options), ScaleKernel(NTKKernel(network, **options))
    model = Classifier(x, labels, likelihood_of("softmax"), mean, kernel).double().eval()
    found = model.predict_proba(x[:4])
    torch.testing.assert_close(found, softmax_probit(*of_points(model, x[:4])), rtol=1e-10, atol=1e-12)
