"""The model as GPyTorch's users handle it: modes, new data, states, precision, memory, and what it refuses."""

import copy
import pickle

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

import ntk_gp
from ntk_gp import LaplaceMarginalLogLikelihood, NetworkMean, NTKKernel

from .problems import Classifier, Problem, likelihood_of


@pytest.fixture
def problem() -> Problem:
    return Problem("softmax")


def test_a_training_loop_raises_the_evidence(problem):
    model = problem.model()
    model.covar_module.base_kernel.register_prior(
        "variance_prior", gpytorch.priors.LogNormalPrior(0.0, 1.0), lambda kernel: kernel.variance
    )
    mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = -mll(model(problem.x), problem.labels)
        loss.backward()
        optimizer.step()
        values.append(-loss.item())
    assert values[-1] > values[0] + 1e-3
    # What the search started from is in none of the values.
    with torch.no_grad():
        fresh = LaplaceMarginalLogLikelihood(model.likelihood, model)
        torch.testing.assert_close(mll(model(problem.x), problem.labels), fresh(model(problem.x), problem.labels))


def test_priors_are_added(problem):
    model = problem.model()
    mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
    without = mll(model(problem.x), problem.labels)
    prior = gpytorch.priors.LogNormalPrior(0.0, 1.0)
    model.covar_module.register_prior("scale_prior", prior, "outputscale")
    expected = without + prior.log_prob(model.covar_module.outputscale) / len(problem.x)
    torch.testing.assert_close(mll(model(problem.x), problem.labels), expected)


def test_train_mode_is_the_prior(problem):
    model = problem.model()
    prior = model(problem.x)
    torch.testing.assert_close(prior.mean, problem.values(problem.x))
    torch.testing.assert_close(prior.covariance_matrix, problem.gram(problem.variances))
    with pytest.raises(RuntimeError, match="You must train on the training inputs"):
        model(problem.test_x)
    with gpytorch.settings.prior_mode(True):
        torch.testing.assert_close(model.eval()(problem.test_x).mean, problem.values(problem.test_x))
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        LaplaceMarginalLogLikelihood(model.likelihood, model)(model(problem.test_x), problem.labels)


def test_predictions_follow_hyperparameters_and_data(problem):
    model = problem.model().eval()
    before = model(problem.test_x).mean
    model.covar_module.outputscale = 5.0
    torch.testing.assert_close(model(problem.test_x).mean, problem.model(scale=5.0).eval()(problem.test_x).mean)
    model.set_train_data(problem.x[:4], problem.labels[:4], strict=False)
    fewer = problem.model(scale=5.0)
    fewer.set_train_data(problem.x[:4], problem.labels[:4], strict=False)
    torch.testing.assert_close(model(problem.test_x).mean, fewer.eval()(problem.test_x).mean)
    assert not torch.allclose(model(problem.test_x).mean, before)
    with pytest.raises(RuntimeError, match="Cannot modify shape of inputs"):
        model.set_train_data(problem.x)


def test_a_changed_network_is_noticed(problem):
    model = problem.model().eval()
    model(problem.test_x)
    with torch.no_grad():
        problem.network[0].weight += 1
    model.covar_module.base_kernel.linearize(problem.network)
    with pytest.raises(RuntimeError, match="network has changed"):
        model(problem.test_x)
    with pytest.raises(RuntimeError, match="network has changed"):
        model.predict_proba(problem.test_x)
    model.train().eval()
    model(problem.test_x)


def test_copies_and_pickles_predict_the_same(problem):
    model = problem.model().eval()
    expected = model.predict_proba(problem.test_x)
    torch.testing.assert_close(copy.deepcopy(model).predict_proba(problem.test_x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model)).predict_proba(problem.test_x), expected)
    other = problem.model(scale=1.0).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.predict_proba(problem.test_x), expected)


def test_single_precision_is_solved_in_double(problem):
    expected = problem.model().eval().predict_proba(problem.test_x)
    model = problem.model().float().eval()
    assert model.train_inputs[0].dtype == torch.float32
    assert model.train_targets.dtype == torch.int64
    found = model.predict_proba(problem.test_x.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    posterior = model(problem.test_x.float())
    assert posterior.mean.dtype == posterior.covariance_matrix.dtype == torch.float32
    model.train()
    loss = LaplaceMarginalLogLikelihood(model.likelihood, model)(model(model.train_inputs[0]), problem.labels)
    assert loss.dtype == torch.float32
    loss.backward()


def test_variances_can_be_left_out(problem):
    model = problem.model().eval()
    with gpytorch.settings.skip_posterior_variances():
        posterior = model(problem.test_x)
    torch.testing.assert_close(posterior.mean, model(problem.test_x).mean)


def test_rows_of_features_in_blocks(problem):
    """Where N×P numbers do not fit: a block of points after another, as exact."""
    from ntk_gp.classification.weight_space import WeightSpace

    parameters = len(problem.groups)
    with ntk_gp.settings.solver("weight_space"):
        expected = problem.model().eval().predict_proba(problem.test_x)
        with ntk_gp.settings.memory_budget(8 * (3 * parameters**2 + problem.outputs * len(problem.x) * parameters)):
            model = problem.model().eval()
            found = model.predict_proba(problem.test_x)
            space = model.approximation.prior.space
            assert isinstance(space, WeightSpace) and space._features is None
            model.train()
            mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
            blocked = torch.autograd.grad(mll(model(problem.x), problem.labels), list(model.parameters()))
        whole = torch.autograd.grad(mll(model(problem.x), problem.labels), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(blocked, whole, rtol=1e-8, atol=1e-12)


class TestRefused:
    def test_too_little_memory(self, problem):
        model = problem.model().eval()
        with ntk_gp.settings.memory_budget(1000), pytest.raises(MemoryError, match="linearise fewer parameters"):
            model(problem.test_x)
        model = problem.model(gpytorch.kernels.MultitaskKernel(RBFKernel(), num_tasks=3)).eval()
        with ntk_gp.settings.memory_budget(1000), pytest.raises(MemoryError, match="24×24"):
            model(problem.test_x)

    @pytest.mark.parametrize("solver", ["weight_space", "function_space"])
    def test_too_little_memory_for_the_solver_that_is_set(self, problem, solver):
        model = problem.model().eval()
        with (
            ntk_gp.settings.memory_budget(1000),
            ntk_gp.settings.solver(solver),
            pytest.raises(MemoryError, match=r"leave ntk_gp\.settings\.solver unset"),
        ):
            model(problem.test_x)

    def test_iteration(self, problem):
        with ntk_gp.settings.solver("iterative"), pytest.raises(ValueError, match="needs a factorisation"):
            problem.model().eval()(problem.test_x)

    def test_a_network_with_another_number_of_outputs(self, problem):
        kernel, mean = ScaleKernel(problem.kernel()), problem.mean
        model = Classifier(problem.x, problem.labels, likelihood_of("softmax", 4), mean, kernel).double().eval()
        with pytest.raises(ValueError, match=r"shape \(8, 4\) for 8 labels, got a .* of shape \(8, 3\)"):
            model(problem.test_x)
        one = Classifier(problem.x, problem.labels % 2, likelihood_of("logistic"), mean, kernel).double().eval()
        with pytest.raises((ValueError, RuntimeError)):
            one(problem.test_x)

    def test_one_output_for_several_classes(self, problem):
        class Single(Classifier):
            def forward(self, x):
                return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

        mean, kernel = NetworkMean(problem.network, output=0), NTKKernel(problem.network, output=0)
        model = Single(problem.x, problem.labels, likelihood_of("softmax"), mean, kernel).eval()
        with pytest.raises(ValueError, match="MultitaskMultivariateNormal, one task for each class"):
            model(problem.test_x)

    @pytest.mark.parametrize(
        ("x", "labels", "message"),
        [
            (torch.ones(3, 2), torch.tensor([0, 1, 3]), "got 3 in row 2"),
            (torch.ones(3, 2), torch.tensor([0, 1]), "a label for each of 3 inputs, got 2"),
            (torch.ones(3, 2), torch.eye(3), "argmax"),
            (torch.ones(2, 3, 2), torch.tensor([0, 1]), "shape"),
            (torch.ones(0, 2), torch.tensor([]), "at least one"),
            (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), torch.tensor([0, 1]), "first in row 1"),
        ],
    )
    def test_data(self, problem, x, labels, message):
        with pytest.raises(ValueError, match=message):
            Classifier(x, labels, likelihood_of("softmax"), problem.mean, problem.kernel())

    def test_options(self, problem):
        with pytest.raises(ValueError, match="expand_at must be"):
            problem.model(expand_at="somewhere")
        with pytest.raises(TypeError, match="got GaussianLikelihood"):
            Classifier(problem.x, problem.labels, gpytorch.likelihoods.GaussianLikelihood(), problem.mean, RBFKernel())
        with pytest.raises(TypeError, match=r"Expected an ntk_gp\.LaplaceGP"):
            LaplaceMarginalLogLikelihood(likelihood_of("softmax"), gpytorch.models.GP())
        model = problem.model().eval()
        with pytest.raises(ValueError, match="'probit' or 'monte_carlo'"):
            model.predict_proba(problem.test_x, "exact")
        with pytest.raises(ValueError, match="first in row 0"):
            model.predict_proba(problem.test_x * float("nan"))
        with pytest.raises(ValueError, match="at least one sample"):
            model.predict_proba(problem.test_x, "monte_carlo", samples=0)
        with pytest.raises(RuntimeError, match="train mode"):
            model.train().predict_proba(problem.test_x)
