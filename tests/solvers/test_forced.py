"""`ntk_gp.settings.solver`: whichever is set solves, to the same posterior; what it cannot serve is an error."""

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood

from ntk_gp import NTKKernel, settings
from ntk_gp.solvers import SOLVERS, Spectrum, solver_class
from tests import references
from tests.adapted import LARGE, SMALL, AdaptedGP, assert_close, closed_form, data, network
from tests.solvers.test_solvers import Problem

pytestmark = pytest.mark.engine_independent

NAMES = [kind.name for kind in SOLVERS]
NOISE, SCALE = 0.1, 1.7
TEST_X = data(7, seed=3)[0]


def scaled(net: torch.nn.Module, **options) -> ScaleKernel:
    kernel = ScaleKernel(NTKKernel(net, **options)).double()
    kernel.outputscale = torch.tensor(SCALE, dtype=torch.float64)
    return kernel


def model_of(n: int, outputs: int = 1) -> tuple[AdaptedGP, torch.nn.Module]:
    net = network(outputs=outputs)
    if outputs == 1:
        x, y = data(n)
        likelihood = GaussianLikelihood().double()
        likelihood.noise = torch.tensor([NOISE], dtype=torch.float64)
        return AdaptedGP(x, y, net, scaled(net), likelihood), net
    x, y = data(n, outputs=outputs)
    likelihood = MultitaskGaussianLikelihood(outputs, has_task_noise=False).double()
    likelihood.noise = torch.tensor([NOISE], dtype=torch.float64)
    return AdaptedGP(x, y, net, scaled(net, output="all"), likelihood, output="all"), net


@pytest.fixture(autouse=True)
def converged():
    with settings.solve_tolerance(1e-12):
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("outputs", [1, 2])
def test_posteriors_equal_the_closed_form(name, n, outputs):
    model, net = model_of(n, outputs)
    x, y = model.train_inputs[0], model.train_targets.reshape(-1)
    mean, covariance = closed_form(net, x, y, TEST_X, NOISE, SCALE)
    with settings.solver(name), torch.no_grad():
        posterior = model.eval()(TEST_X)
        assert model.prediction_strategy.solver.name == name
        assert_close(posterior.mean.reshape(-1), mean)
        assert_close(posterior.covariance_matrix, covariance)
        assert_close(posterior.variance.reshape(-1), covariance.diagonal())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_more_data_are_solved_by_the_one_that_is_set(name, n):
    model, net = model_of(n)
    new_x, new_y = data(3, seed=9)
    x = torch.cat([model.train_inputs[0], new_x])
    mean, covariance = closed_form(net, x, torch.cat([model.train_targets, new_y]), TEST_X, NOISE, SCALE)
    with settings.solver(name), torch.no_grad():
        model.eval()(TEST_X)
        fantasy = model.get_fantasy_model(new_x, new_y)
        assert_close(fantasy(TEST_X).mean, mean)
        assert_close(fantasy(TEST_X).covariance_matrix, covariance)
        assert fantasy.prediction_strategy.solver.name == name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_marginal_likelihoods_are_by_the_one_that_is_set(name, n, monkeypatch):
    """Not by eigenvalues; values and gradients are the closed form's, or estimates of them."""
    monkeypatch.setattr(Spectrum, "__init__", lambda *_: pytest.fail("decomposed"))
    model, net = model_of(n)
    x, y = model.train_inputs[0], model.train_targets
    with settings.solver(name), gpytorch.settings.num_trace_samples(500):
        value = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x), y)
        gradients = torch.autograd.grad(value, list(model.parameters()))
    covariance = model.covar_module.outputscale * references.kernel(net, x)
    covariance = covariance + model.likelihood.noise * torch.eye(n, dtype=x.dtype)
    expected = references.log_marginal_likelihood(y - net(x).squeeze(-1).detach(), covariance)
    tolerance = 1e-8 if name != "iterative" else 1e-2
    assert_close(value.detach(), expected.detach(), tolerance)
    for one, other in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert_close(one, other, 1e-8 if name != "iterative" else 0.1)


class TestSetting:
    def test_none_is_by_cost(self):
        few, many = Problem(SMALL).system, Problem(400).system
        for value in (None, *NAMES, None):
            with settings.solver(value):
                names = [solver_class(system).name for system in (few, many)]
            assert names == (["function_space", "weight_space"] if value is None else [value, value])
        assert settings.solver.value() is None

    def test_before_the_users_cholesky_size(self):
        system = Problem(LARGE).system
        with gpytorch.settings.max_cholesky_size(10):
            assert solver_class(system).name == "iterative"
            with settings.solver("weight_space"):
                assert solver_class(system).name == "weight_space"

    def test_another_one_takes_the_place_of_what_is_kept(self):
        model, _ = model_of(LARGE)
        found = []
        for name in (*NAMES, None):
            with settings.solver(name):
                model.train().eval()(TEST_X)
            model(TEST_X)  # outside: it keeps what it has
            found.append(model.prediction_strategy.solver.name)
        assert found[:-1] == NAMES

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="'cholesky': it is one of " + ", ".join(map(repr, settings.solver.names))):
            settings.solver("cholesky")
        with pytest.raises(ValueError, match="no solver 3"):
            settings.solver._set_value(3)

    @pytest.mark.parametrize("name", ["function_space", "weight_space"])
    def test_too_little_memory(self, name):
        model, _ = model_of(LARGE)
        with (
            settings.solver(name),
            settings.memory_budget(5000),
            pytest.raises(MemoryError, match=rf"solver is '{name}', which .* 60 rows .*: it needs .* kB"),
        ):
            model.eval()(TEST_X)

    def test_batches_by_iteration(self):
        with settings.solver("iterative"), pytest.raises(ValueError, match=r"solves no batches of systems, .* are 3"):
            solver_class(Problem(LARGE, (3, 1, 1)).system)

    def test_second_derivatives(self):
        model, _ = model_of(LARGE)
        mll = ExactMarginalLogLikelihood(model.likelihood, model.train())
        with settings.solver("weight_space"), pytest.raises(RuntimeError, match=r"with ntk_gp.settings.solver set"):
            value = mll(model(*model.train_inputs), model.train_targets)
            torch.autograd.grad(value, list(model.parameters()), create_graph=True)
