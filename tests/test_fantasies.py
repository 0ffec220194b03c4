"""New data: fantasy models and `set_train_data` equal models made anew, and reuse what is known."""

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Size, Tensor

import ntk_gp.solvers.choice
from ntk_gp import NTKKernel
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.iterative import IterativeSolver
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from tests.adapted import LARGE, SMALL, AdaptedGP, assert_close, closed_form, data, network

WAYS = {"function": FunctionSpaceSolver, "weight": WeightSpaceSolver}


@pytest.fixture(params=["chosen", *(pytest.param(name, marks=pytest.mark.engine_independent) for name in WAYS)])
def way(request, monkeypatch):
    """As the package would, which is either of the others at one of the sizes, or one way forced."""
    if request.param in WAYS:
        monkeypatch.setattr(ntk_gp.solvers.choice, "solver_class", lambda system: WAYS[request.param])
    return request.param


@pytest.fixture
def extensions(monkeypatch):
    """The solvers that were extended, and those that were built from nothing."""
    extended, built = [], []
    for cls in WAYS.values():
        original, init = cls.extended, cls.__init__

        def counted(self, system, original=original):
            result = original(self, system)
            extended.append(result)
            return result

        def counted_init(self, system, known=None, init=init):
            if known is None:
                built.append(self)
            init(self, system, known)

        monkeypatch.setattr(cls, "extended", counted)
        monkeypatch.setattr(cls, "__init__", counted_init)
    return extended, built


def model_of(n: int, *batch: int, likelihood=None) -> tuple[AdaptedGP, Tensor, Tensor]:
    net, (x, y) = network(), data(n, *batch)
    kernel = ScaleKernel(NTKKernel(net, batch_shape=Size(batch)), batch_shape=Size(batch)).double()
    kernel.outputscale = torch.full(batch, 1.7, dtype=torch.float64)
    if likelihood is None:
        likelihood = GaussianLikelihood().double()
        likelihood.noise = torch.tensor([0.1], dtype=torch.float64)
    return AdaptedGP(x, y, net, kernel, likelihood).eval(), x, y


def check(model: AdaptedGP, x: Tensor, y: Tensor, noise: Tensor | float = 0.1) -> None:
    test_x = data(6, seed=7)[0]
    mean, covariance = closed_form(network(), x, y, test_x, torch.as_tensor(noise).reshape(-1).double(), 1.7)
    for _ in range(2):  # with and without caches
        posterior = model(test_x.expand(*y.shape[:-1], 6, 3))
        assert_close(posterior.mean, mean)
        assert_close(posterior.covariance_matrix, covariance)
        assert_close(posterior.variance, covariance.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("n", [SMALL, LARGE])
class TestFantasies:
    def test_one_batch(self, way, extensions, n):
        model, x, y = model_of(n)
        model(x)
        model.prediction_strategy.solver  # noqa: B018
        new_x, new_y = data(4, seed=3)
        before = len(extensions[1])
        fantasy = model.get_fantasy_model(new_x, new_y)
        check(fantasy, torch.cat([x, new_x]), torch.cat([y, new_y]))
        assert len(extensions[0]) == 1
        assert len(extensions[1]) == before
        check(model, x, y)  # the model itself knows nothing of it

    def test_several_targets_at_the_same_points(self, way, extensions, n):
        model, x, y = model_of(n)
        model(x)
        model.prediction_strategy.solver  # noqa: B018
        new_x, new_y = data(4, seed=3)[0], data(4, 5, seed=3)[1]
        fantasy = model.get_fantasy_model(new_x, new_y)
        assert fantasy.prediction_strategy.solver.system.batch == 1
        check(fantasy, torch.cat([x, new_x]), torch.cat([y.expand(5, -1), new_y], dim=-1))

    def test_several_points(self, way, extensions, n):
        model, x, y = model_of(n)
        model(x)
        new_x, new_y = data(4, 5, seed=3)
        fantasy = model.get_fantasy_model(new_x, new_y)
        check(fantasy, torch.cat([x.expand(5, -1, -1), new_x], dim=-2), torch.cat([y.expand(5, -1), new_y], dim=-1))
        assert len(extensions[0]) == 1

    def test_batch_models(self, way, n):
        model, x, y = model_of(n, 3)
        model(x)
        new_x, new_y = data(4, 3, seed=3)
        fantasy = model.get_fantasy_model(new_x, new_y)
        check(fantasy, torch.cat([x, new_x], dim=-2), torch.cat([y, new_y], dim=-1))

    def test_fantasies_of_batch_models(self, way, n):
        model, x, y = model_of(n, 3)
        model(x)
        new_x, new_y = data(4, 3, seed=3)[0], data(4, 5, 3, seed=3)[1]
        fantasy = model.get_fantasy_model(new_x, new_y)
        full_x = torch.cat([x, new_x], dim=-2)
        check(fantasy, full_x, torch.cat([y.expand(5, -1, -1), new_y], dim=-1))

    def test_fixed_noises(self, way, n):
        noise = torch.linspace(0.05, 0.5, n, dtype=torch.float64)
        model, x, y = model_of(n, likelihood=FixedNoiseGaussianLikelihood(noise).double())
        model(x)
        new_x, new_y = data(4, seed=3)
        new_noise = torch.linspace(0.3, 0.4, 4, dtype=torch.float64)
        fantasy = model.get_fantasy_model(new_x, new_y, noise=new_noise)
        check(fantasy, torch.cat([x, new_x]), torch.cat([y, new_y]), torch.cat([noise, new_noise]))

    def test_again_and_again(self, way, extensions, n):
        model, x, y = model_of(n)
        model(x)
        model.prediction_strategy.solver  # noqa: B018
        for seed in range(3, 8):
            new_x, new_y = data(1, seed=seed)
            model = model.get_fantasy_model(new_x, new_y)
            x, y = torch.cat([x, new_x]), torch.cat([y, new_y])
            check(model, x, y)
        if way != "chosen":  # the way may change once on the way from fewer points than parameters to more
            assert len(extensions[1]) == 1
        assert len(extensions[0]) >= 4

    def test_before_the_solver_was_needed(self, way, n):
        """Only variances were skipped; the fantasy must be right all the same."""
        model, x, y = model_of(n)
        with gpytorch.settings.skip_posterior_variances():
            model(data(3, seed=5)[0])
        new_x, new_y = data(4, seed=3)
        check(model.get_fantasy_model(new_x, new_y), torch.cat([x, new_x]), torch.cat([y, new_y]))

    def test_sums(self, n):
        net, (x, y), test_x = network(), data(n), data(6, seed=7)[0]
        matern = MaternKernel().double()
        model = AdaptedGP(x, y, net, NTKKernel(net) + matern).eval()
        model.likelihood.noise = torch.tensor([0.1], dtype=torch.float64)
        with torch.no_grad():
            model(test_x)
            new_x, new_y = data(4, seed=3)
            posterior = model.get_fantasy_model(new_x, new_y)(test_x)
            full_x, full_y = torch.cat([x, new_x]), torch.cat([y, new_y])
            mean, covariance = closed_form(net, full_x, full_y, test_x, 0.1, 1.0, added=matern)
            assert_close(posterior.mean, mean)
            assert_close(posterior.covariance_matrix, covariance)

    def test_several_outputs(self, way, n):
        net, (x, y), test_x = network(outputs=2), data(n, outputs=2), data(6, seed=7)[0]
        likelihood = MultitaskGaussianLikelihood(2, has_global_noise=False).double()
        likelihood.task_noises = torch.tensor([0.05, 0.3], dtype=torch.float64)
        model = AdaptedGP(x, y, net, NTKKernel(net, output="all"), likelihood, output="all").eval()
        model(test_x)
        new_x, new_y = data(4, seed=3, outputs=2)
        posterior = model.get_fantasy_model(new_x, new_y)(test_x)
        noise = torch.tensor([0.05, 0.3], dtype=torch.float64).repeat(n + 4)
        full_y = torch.cat([y, new_y]).reshape(-1)
        mean, covariance = closed_form(net, torch.cat([x, new_x]), full_y, test_x, noise)
        assert_close(posterior.mean, mean.reshape(6, 2))
        assert_close(posterior.covariance_matrix, covariance)

    def test_with_fast_variances(self, n):
        model, x, y = model_of(n)
        new_x, new_y = data(4, seed=3)
        test_x = data(6, seed=7)[0]
        _, covariance = closed_form(network(), torch.cat([x, new_x]), torch.cat([y, new_y]), test_x, 0.1, 1.7)
        with gpytorch.settings.fast_pred_var():
            model(test_x).variance  # noqa: B018
            variance = model.get_fantasy_model(new_x, new_y)(test_x).variance
        assert_close(variance, covariance.diagonal(), 5e-3)

    def test_gradients_with_respect_to_new_inputs(self, way, n):
        """As knowledge gradients need them: through the caches, which stay attached then."""
        model, x, _ = model_of(n)
        model(x)
        new_y, test_x = data(2, seed=3)[1], data(3, seed=7)[0]

        def fantasy(new_x: Tensor) -> tuple[Tensor, Tensor]:
            with gpytorch.settings.detach_test_caches(False):
                posterior = model.get_fantasy_model(new_x, new_y)(test_x)
                return posterior.mean, posterior.covariance_matrix

        assert torch.autograd.gradcheck(
            fantasy, data(2, seed=4)[0].requires_grad_(), atol=1e-6, nondet_tol=1e-10, fast_mode=True
        )


@pytest.mark.parametrize("n", [SMALL, LARGE])
class TestNewTrainingData:
    def test_more_data(self, way, extensions, n):
        model, x, y = model_of(n)
        check(model, x, y)
        new_x, new_y = data(4, seed=3)
        x, y = torch.cat([x, new_x]), torch.cat([y, new_y])
        before = len(extensions[1])
        model.set_train_data(x, y, strict=False)
        check(model, x, y)
        if way != "chosen":
            assert (len(extensions[0]), len(extensions[1])) == (1, before)

    def test_other_data(self, way, n):
        model, x, y = model_of(n)
        check(model, x, y)
        for seed in (3, 4):
            x, y = data(n, seed=seed)
            model.set_train_data(x, y)
            check(model, x, y)
        model.set_train_data(x[:7], y[:7], strict=False)
        check(model, x[:7], y[:7])

    def test_other_targets_alone_solve_nothing_anew(self, way, extensions, n):
        model, x, y = model_of(n)
        check(model, x, y)
        before = len(extensions[1])
        y = data(n, seed=3)[1]
        model.set_train_data(targets=y)
        check(model, x, y)
        assert len(extensions[1]) == before

    def test_hyperparameters_between(self, way, n):
        """A solver of other hyperparameters is never extended."""
        model, x, y = model_of(n)
        check(model, x, y)
        new_x, new_y = data(4, seed=3)
        x, y = torch.cat([x, new_x]), torch.cat([y, new_y])
        model.likelihood.noise = torch.tensor([0.2], dtype=torch.float64)
        model.set_train_data(x, y, strict=False)
        check(model, x, y, 0.2)

    def test_new_network_between(self, n):
        model, x, y = model_of(n)
        check(model, x, y)
        other = network(seed=8)
        model.covar_module.base_kernel.linearize(other)
        model.mean_module.linearize(other)
        model.train().eval()
        test_x = data(6, seed=7)[0]
        mean, covariance = closed_form(other, x, y, test_x, 0.1, 1.7)
        assert_close(model(test_x).mean, mean)
        assert_close(model(test_x).covariance_matrix, covariance)

    def test_iteration_is_not_extended(self, monkeypatch, n):
        monkeypatch.setattr(ntk_gp.solvers.choice, "solver_class", lambda system: IterativeSolver)
        model, x, y = model_of(n)
        new_x, new_y = data(4, seed=3)
        with ntk_gp.settings.solve_tolerance(1e-12):
            check(model, x, y)
            x, y = torch.cat([x, new_x]), torch.cat([y, new_y])
            model.set_train_data(x, y, strict=False)
            check(model, x, y)
