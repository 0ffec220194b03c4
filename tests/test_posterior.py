"""Training and prediction in GPyTorch's own models, against dense closed forms in float64."""

import copy
import pickle
import warnings

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning
from torch import Size, Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from tests import references


def make_network(inputs: int = 3, outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 10), nn.Tanh(), nn.Linear(10, outputs)).double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * max(1.0, float(expected.abs().max())))


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, kernel=None, likelihood=None):
        likelihood = likelihood or GaussianLikelihood()
        super().__init__(x, y, likelihood)
        self.mean_module = NetworkMean(network)
        self.covar_module = kernel or ScaleKernel(NTKKernel(network))
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class MultitaskGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, tasks: int):
        super().__init__(x, y, MultitaskGaussianLikelihood(num_tasks=tasks, rank=0))
        self.mean_module = NetworkMean(network, output="all")
        self.covar_module = ScaleKernel(NTKKernel(network, output="all"))
        self.double()

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


class Data:
    """Targets near the network's own outputs, and the dense prior of everything."""

    def __init__(self, n: int = 20, m: int = 7, batch_shape: tuple[int, ...] = (), outputs: int = 1):
        self.network = make_network(outputs=outputs)
        self.x, self.z = randn(*batch_shape, n, 3), randn(*batch_shape, m, 3)
        with torch.no_grad():
            self.y = self.network(self.x).squeeze(-1)
            self.y = self.y + 0.5 * torch.sin(3 * self.x[..., :1].expand_as(self.network(self.x)).reshape(self.y.shape))

    def posterior(self, outputscale: Tensor | float, noise: Tensor | float, extra=None) -> tuple[Tensor, Tensor]:
        joint = torch.cat([self.x, self.z], dim=-2)
        covariance = outputscale * references.kernel(self.network, joint)
        covariance = covariance if extra is None else covariance + extra(joint)
        mean = self.network(joint).detach().flatten(-2)
        return references.posterior(mean, covariance, noise, self.y.reshape(*self.x.shape[:-2], -1))


paths = pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        pytest.param([], 1e-8, id="cholesky"),
        pytest.param(
            [
                lambda: gpytorch.settings.max_cholesky_size(1),
                lambda: gpytorch.settings.eval_cg_tolerance(1e-10),
                lambda: gpytorch.settings.cg_tolerance(1e-10),
            ],
            1e-6,
            id="cg",
        ),
        pytest.param(
            [
                lambda: gpytorch.settings.max_cholesky_size(1),
                lambda: gpytorch.settings.eval_cg_tolerance(1e-10),
                lambda: gpytorch.settings.cg_tolerance(1e-10),
                gpytorch.settings.fast_pred_var,
            ],
            1e-6,
            id="love",
        ),
        pytest.param([lambda: ntk_gp.settings.memory_budget(20_000)], 1e-6, id="small budget"),
    ],
)


class applied:
    """Several settings at once."""

    def __init__(self, settings: list):
        self.contexts = [make() for make in settings]

    def __enter__(self):
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *args):
        for context in reversed(self.contexts):
            context.__exit__(*args)


class TestPosterior:
    @paths
    def test_mean_and_covariance(self, settings, tolerance):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network)
        model.likelihood.noise = 0.05
        model.covar_module.outputscale = 1.7
        model.eval()
        noise = model.likelihood.noise.detach()
        mean, covariance = data.posterior(model.covar_module.outputscale.detach(), noise)
        with applied(settings):
            prediction = model(data.z)
            assert_close(prediction.mean, mean, tolerance)
            assert_close(prediction.covariance_matrix, covariance, tolerance)
            assert_close(prediction.variance, covariance.diagonal(), tolerance)
            observed = model.likelihood(model(data.z))
            assert_close(observed.variance, covariance.diagonal() + noise, tolerance)
            assert_close(model(data.z[:2]).mean, mean[:2], tolerance)

    @paths
    @pytest.mark.parametrize("shared", [True, False])
    def test_batches(self, settings, tolerance, shared):
        data = Data(n=9, m=4, batch_shape=(2,))
        if shared:
            data.x = data.x[:1].expand(2, 9, 3)
        kernel = ScaleKernel(NTKKernel(data.network, batch_shape=Size([2])), batch_shape=Size([2]))
        model = AdaptedGP(data.x, data.y, data.network, kernel, GaussianLikelihood(batch_shape=Size([2])))
        model.likelihood.noise = torch.tensor([[0.05], [0.2]])
        model.covar_module.outputscale = torch.tensor([0.7, 2.0])
        model.eval()
        noise, scale = model.likelihood.noise.detach().squeeze(-1), model.covar_module.outputscale.detach()
        mean, covariance = data.posterior(scale[:, None, None], noise[:, None, None])
        with applied(settings):
            prediction = model(data.z)
            assert_close(prediction.mean, mean, tolerance)
            assert_close(prediction.variance, covariance.diagonal(dim1=-2, dim2=-1), tolerance)

    @paths
    def test_heteroscedastic_noise(self, settings, tolerance):
        data = Data()
        noise = torch.rand(20).double() + 0.02
        model = AdaptedGP(data.x, data.y, data.network, likelihood=FixedNoiseGaussianLikelihood(noise)).eval()
        mean, covariance = data.posterior(model.covar_module.outputscale.detach(), noise.diag())
        with applied(settings):
            prediction = model(data.z)
            assert_close(prediction.mean, mean, tolerance)
            assert_close(prediction.variance, covariance.diagonal(), tolerance)

    @paths
    def test_multitask(self, settings, tolerance):
        data = Data(n=8, m=3, outputs=2)
        model = MultitaskGP(data.x, data.y, data.network, tasks=2)
        model.covar_module.outputscale = 1.3
        model.likelihood.noise = 0.01
        model.likelihood.task_noises = torch.tensor([0.02, 0.1])
        model.eval()
        noise = (model.likelihood.task_noises + model.likelihood.noise).detach().repeat(8).diag()
        mean, covariance = data.posterior(model.covar_module.outputscale.detach(), noise)
        with applied(settings):
            prediction = model(data.z)
            assert_close(prediction.mean, mean.reshape(3, 2), tolerance)
            assert_close(prediction.variance, covariance.diagonal().reshape(3, 2), tolerance)

    @pytest.mark.parametrize("compose", ["sum", "scaled sum", "product"])
    @paths
    def test_composed_kernels(self, settings, tolerance, compose):
        data = Data()
        ntk, rbf = NTKKernel(data.network), RBFKernel()
        kernel = {"sum": ntk + rbf, "scaled sum": ScaleKernel(ntk + rbf), "product": ntk * rbf}[compose]
        model = AdaptedGP(data.x, data.y, data.network, kernel)
        model.likelihood.noise = 0.05
        model.eval()
        joint = torch.cat([data.x, data.z])
        prior, stationary = references.kernel(data.network, joint), rbf(joint).to_dense().detach()
        prior = prior * stationary if compose == "product" else prior + stationary
        if compose == "scaled sum":
            prior = prior * kernel.outputscale.detach()
        noise = model.likelihood.noise.detach()
        mean, covariance = references.posterior(data.network(joint).detach().squeeze(-1), prior, noise, data.y)
        with applied(settings):
            prediction = model(data.z)
            assert_close(prediction.mean, mean, tolerance)
            assert_close(prediction.variance, covariance.diagonal(), tolerance)

    def test_single_precision(self):
        data = Data()
        model = AdaptedGP(data.x.float(), data.y.float(), data.network).float()
        model.likelihood.noise = 0.05
        model.eval()
        mean, covariance = data.posterior(model.covar_module.outputscale.item(), 0.05)
        prediction = model(data.z.float())
        assert prediction.mean.dtype == prediction.variance.dtype == torch.float32
        assert_close(prediction.mean.double(), mean, 1e-4)
        assert_close(prediction.variance.double(), covariance.diagonal(), 1e-4)

    def test_a_double_network_in_a_single_precision_model(self):
        """The kernel alone, without a parameter to say its dtype."""
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network, NTKKernel(data.network.float()))
        model.covar_module.float()
        model.eval()
        data.network.double()
        mean, covariance = data.posterior(1.0, model.likelihood.noise.item())
        prediction = model(data.z)
        assert prediction.mean.dtype == prediction.variance.dtype == torch.float64
        assert_close(prediction.mean, mean, 1e-8)
        assert_close(prediction.variance, covariance.diagonal(), 1e-8)

    def test_gradients_with_respect_to_the_test_inputs(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()

        def outcome(z: Tensor) -> Tensor:
            prediction = model(z)
            return (prediction.mean + prediction.variance.sqrt()).sum()

        z = data.z.clone().requires_grad_()
        (actual,) = torch.autograd.grad(outcome(z), z)
        expected = torch.zeros_like(z)
        for i in range(len(z)):
            for j in range(3):
                step = torch.zeros_like(data.z)
                step[i, j] = 1e-6
                expected[i, j] = (outcome(data.z + step) - outcome(data.z - step)) / 2e-6
        assert_close(actual, expected.detach(), 1e-6)

    def test_samples_have_the_posterior_moments(self):
        data = Data(n=10, m=3)
        model = AdaptedGP(data.x, data.y, data.network).eval()
        prediction = model(data.z)
        torch.manual_seed(0)
        samples = prediction.rsample(Size([20_000]))
        assert_close(samples.mean(0), prediction.mean, 0.05)
        assert_close(samples.mT.cov(), prediction.covariance_matrix, 0.05)

    def test_adapting_to_its_own_outputs_changes_nothing(self):
        """The network is the prior mean: data that it explains leave the mean where it was."""
        data = Data()
        model = AdaptedGP(data.x, data.network(data.x).squeeze(-1).detach(), data.network).eval()
        assert_close(model(data.z).mean, data.network(data.z).squeeze(-1).detach(), 1e-10)


class TestMarginalLikelihood:
    def references(self, data: Data, model: AdaptedGP, x: Tensor) -> Tensor:
        covariance = model.covar_module.outputscale * references.kernel(data.network, x)
        covariance = covariance + model.likelihood.noise * torch.eye(len(x), dtype=x.dtype)
        return references.log_marginal_likelihood(data.y - data.network(x).squeeze(-1), covariance)

    @pytest.mark.parametrize("budget", [None, 20_000])
    @pytest.mark.parametrize("inputs", [False, True])
    def test_value_and_gradients(self, inputs, budget):
        data = Data()
        x = data.x.clone().requires_grad_(inputs)
        model = AdaptedGP(x, data.y, data.network)
        model.likelihood.noise = 0.1
        wanted = [*model.parameters(), *([x] if inputs else [])]
        with ntk_gp.settings.memory_budget(budget), gpytorch.settings.max_cholesky_size(10**6):
            value = ExactMarginalLogLikelihood(model.likelihood, model)(model(x), data.y)
            actual = torch.autograd.grad(value, wanted)
        reference = self.references(data, model, x)
        assert_close(value, reference, 1e-8)
        for one, other in zip(actual, torch.autograd.grad(reference, wanted), strict=True):
            assert_close(one, other, 1e-8)

    def test_variances_of_groups(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network, NTKKernel(data.network, variance_groups="layer"))
        model.covar_module.variance = torch.tensor([0.5, 2.0])
        counts = torch.tensor([40, 11])
        value = ExactMarginalLogLikelihood(model.likelihood, model)(model(data.x), data.y)
        covariance = references.kernel(
            data.network, data.x, variances=model.covar_module.variance.repeat_interleave(counts, dim=-1)
        )
        covariance = covariance + model.likelihood.noise * torch.eye(20, dtype=torch.float64)
        reference = references.log_marginal_likelihood(data.y - data.network(data.x).squeeze(-1).detach(), covariance)
        assert_close(value, reference, 1e-8)
        wanted = list(model.parameters())
        gradients = torch.autograd.grad(value, wanted), torch.autograd.grad(reference, wanted)
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, 1e-8)

    def test_multitask(self):
        data = Data(n=8, outputs=2)
        model = MultitaskGP(data.x, data.y, data.network, tasks=2)
        value = ExactMarginalLogLikelihood(model.likelihood, model)(model(data.x), data.y)
        noise = (model.likelihood.task_noises + model.likelihood.noise).repeat(8)
        covariance = model.covar_module.outputscale * references.kernel(data.network, data.x) + noise.diag()
        residual = (data.y - data.network(data.x).detach()).flatten()
        reference = references.log_marginal_likelihood(residual, covariance)
        assert_close(value, reference, 1e-8)
        wanted = list(model.parameters())
        gradients = torch.autograd.grad(value, wanted), torch.autograd.grad(reference, wanted)
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected, 1e-8)

    def test_fitting_finds_the_maximum(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -mll(model(data.x), data.y)
            loss.backward()
            return loss

        optimizer.step(closure)
        reference = self.references(data, model, data.x)
        for gradient in torch.autograd.grad(reference, list(model.parameters())):
            assert gradient.abs().max() < 1e-4


def count_linearisations(monkeypatch, kernel: NTKKernel) -> list:
    """Shapes of the inputs that the engine linearises from now on."""
    shapes: list = []
    engine = type(kernel._linearization.engine)
    linearize = engine.linearize
    monkeypatch.setattr(
        engine, "linearize", lambda self, x, *known: shapes.append(tuple(x.shape)) or linearize(self, x, *known)
    )
    return shapes


class TestCaches:
    def test_training_linearises_once(self, monkeypatch):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        shapes = count_linearisations(monkeypatch, model.covar_module.base_kernel)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (-mll(model(data.x), data.y)).backward()
            optimizer.step()
        assert shapes == [(1, 20, 3)]

    def test_predictions_do_not_linearise_the_training_inputs_again(self, monkeypatch):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        _ = model(data.z).variance
        shapes = count_linearisations(monkeypatch, model.covar_module.base_kernel)
        _ = model(data.z + 1).variance
        assert shapes and all(shape[-2] != 20 for shape in shapes)

    @pytest.mark.parametrize(
        "change",
        [
            lambda model, x: x.add_(0.5),
            lambda model, x: x.data.add_(0.5),
            lambda model, x: x[0].zero_(),
            lambda model, x: x.data[3:5].mul_(2.0),
            lambda model, x: x.copy_(x.roll(1, 0)),
            lambda model, x: x.numpy().__iadd__(0.25),
        ],
    )
    def test_inputs_changed_in_place(self, change):
        data = Data()
        kernel = NTKKernel(data.network)
        kernel(data.x).to_dense()
        operator = kernel(data.x).evaluate_kernel()
        _ = operator @ data.y.unsqueeze(-1)
        change(kernel, data.x)
        expected = references.kernel(data.network, data.x)
        assert_close(kernel(data.x).to_dense(), expected, 1e-10)
        assert_close(kernel(data.x) @ data.y.unsqueeze(-1), expected @ data.y.unsqueeze(-1), 1e-10)
        assert_close(kernel(data.x, diag=True), expected.diagonal(), 1e-10)

    @pytest.mark.parametrize(
        "change",
        [
            lambda kernel, network: kernel.load_state_dict(NTKKernel(network).state_dict()),
            lambda kernel, network: kernel.linearize(network),
            lambda kernel, network: torch._foreach_copy_([*kernel.network.buffers()], [*network.parameters()]),
            lambda kernel, network: kernel.network.load_state_dict(NTKKernel(network).network.state_dict()),
        ],
        ids=["load_state_dict", "linearize", "in place", "load_state_dict of the network"],
    )
    @torch.no_grad()
    def test_weights_changed(self, change):
        data = Data()
        kernel = NTKKernel(data.network)
        kernel(data.x).to_dense()
        other = copy.deepcopy(data.network)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        change(kernel, other)
        with torch.enable_grad():
            assert_close(kernel(data.x).to_dense(), references.kernel(other, data.x), 1e-10)

    def test_models_predict_anew_after_load_state_dict(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        before = model(data.z).mean
        with torch.no_grad():
            for parameter in data.network.parameters():
                parameter.mul_(1.5)
        model.load_state_dict(AdaptedGP(data.x, data.y, data.network).state_dict())
        mean, covariance = data.posterior(model.covar_module.outputscale.detach(), model.likelihood.noise.detach())
        assert_close(model(data.z).mean, mean, 1e-8)
        assert_close(model(data.z).variance, covariance.diagonal(), 1e-8)
        assert not torch.allclose(before, mean)

    def test_linearize_then_refresh(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        model(data.z)
        with torch.no_grad():
            data.network[0].weight.mul_(1.5)
        model.mean_module.linearize(data.network)
        model.covar_module.base_kernel.linearize(data.network)
        model.train()
        model.eval()
        mean, covariance = data.posterior(model.covar_module.outputscale.detach(), model.likelihood.noise.detach())
        assert_close(model(data.z).mean, mean, 1e-8)
        assert_close(model(data.z).variance, covariance.diagonal(), 1e-8)

    def test_hyperparameters_changed_between_predictions(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network)
        for noise, scale in ((0.05, 1.0), (0.5, 1.0), (0.5, 3.0)):
            model.train()
            model.likelihood.noise, model.covar_module.outputscale = noise, scale
            model.eval()
            mean, covariance = data.posterior(model.covar_module.outputscale.detach(), model.likelihood.noise.detach())
            assert_close(model(data.z).mean, mean, 1e-8)
            assert_close(model(data.z).variance, covariance.diagonal(), 1e-8)

    def test_set_train_data(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        model(data.z)
        data.x, data.y = data.x[:11] + 0.1, data.y[:11] - 0.1
        model.set_train_data(data.x, data.y, strict=False)
        mean, _ = data.posterior(model.covar_module.outputscale.detach(), model.likelihood.noise.detach())
        assert_close(model(data.z).mean, mean, 1e-8)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_of_a_model_are_independent(self, copied):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        expected = model(data.z).mean
        other = copied(model)
        other.train()
        other.likelihood.noise = 3.0
        other.eval()
        mean, _ = data.posterior(model.covar_module.outputscale.detach(), other.likelihood.noise.detach())
        assert_close(other(data.z).mean, mean, 1e-8)
        assert torch.equal(model(data.z).mean, expected)

    @pytest.mark.parametrize("love", [True, False])
    def test_fantasies(self, love):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        noise, scale = model.likelihood.noise.item(), model.covar_module.outputscale.item()
        with gpytorch.settings.fast_pred_var(love):
            before = model(data.z).mean.clone()
            new_x, new_y = randn(4, 3), randn(4)
            fantasy = model.get_fantasy_model(new_x, new_y)
            prediction = fantasy(data.z)
            assert torch.equal(model(data.z).mean, before)
        data.x, data.y = torch.cat([data.x, new_x]), torch.cat([data.y, new_y])
        mean, covariance = data.posterior(scale, noise)
        assert_close(prediction.mean, mean, 1e-8)
        assert_close(prediction.variance, covariance.diagonal(), 1e-8)

    def test_fantasies_of_several_outcomes(self):
        data = Data()
        model = AdaptedGP(data.x, data.y, data.network).eval()
        noise, scale = model.likelihood.noise.item(), model.covar_module.outputscale.item()
        model(data.z)
        new_x, new_y = randn(4, 3), randn(5, 4)
        prediction = model.get_fantasy_model(new_x, new_y)(data.z)
        x, y = data.x, data.y
        for i in range(5):
            data.x, data.y = torch.cat([x, new_x]), torch.cat([y, new_y[i]])
            mean, covariance = data.posterior(scale, noise)
            assert_close(prediction.mean[i], mean, 1e-8)
            assert_close(prediction.variance[i], covariance.diagonal(), 1e-8)


def test_missing_observations():
    """The mean; GPyTorch's variances count masked points as observed, for every kernel."""
    data = Data()
    model = AdaptedGP(data.x, data.y.clone(), data.network).eval()
    model.train_targets[[3, 8]] = float("nan")
    kept = [i for i in range(20) if i not in (3, 8)]
    data.x, data.y = data.x[kept], data.y[kept]
    mean, _ = data.posterior(model.covar_module.outputscale.detach(), model.likelihood.noise.detach())
    with gpytorch.settings.observation_nan_policy("mask"):
        assert_close(model(data.z).mean, mean, 1e-8)


def test_no_answer_that_is_not_converged_without_a_word():
    data = Data(n=60)
    model = AdaptedGP(data.x, data.y, data.network)
    model.likelihood.noise = 1e-4
    model.eval()
    mean, _ = data.posterior(model.covar_module.outputscale.detach(), 1e-4)
    with (
        warnings.catch_warnings(record=True) as caught,
        ntk_gp.settings.memory_budget(1000),
        gpytorch.settings.max_cholesky_size(1),
        gpytorch.settings.max_cg_iterations(3),
    ):
        warnings.simplefilter("always")
        error = (model(data.z).mean - mean).abs().max() / mean.abs().max()
    assert error < 1e-6 or any(issubclass(w.category, NumericalWarning) for w in caught)
