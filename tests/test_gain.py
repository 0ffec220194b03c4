"""The gain kernel, and sums of an NTK with kernels of known features, against explicit Jacobians in float64."""

import copy
import pickle

import gpytorch
import hypothesis
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, ConstantKernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior
from hypothesis import strategies as st
from linear_operator.operators import LowRankRootLinearOperator
from torch import Size, Tensor, nn

from ntk_gp import GainKernel, NTKKernel, NTKLinearOperator, adapted_network, draw_functions, settings, solver_report
from tests import references
from tests.adapted import LARGE, SMALL, AdaptedGP, assert_close, data, network
from tests.in_threads import in_threads
from tests.sums import KNOWN, SUMS, dense, gain, sum_kernel

pytestmark = pytest.mark.engine_independent

TWO_SPACES = ("function_space", "weight_space")


@pytest.fixture(params=["chosen", *TWO_SPACES, "iterative"])
def solver(request):
    with settings.solver(None if request.param == "chosen" else request.param):
        yield request.param


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def posterior_of(model: AdaptedGP, net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    joint = torch.cat([x, test_x], dim=-2)
    covariance = dense(model.covar_module, net, joint)
    return references.posterior(net(joint).flatten(-2), covariance, model.likelihood.noise, y.flatten(-1))


class TestAlone:
    def test_matrix(self):
        net, kernel = network(), GainKernel(network()).double()
        kernel.gain_variance, kernel.offset_variance = 0.3, 0.7
        (x1, _), (x2, _) = data(9), data(5, seed=1)
        matrix = kernel(x1).evaluate_kernel()
        assert isinstance(matrix, LowRankRootLinearOperator)
        assert_close(matrix.to_dense(), 0.3 * net(x1) @ net(x1).mT + 0.7)
        assert_close(kernel(x1, x2).to_dense(), 0.3 * net(x1) @ net(x2).mT + 0.7)
        assert_close(kernel(x1, diag=True), 0.3 * net(x1).squeeze(-1).square() + 0.7)
        assert_close(kernel(x2[:5], x1[:5], diag=True), 0.3 * (net(x1[:5]) * net(x2)).squeeze(-1) + 0.7)

    def test_all_outputs(self):
        net = network(outputs=3)
        kernel = GainKernel(net, output="all").double()
        (x1, _), (x2, _) = data(4), data(5, seed=1)
        expected = gain(kernel, net(x1), net(x2))
        assert_close(kernel(x1, x2).to_dense(), expected)
        assert expected[0, 1] == expected[1, 0] == 0
        assert_close(kernel(x1)[:6, :6].to_dense(), gain(kernel, net(x1), net(x1))[:6, :6])
        assert kernel.num_outputs_per_input(x1, x1) == 3

    def test_one_output_of_several(self):
        net = network(outputs=3)
        kernel = GainKernel(net, output=1).double()
        x, _ = data(4)
        assert_close(kernel(x).to_dense(), gain(kernel, net(x)[:, 1:2], net(x)[:, 1:2]))

    def test_batches(self):
        net = network()
        kernel = GainKernel(net, batch_shape=Size([2])).double()
        kernel.gain_variance, kernel.offset_variance = torch.tensor([0.2, 0.5]), torch.tensor([1.0, 2.0])
        x, _ = data(4, 3, 1)
        matrix = kernel(x)
        assert matrix.shape == (3, 2, 4, 4)
        assert_close(matrix.to_dense(), gain(kernel, net(x), net(x)))
        single, _ = data(4)
        assert_close(kernel[1](single).to_dense(), gain(kernel, net(single), net(single))[1])
        assert_close(kernel.expand_batch(Size([3, 2]))(single).to_dense()[2], kernel(single).to_dense())

    def test_active_dims(self):
        net = network(inputs=2)
        kernel = GainKernel(net, active_dims=(0, 2)).double()
        x, _ = data(4)
        assert_close(kernel(x).to_dense(), gain(kernel, net(x[:, [0, 2]]), net(x[:, [0, 2]])))

    def test_gradients(self):
        net, kernel = network(), GainKernel(network()).double()
        x, _ = data(5)
        weights = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def grads(matrix, x: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad((weights * matrix).sum(), [x, *kernel.parameters()])

        x = x.requires_grad_()
        for actual, expected in zip(
            grads(kernel(x).to_dense(), x), grads(gain(kernel, net(x), net(x)), x), strict=True
        ):
            assert_close(actual, expected)

    def test_a_variance_of_zero_has_derivatives(self):
        kernel = GainKernel(network(), offset_variance_constraint=gpytorch.constraints.Interval(-1.0, 1.0)).double()
        kernel.offset_variance = 0.0
        x, _ = data(5)
        (grad,) = torch.autograd.grad(kernel(x).to_dense().sum(), kernel.raw_offset_variance)
        assert_close(grad.reshape(()), torch.tensor(25 * 0.5, dtype=torch.float64))

    @pytest.mark.parametrize("make", [lambda k: k, ScaleKernel, lambda k: k + RBFKernel(), lambda k: k * RBFKernel()])
    def test_models(self, make):
        net, (x, y), (test_x, _) = network(), data(LARGE), data(7, seed=5)
        kernel = make(GainKernel(net)).double()
        model = AdaptedGP(x, y, net, kernel)
        joint = torch.cat([x, test_x])
        covariance = kernel(joint).to_dense()
        mean, expected = references.posterior(net(joint).squeeze(-1), covariance, model.likelihood.noise, y)
        likelihood = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x), y)
        residual = y - net(x).squeeze(-1).detach()
        noisy = covariance[:LARGE, :LARGE] + model.likelihood.noise * eye(LARGE)
        assert_close(likelihood, references.log_marginal_likelihood(residual, noisy))
        prediction = model.eval()(test_x)
        assert_close(prediction.mean, mean)
        assert_close(prediction.covariance_matrix, expected, 1e-7)

    def test_priors_and_state(self):
        kernel = GainKernel(
            network(), gain_variance_prior=GammaPrior(2.0, 1.0), offset_variance_prior=GammaPrior(3.0, 1.0)
        ).double()
        kernel.gain_variance, kernel.offset_variance = 0.3, 0.7
        assert {name for name, *_ in kernel.named_priors()} == {"gain_variance_prior", "offset_variance_prior"}
        for _, module, _, closure, setting in kernel.named_priors():
            setting(module, closure(module) * 2)
        assert_close(kernel.gain_variance.reshape(()), torch.tensor(0.6, dtype=torch.float64))
        x, _ = data(4)
        other = GainKernel(network(seed=1)).double()
        other.load_state_dict(kernel.state_dict(), strict=False)
        for copied in (pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel), other):
            assert_close(copied(x).to_dense(), kernel(x).to_dense())
        assert kernel.float()(x.float()).to_dense().dtype == torch.float32

    def test_errors_are_those_of_an_ntk(self):
        kernel = GainKernel(network()).double()
        x, _ = data(4)
        with pytest.raises(ValueError, match="cannot be evaluated at inputs of shape"):
            kernel(x[:, :2]).to_dense()
        with pytest.raises(ValueError, match="NaN"):
            kernel(x * torch.nan).to_dense()
        with pytest.raises(TypeError, match="Prior"):
            GainKernel(network(), gain_variance_prior=1.0)

    def test_a_new_snapshot(self):
        kernel, other = GainKernel(network()).double(), network(seed=1)
        x, _ = data(4)
        kernel(x).to_dense()
        kernel.linearize(other)
        assert_close(kernel(x).to_dense(), gain(kernel, other(x), other(x)))


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(names, id=key, marks=pytest.mark.thorough if key in ("gain", "constant") else ())
        for key, names in SUMS.items()
    ],
)
@pytest.mark.parametrize("n", [SMALL, LARGE])
class TestSums:
    def test_are_one_operator(self, names, n):
        net, (x, _), (other, _) = network(), data(n), data(5, seed=1)
        kernel = sum_kernel(net, names)
        matrix = kernel(x).evaluate_kernel()
        assert isinstance(matrix, NTKLinearOperator)
        expected, cross = dense(kernel, net, x), dense(kernel, net, x, other)
        assert_close(matrix.to_dense(), expected)
        assert_close(matrix.diagonal(dim1=-1, dim2=-2), expected.diagonal())
        assert_close(kernel(x, diag=True), expected.diagonal())
        assert_close(kernel(x, other).to_dense(), cross)
        assert_close(matrix[2:7, 1:4].to_dense(), expected[2:7, 1:4])
        assert_close(matrix[torch.tensor([3, 1]), torch.tensor([0, 2])], expected[[3, 1], [0, 2]])
        vectors = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert_close(matrix @ vectors, expected @ vectors)
        root = matrix.root_decomposition().root.to_dense()
        assert_close(root @ root.mT, expected, 1e-7)

    def test_marginal_likelihood(self, names, n, solver):
        if solver == "iterative":
            pytest.skip("estimates")
        net, (x, y) = network(), data(n)
        model = AdaptedGP(x, y, net, sum_kernel(net, names))
        _check_likelihood(model, net, x, y, second=solver == "chosen")

    def test_prediction(self, names, n, solver):
        net, (x, y), (test_x, _) = network(), data(n), data(7, seed=5)
        model = AdaptedGP(x, y, net, sum_kernel(net, names)).eval()
        mean, covariance = posterior_of(model, net, x, y, test_x)
        tolerance = 1e-6 if solver == "iterative" else 1e-8
        with torch.no_grad(), settings.solve_tolerance(1e-10):
            prediction = model(test_x)
            assert_close(prediction.mean, mean, tolerance)
            assert_close(prediction.variance, covariance.diagonal(), tolerance)
            assert_close(prediction.covariance_matrix, covariance, tolerance)
        if solver != "chosen":
            assert solver_report(model).solver == solver

    def test_adapted_network(self, names, n):
        net, (x, y), (test_x, _) = network(), data(n), data(7, seed=5)
        model = AdaptedGP(x, y, net, sum_kernel(net, names)).eval()
        mean, _ = posterior_of(model, net, x, y, test_x)
        adapted = adapted_network(model)
        assert_close(adapted(test_x), mean, 1e-8)
        assert_close(pickle.loads(pickle.dumps(adapted))(test_x), mean, 1e-8)

    def test_draws(self, names, n):
        """Weights have the posterior covariance that the solver's has: the draws' map from random numbers is exact."""
        net, (x, y), (test_x, _) = network(), data(n), data(7, seed=5)
        model = AdaptedGP(x, y, net, sum_kernel(net, names)).eval()
        mean, covariance = posterior_of(model, net, x, y, test_x)
        functions = draw_functions(model, 4000, generator=torch.Generator().manual_seed(0))
        rows = _features(model, test_x)
        weights = torch.cat([functions.weights, functions.column_weights], dim=-1)
        assert_close(functions(test_x), net(test_x).squeeze(-1) + weights @ rows.mT, 1e-9)
        # 4,000 draws give a covariance to about 3 standard errors of √(2/4000).
        spread = covariance.diagonal().sqrt()
        sample = torch.cov(functions(test_x).mT)
        assert ((sample - covariance) / (spread * spread[:, None])).abs().max() < 0.12
        assert ((functions(test_x).mean(0) - mean) / spread).abs().max() < 0.08


def _features(model: AdaptedGP, x: Tensor) -> Tensor:
    """[J, Ψ] at x, (m, P + q)."""
    matrix = model.covar_module(x).evaluate_kernel()
    return matrix.linearization.jacobian(x.unsqueeze(0)).rows()[0]


def _check_likelihood(model: AdaptedGP, net: nn.Module, x: Tensor, y: Tensor, second: bool = False) -> None:
    n = len(x)
    model.train()
    parameters = list(model.parameters())
    value = ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y)
    covariance = dense(model.covar_module, net, x) + model.likelihood.noise * eye(n)
    expected = references.log_marginal_likelihood((y - net(x).squeeze(-1)).detach(), covariance)
    assert_close(value, expected, 1e-9)
    grads, expected_grads = (torch.autograd.grad(v, parameters, create_graph=second) for v in (value, expected))
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert_close(actual, wanted, 1e-8)
    if second:
        directions = [torch.linspace(1.0, 2.0, g.numel(), dtype=g.dtype).reshape(g.shape) for g in grads]
        products = [
            torch.autograd.grad(sum((g * d).sum() for g, d in zip(gs, directions, strict=True)), parameters)
            for gs in (grads, expected_grads)
        ]
        for actual, wanted in zip(*products, strict=True):
            assert_close(actual, wanted, 1e-7)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    names=st.lists(st.sampled_from(sorted(KNOWN)), min_size=1, max_size=4),
    groups=st.sampled_from([None, "layer", "parameter"]),
    seed=st.integers(0, 1000),
    n=st.integers(3, 70),
    way=st.sampled_from([None, *TWO_SPACES]),
)
def test_any_sum(names, groups, seed, n, way):
    net, (x, y), (test_x, _) = network(seed=seed), data(n, seed=seed), data(4, seed=seed + 1)
    model = AdaptedGP(x, y, net, sum_kernel(net, tuple(names), groups, seed))
    with settings.solver(way):
        _check_likelihood(model, net, x, y)
        mean, covariance = posterior_of(model, net, x, y, test_x)
        with torch.no_grad():
            prediction = model.eval()(test_x)
            assert_close(prediction.mean, mean, 1e-8)
            assert_close(prediction.covariance_matrix, covariance, 1e-8)


def make(n: int = LARGE, names: tuple[str, ...] = SUMS["all"]) -> tuple[AdaptedGP, nn.Module, Tensor, Tensor, Tensor]:
    net, (x, y), (test_x, _) = network(), data(n), data(7, seed=5)
    return AdaptedGP(x, y, net, sum_kernel(net, names)), net, x, y, test_x


class TestWhatAnNTKHas:
    @pytest.mark.parametrize("way", TWO_SPACES)
    def test_fantasies(self, way):
        net, (x, y), (new_x, new_y), (test_x, _) = network(), data(LARGE), data(3, seed=3), data(7, seed=5)
        with settings.solver(way), torch.no_grad():
            model = AdaptedGP(x, y, net, sum_kernel(net, SUMS["all"])).eval()
            model(test_x)
            fantasy = model.get_fantasy_model(new_x, new_y)
            prediction = fantasy(test_x)
            both, targets = torch.cat([x, new_x]), torch.cat([y, new_y])
            mean, covariance = posterior_of(model, net, both, targets, test_x)
            assert_close(prediction.mean, mean)
            assert_close(prediction.covariance_matrix, covariance)
            assert_close(model(test_x).mean, posterior_of(model, net, x, y, test_x)[0])

    def test_fast_variances(self):
        model, net, x, y, test_x = make()
        with torch.no_grad(), gpytorch.settings.fast_pred_var():
            variance = model.eval()(test_x).variance
        assert_close(variance, posterior_of(model, net, x, y, test_x)[1].diagonal(), 1e-2)

    def test_missing_targets(self):
        model, net, x, y, test_x = make()
        seen = torch.arange(LARGE) % 5 != 0
        model.set_train_data(x, y.masked_fill(~seen, torch.nan), strict=False)
        with torch.no_grad(), gpytorch.settings.observation_nan_policy("mask"):
            prediction = model.eval()(test_x)
        mean, covariance = posterior_of(model, net, x[seen], y[seen], test_x)
        assert_close(prediction.mean, mean)
        assert_close(prediction.covariance_matrix, covariance)

    def test_fixed_noise(self):
        net, (x, y) = network(), data(LARGE)
        noise = torch.linspace(0.01, 0.5, LARGE, dtype=torch.float64)
        likelihood = FixedNoiseGaussianLikelihood(noise).double()
        model = AdaptedGP(x, y, net, sum_kernel(net, SUMS["all"]), likelihood=likelihood)
        _check_likelihood(model, net, x, y)

    def test_the_mean_is_learned_too(self):
        model, net, x, y, _ = make()
        model.mean_module = gpytorch.means.ConstantMean().double()
        parameters = list(model.train().parameters())
        value = ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y)
        covariance = dense(model.covar_module, net, x) + model.likelihood.noise * eye(LARGE)
        expected = references.log_marginal_likelihood(y - model.mean_module.constant, covariance)
        for actual, wanted in zip(*(torch.autograd.grad(v, parameters) for v in (value, expected)), strict=True):
            assert_close(actual, wanted)

    @pytest.mark.parametrize("n", [SMALL, LARGE])
    def test_gradients_to_test_inputs(self, n):
        model, net, x, y, test_x = make(n)
        model.eval()
        test_x = test_x.requires_grad_()
        prediction, expected = model(test_x), _differentiable_posterior(model, net, x, y, test_x)
        for actual, wanted in zip((prediction.mean, prediction.covariance_matrix), expected, strict=True):
            weights = torch.linspace(0.5, 1.0, actual.numel(), dtype=torch.float64).reshape(actual.shape)
            grads = [torch.autograd.grad((weights * v).sum(), test_x, retain_graph=True)[0] for v in (actual, wanted)]
            assert_close(*grads, 1e-7)

    def test_gradients_to_training_inputs(self):
        model, net, x, y, _ = make(SMALL)
        x = x.requires_grad_()
        model.set_train_data(x, y, strict=False)
        value = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x), y)
        residual = y - net(x).squeeze(-1)
        covariance = _differentiable(model.covar_module, net, x, x) + model.likelihood.noise * eye(SMALL)
        expected = references.log_marginal_likelihood(residual, covariance)
        assert_close(torch.autograd.grad(value, x)[0], torch.autograd.grad(expected, x)[0])

    def test_float32(self):
        net, (x, y), (test_x, _) = network(), data(LARGE), data(7, seed=5)
        exact = AdaptedGP(x, y, net, sum_kernel(net, SUMS["all"]))
        mean, covariance = posterior_of(exact, net, x, y, test_x)
        model = copy.deepcopy(exact).float().eval()
        model.set_train_data(x.float(), y.float(), strict=False)
        with torch.no_grad():
            prediction = model(test_x.float())
        assert prediction.mean.dtype == torch.float32
        assert_close(prediction.mean.double(), mean, 1e-4)
        assert_close(prediction.variance.double(), covariance.diagonal(), 5e-3)

    def test_all_outputs(self):
        outputs = 3
        net, (x, y), (test_x, _) = network(outputs=outputs), data(20, outputs=outputs), data(5, seed=5)
        kernel = ScaleKernel(NTKKernel(net, output="all")) + ScaleKernel(GainKernel(net, output="all"))
        likelihood = MultitaskGaussianLikelihood(outputs, rank=0, has_global_noise=False).double()
        model = AdaptedGP(x, y, net, kernel.double(), likelihood, output="all")
        assert isinstance(model.covar_module(x).evaluate_kernel(), NTKLinearOperator)
        joint = torch.cat([x, test_x])
        noise = likelihood.task_noises.repeat(20)
        mean, covariance = references.posterior(net(joint).flatten(), dense(kernel, net, joint), noise, y.flatten())
        prediction = model.eval()(test_x)
        assert_close(prediction.mean.flatten(), mean)
        assert_close(prediction.covariance_matrix, covariance)
        assert_close(adapted_network(model)(test_x).flatten(), mean)
        value = ExactMarginalLogLikelihood(likelihood, model.train())(model(x), y)
        matrix = dense(kernel, net, x) + torch.diag(noise)
        expected = references.log_marginal_likelihood((y - net(x)).flatten().detach(), matrix)
        parameters = list(model.parameters())
        for actual, wanted in zip(
            *(torch.autograd.grad(v, parameters) for v in (value * 20 / 60 * 3, expected)), strict=True
        ):
            assert_close(actual, wanted)

    @pytest.mark.parametrize("shape", [(2,), (3, 2)])
    def test_batches(self, shape):
        net, (x, y) = network(), data(SMALL, *shape)
        batch = Size([2])
        kernel = (
            ScaleKernel(NTKKernel(net, batch_shape=batch), batch_shape=batch)
            + GainKernel(net, batch_shape=batch)
            + ConstantKernel(batch_shape=batch)
        ).double()
        kernel.kernels[0].outputscale = torch.tensor([0.5, 2.0])
        kernel.kernels[1].gain_variance = torch.tensor([0.1, 0.4])
        matrix = kernel(x).evaluate_kernel()
        assert isinstance(matrix, NTKLinearOperator)
        expected = dense(kernel, net, x)
        assert_close(matrix.to_dense(), expected)
        noise = torch.full((SMALL,), 0.1, dtype=torch.float64)
        noisy = matrix.add_diagonal(noise)
        residual = y.requires_grad_()
        inv_quad, logdet = noisy.inv_quad_logdet(residual.unsqueeze(-1), logdet=True)
        wanted = expected + torch.diag(noise)
        solution = torch.linalg.solve(wanted, residual.unsqueeze(-1)).squeeze(-1)
        assert_close(inv_quad, (residual * solution).sum(-1))
        assert_close(logdet, torch.logdet(wanted))
        assert_close(kernel[0](data(SMALL)[0]).to_dense(), dense(kernel, net, data(SMALL)[0])[0])

    def test_threads(self, monkeypatch):
        # GPyTorch enters a setting of the whole process for each prediction: two threads leave it as neither found it.
        monkeypatch.setattr(gpytorch.settings.cg_tolerance, "_global_value", gpytorch.settings.cg_tolerance.value())
        model, net, x, y, test_x = make()
        mean, covariance = posterior_of(model.eval(), net, x, y, test_x)

        def predict(_: int) -> None:
            with torch.no_grad():
                prediction = model(test_x)
            assert_close(prediction.mean, mean)
            assert_close(prediction.variance, covariance.diagonal())

        in_threads(predict)

    def test_little_memory(self):
        """A budget that has no room for K, or for the features: exact by other ways."""
        net, (x, y), (test_x, _) = network(), data(300), data(7, seed=5)
        model = AdaptedGP(x, y, net, sum_kernel(net, SUMS["all"])).eval()
        mean, covariance = posterior_of(model, net, x, y, test_x)
        for budget, is_one in ((400_000, True), (100_000, True), (30_000, False)):
            with settings.memory_budget(budget), settings.solve_tolerance(1e-10), torch.no_grad():
                assert isinstance(model.covar_module(x).evaluate_kernel(), NTKLinearOperator) == is_one
                if is_one:
                    prediction = copy.deepcopy(model)(test_x)
                    assert_close(prediction.mean, mean, 1e-6)
                    assert_close(prediction.variance, covariance.diagonal(), 1e-5)

    def test_pickle_and_deepcopy(self):
        model, *_, test_x = make()
        with torch.no_grad():
            expected = model.eval()(test_x).mean
            for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
                assert_close(copied(test_x).mean, expected)

    def test_a_changed_network_is_not_overlooked(self):
        model, _, _, _, test_x = make(names=SUMS["gain"])
        with torch.no_grad():
            model.eval()(test_x)
            next(k for k in model.modules() if isinstance(k, GainKernel)).linearize(network(seed=1))
            with pytest.raises(RuntimeError, match="changed"):
                model(test_x)


def _differentiable(kernel, net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """The dense matrix with a graph to the inputs: the Jacobian's rows by autograd through autograd."""
    ntk = next(k for k in kernel.modules() if isinstance(k, NTKKernel))
    scale = next(k for k in kernel.modules() if isinstance(k, ScaleKernel) and k.base_kernel is ntk).outputscale
    rows1, rows2 = _rows(net, x1), _rows(net, x2)
    without = AdditiveKernel(*(k for k in _leaves(kernel) if ntk not in list(k.modules())))
    return scale * rows1 @ rows2.mT + dense(without, net, x1, x2)


def _leaves(kernel) -> list:
    return [leaf for k in kernel.kernels for leaf in _leaves(k)] if isinstance(kernel, AdditiveKernel) else [kernel]


def _rows(net: nn.Module, x: Tensor) -> Tensor:
    parameters = list(net.parameters())
    values = net(x).squeeze(-1)
    rows = [torch.autograd.grad(value, parameters, create_graph=True) for value in values]
    return torch.stack([torch.cat([piece.reshape(-1) for piece in row]) for row in rows])


def _differentiable_posterior(model, net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    joint = torch.cat([x, test_x])
    covariance = _differentiable(model.covar_module, net, joint, joint)
    return references.posterior(net(joint).squeeze(-1), covariance, model.likelihood.noise.detach(), y)


class TestOtherSums:
    """What is not one linear model is exact as before."""

    @pytest.mark.parametrize(
        "make_kernel",
        [
            lambda net: ScaleKernel(NTKKernel(net)) + GainKernel(net) + MaternKernel(1.5),
            lambda net: ScaleKernel(NTKKernel(net)) + GainKernel(net) * RBFKernel(),
            lambda net: NTKKernel(net) + NTKKernel(net) + GainKernel(net),
            lambda net: NTKKernel(net) + LinearKernel(active_dims=(1,)),
        ],
        ids=["Matérn", "product", "two NTKs", "other columns"],
    )
    def test_are_exact(self, make_kernel):
        net, (x, y), (test_x, _) = network(), data(LARGE), data(7, seed=5)
        kernel = make_kernel(net).double()
        assert not isinstance(kernel(x).evaluate_kernel(), NTKLinearOperator)
        model = AdaptedGP(x, y, net, kernel).eval()
        joint = torch.cat([x, test_x])
        covariance = sum(part(joint).to_dense() for part in kernel.kernels)
        mean, expected = references.posterior(net(joint).squeeze(-1), covariance, model.likelihood.noise, y)
        prediction = model(test_x)
        assert_close(prediction.mean, mean)
        assert_close(prediction.covariance_matrix, expected, 1e-7)

    def test_a_gain_of_another_network(self):
        """Exact, as one linear model; functions drawn from it would need both networks."""
        net, other, (x, y), (test_x, _) = network(), network(seed=1), data(LARGE), data(7, seed=5)
        kernel = (ScaleKernel(NTKKernel(net)) + GainKernel(other)).double()
        model = AdaptedGP(x, y, net, kernel).eval()
        joint = torch.cat([x, test_x])
        scale, own = kernel.kernels[0].outputscale, gain(kernel.kernels[1], other(joint), other(joint))
        covariance = scale * references.kernel(net, joint) + own
        mean, expected = references.posterior(net(joint).squeeze(-1), covariance, model.likelihood.noise, y)
        assert_close(model(test_x).mean, mean)
        assert_close(model(test_x).covariance_matrix, expected)
        with pytest.raises(ValueError, match="same network"):
            adapted_network(model)

    def test_the_same_columns_of_the_inputs(self):
        net, (x, y), (test_x, _) = network(inputs=2), data(LARGE), data(7, seed=5)
        dims = (0, 2)
        kernel = ScaleKernel(NTKKernel(net, active_dims=dims)) + GainKernel(net, active_dims=dims) + ConstantKernel()
        kernel = kernel.double()
        matrix = kernel(x).evaluate_kernel()
        assert isinstance(matrix, NTKLinearOperator)
        assert_close(matrix.to_dense(), dense(kernel, net, x[:, [0, 2]]))
        model = AdaptedGP(x, y, net, kernel).eval()
        model.mean_module = gpytorch.means.ZeroMean()
        functions = draw_functions(model, 3)
        weights = torch.cat([functions.weights, functions.column_weights], dim=-1)
        assert_close(functions(test_x), weights @ _features_at(kernel, test_x).mT, 1e-9)

    def test_sums_of_matrices(self):
        net, (x, y), (test_x, _) = network(), data(LARGE), data(7, seed=5)
        model = AddedMatrices(x, y, net).eval()
        joint = torch.cat([x, test_x])
        covariance = references.kernel(net, joint) + gain(model.gain, net(joint), net(joint))
        mean, expected = references.posterior(net(joint).squeeze(-1), covariance, model.likelihood.noise, y)
        assert_close(model(test_x).mean, mean)
        assert_close(model(test_x).covariance_matrix, expected, 1e-7)
        value = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x), y)
        noisy = covariance[:LARGE, :LARGE] + model.likelihood.noise * eye(LARGE)
        residual = (y - net(x).squeeze(-1)).detach()
        assert_close(value, references.log_marginal_likelihood(residual, noisy))


def _features_at(kernel, x: Tensor) -> Tensor:
    matrix = kernel(x).evaluate_kernel()
    return matrix.linearization.jacobian(matrix.x1.unsqueeze(0)).rows()[0]


class AddedMatrices(gpytorch.models.ExactGP):
    """A model whose `forward` adds matrices."""

    def __init__(self, x: Tensor, y: Tensor, net: nn.Module):
        super().__init__(x, y, GaussianLikelihood().double())
        self.net, self.ntk, self.gain = [net], NTKKernel(net), GainKernel(net).double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        mean = self.net[0](x).squeeze(-1).detach()
        return MultivariateNormal(mean, self.ntk(x) + self.gain(x))
