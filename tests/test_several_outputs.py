"""Several outputs of a network: as a batch of kernels, one for each, and as tasks of one kernel, some or all."""

import copy
import pickle
import warnings
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import ConstantKernel, LinearKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, MultitaskGaussianLikelihood
from torch import Size, Tensor, nn

from ntk_gp import (
    FixedNoiseMultitaskGaussianLikelihood,
    GainKernel,
    LinearizedNetwork,
    NetworkMean,
    NTKKernel,
    TangentMaternKernel,
    adapted_network,
    draw_functions,
)
from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.network import FrozenNetwork
from ntk_gp.testing import explicit_jacobian
from tests import references

C = 3
SCALES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def network(outputs: int = C) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def points(n: int, seed: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NET = network()
X, Z = points(8, 1), points(5, 2)
Y = torch.randn(8, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
NOISE = 0.02 + 0.1 * torch.rand(8, C, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def features(x: Tensor) -> Tensor:
    """J of each output, (C, n, P)."""
    return explicit_jacobian(NET, x).unflatten(0, (len(x), C)).transpose(0, 1)


def tangent(x1: Tensor, x2: Tensor) -> Tensor:
    """(C, n, m)."""
    return features(x1) @ features(x2).mT


def values(x: Tensor) -> Tensor:
    """(C, n)."""
    return NET(x).detach().mT


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: Any, mean: Any, kernel: Any, distribution: type):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module, self.distribution = mean, kernel, distribution

    def forward(self, x: Tensor) -> MultivariateNormal:
        return self.distribution(self.mean_module(x), self.covar_module(x))


def batch_model(kernel: Any, x: Tensor = X, y: Tensor = Y.mT, noise: Tensor = NOISE.mT) -> Model:
    likelihood = FixedNoiseGaussianLikelihood(noise)
    return Model(x, y, likelihood, NetworkMean(NET, output="batch"), kernel, MultivariateNormal)


def scaled(**options: Any) -> ScaleKernel:
    kernel = ScaleKernel(NTKKernel(NET, output="batch", **options), batch_shape=Size([C])).double()
    kernel.outputscale = SCALES
    return kernel


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestKernelOfEachOutput:
    def test_is_that_outputs(self):
        kernel = NTKKernel(NET, output="batch")
        assert kernel.batch_shape == kernel(X).batch_shape == (C,)
        assert_close(kernel(X).to_dense(), tangent(X, X))
        assert_close(kernel(X, Z).to_dense(), tangent(X, Z))
        assert_close(kernel(X, diag=True), tangent(X, X).diagonal(dim1=-2, dim2=-1))
        for c in range(C):
            assert_close(kernel(X)[c].to_dense(), NTKKernel(NET, output=c)(X).to_dense())

    def test_inputs_for_all_outputs_and_for_each(self):
        kernel, mean = NTKKernel(NET, output="batch"), NetworkMean(NET, output="batch")
        own = torch.stack([points(4, seed) for seed in range(C)])
        more = torch.stack([points(4, seed) for seed in range(2)])
        for x, expected, f in (
            (X.expand(C, -1, -1), tangent(X, X), values(X)),
            (own, torch.stack([tangent(own[c], own[c])[c] for c in range(C)]), [values(own[c])[c] for c in range(C)]),
            (more.unsqueeze(1), torch.stack([tangent(x, x) for x in more]), [values(x) for x in more]),
            (more.unsqueeze(1).expand(-1, C, -1, -1), torch.stack([tangent(x, x) for x in more]), [*map(values, more)]),
        ):
            assert_close(kernel(x).to_dense(), expected)
            assert_close(mean(x), f if isinstance(f, Tensor) else torch.stack(f))
            assert_close(mean(x.clone().requires_grad_()), mean(x))

    @pytest.mark.parametrize("index", [1, slice(1, None), torch.tensor([2, 0, 0]), (slice(None), slice(2, 5))])
    def test_slices(self, index):
        kernel = NTKKernel(NET, output="batch", variance_groups="layer")
        kernel.variance = torch.rand(C, 1, 2, dtype=torch.float64) + 0.5
        expected = kernel(X).to_dense()
        assert_close(kernel(X)[index].to_dense(), expected[index])
        assert_close(kernel(X).evaluate_kernel()[index].to_dense(), expected[index])
        if not isinstance(index, tuple):
            assert_close(kernel[index](X).to_dense(), expected[index])
        larger = kernel.expand_batch(2, C)
        assert larger.batch_shape == larger(X).batch_shape == (2, C)
        assert_close(larger[1](X)[index].to_dense(), expected[index])

    def test_variances_of_groups_and_normalisation(self):
        kernel = NTKKernel(NET, output="batch", variance_groups="layer", normalize=True)
        kernel.variance = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(C, 1, 2)
        weights = kernel.variance.detach().repeat_interleave(torch.tensor([21, 24]), dim=-1)
        J = features(X)
        assert_close(kernel(X).to_dense(), (J * weights) @ J.mT / J.square().sum(-1).mean())

    def test_copies_and_pickles(self):
        kernel = NTKKernel(NET, output="batch")
        expected = kernel(X).to_dense()
        for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
            assert torch.equal(other(X).to_dense(), expected)
        assert kernel.float()(X.float()).to_dense().dtype == torch.float32

    def test_jacobian_and_report(self):
        kernel = NTKKernel(NET, output="batch")
        assert_close(kernel.jacobian(X).to_dense(), features(X))
        v = torch.randn(C, 45, 2, dtype=torch.float64)
        assert_close(kernel.jacobian(X) @ v, features(X) @ v)
        assert [entry["parameter"] for entry in kernel.engine_report(X)] == [name for name, _ in NET.named_parameters()]

    def test_derivatives_by_inputs(self):
        x, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
        weights = torch.randn(C, 8, 5, dtype=torch.float64)
        (NTKKernel(NET, output="batch")(x, Z).to_dense() * weights).sum().backward()
        J = references.jacobian(NET, expected).unflatten(0, (8, C)).transpose(0, 1)
        ((J @ features(Z).mT) * weights).sum().backward()
        assert_close(x.grad, expected.grad)

    def test_stationary_kernels_of_its_metric(self):
        kernel = TangentMaternKernel(NET, nu=0.5, output="batch")
        kernel.lengthscale = SCALES[:, None, None]
        square = tangent(X, X).diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        other = tangent(Z, Z).diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
        distance = (square + other - 2 * tangent(X, Z)).sqrt()
        assert_close(kernel(X, Z).to_dense(), (-distance / SCALES[:, None, None]).exp())
        assert kernel.median_distance(X) > 0


class TestHowManyOutputs:
    def test_are_found(self):
        class Pairs(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv1d(1, 4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x.unflatten(-1, (1, 2))).squeeze(-1)

        assert NTKKernel(Pairs(), output="batch", input_shape=(2,)).batch_shape == (4,)
        with pytest.raises(ValueError, match="not known before it is given inputs"):
            NTKKernel(Pairs(), output="batch")
        kernel = NTKKernel(Pairs().double(), output="batch", batch_shape=Size([4]))
        assert kernel(X).to_dense().shape == (4, 8, 8)

    @pytest.mark.parametrize("kernel", [NTKKernel, GainKernel])
    def test_another_number_is_refused(self, kernel):
        assert kernel(NET, output="batch", batch_shape=Size([2, C]))(X).to_dense().shape == (2, C, 8, 8)
        with pytest.raises(ValueError, match=r"batch_shape=\(4,\) ends in 4.* the network has 3"):
            kernel(NET, output="batch", batch_shape=Size([4]))(X).to_dense()

    def test_inputs_of_other_batches_are_refused(self):
        x = points(8, 0).reshape(2, 4, 2)
        with pytest.raises(RuntimeError, match=r"unsqueeze\(-3\)"):
            NTKKernel(NET, output="batch")(x).to_dense()
        with pytest.raises(ValueError, match=r"unsqueeze\(-3\)"):
            NetworkMean(NET, output="batch")(x)

    def test_a_batch_that_repeats_one_output_is_said(self):
        kernel = NTKKernel(NET, output=0, batch_shape=Size([C]))
        with pytest.warns(UserWarning, match="output='batch'"):
            kernel(X).to_dense()
        one = network(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernel(Z).to_dense()  # once
            NTKKernel(NET, output=0, batch_shape=Size([2]))(X).to_dense()
            NTKKernel(one, batch_shape=Size([C]))(X).to_dense()
            NTKKernel(one, output=0, batch_shape=Size([1]))(X).to_dense()

    def test_columns_of_inputs_are_no_outputs(self):
        with pytest.raises(NotImplementedError, match="last_dim_is_batch"):
            NTKKernel(NET, output="batch")(X, last_dim_is_batch=True).to_dense()


def known_sums() -> dict[str, tuple[Any, Any]]:
    """Kernels, and their matrices (C, n, m)."""
    rbf, constant, linear = (kind(batch_shape=Size([C])) for kind in (RBFKernel, ConstantKernel, LinearKernel))
    gain = GainKernel(NET, output="batch")
    gain.gain_variance, gain.offset_variance = SCALES, SCALES.flip(0)
    s = SCALES[:, None, None]

    def of_gain(a: Tensor, b: Tensor) -> Tensor:
        return s * values(a).unsqueeze(-1) * values(b).unsqueeze(-2) + s.flip(0)

    def dense(kernel: Any, a: Tensor, b: Tensor) -> Tensor:
        return kernel.double()(a, b).to_dense().detach()

    return {
        "alone": (scaled(), lambda a, b: s * tangent(a, b)),
        "with gain": (scaled() + gain, lambda a, b: s * tangent(a, b) + of_gain(a, b)),
        "with known features": (
            scaled() + constant + linear,
            lambda a, b: s * tangent(a, b) + dense(constant, a, b) + dense(linear, a, b),
        ),
        "with RBF": (scaled() + rbf, lambda a, b: s * tangent(a, b) + dense(rbf, a, b)),
        "times RBF": (scaled() * rbf, lambda a, b: s * tangent(a, b) * dense(rbf, a, b)),
        "with one output's gain": (scaled() + GainKernel(NET, output=1), None),
    }


def posterior(matrix: Any, noise: Tensor, y: Tensor, z: Tensor = Z) -> tuple[Tensor, Tensor]:
    """In closed form, of each output: (C, m) and (C, m, m)."""
    both = torch.cat([X, z])
    found = [references.posterior(values(both)[c], matrix(both, both)[c], torch.diag(noise[c]), y[c]) for c in range(C)]
    return torch.stack([mean for mean, _ in found]), torch.stack([covariance for _, covariance in found])


class TestModelOfEachOutput:
    @pytest.mark.parametrize("name", [name for name, (_, matrix) in known_sums().items() if matrix is not None])
    def test_posterior_and_likelihood(self, name):
        kernel, matrix = known_sums()[name]
        model = batch_model(kernel)
        mean, covariance = posterior(matrix, NOISE.mT, Y.mT)
        likelihoods = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(model.train()(X), Y.mT)
        residuals, noisy = Y.mT - values(X), matrix(X, X) + torch.diag_embed(NOISE.mT)
        expected = [references.log_marginal_likelihood(r, A) for r, A in zip(residuals, noisy, strict=True)]
        assert_close(likelihoods, torch.stack(expected))
        likelihoods.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        with torch.no_grad():
            prediction = model.eval()(Z)
            assert_close(prediction.mean, mean)
            assert_close(prediction.covariance_matrix, covariance)
            assert_close(model(Z).variance, covariance.diagonal(dim1=-2, dim2=-1))
            with gpytorch.settings.fast_pred_var():
                assert_close(model(Z).variance, covariance.diagonal(dim1=-2, dim2=-1))
            assert prediction.sample(Size([2])).shape == (2, C, 5)

    def test_gains_of_other_outputs_are_added_all_the_same(self):
        kernel = known_sums()["with one output's gain"][0]
        gain = kernel.kernels[1]
        expected = SCALES[:, None, None] * tangent(X, X) + gain(X).to_dense()
        assert_close(kernel(X).to_dense(), expected)

    def test_hyperparameters_are_each_outputs_own(self):
        model = batch_model(scaled())
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        (-objective(model.train()(X), Y.mT)).sum().backward()
        for c in range(C):
            kernel = ScaleKernel(NTKKernel(NET, output=c)).double()
            kernel.outputscale = SCALES[c]
            likelihood = FixedNoiseGaussianLikelihood(NOISE[:, c])
            own = Model(X, Y[:, c], likelihood, NetworkMean(NET, output=c), kernel, MultivariateNormal).train()
            (-gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, own)(own(X), Y[:, c])).backward()
            assert_close(model.covar_module.raw_outputscale.grad[c], kernel.raw_outputscale.grad)

    def test_inputs_that_were_expanded(self):
        with torch.no_grad():
            expected = batch_model(scaled()).eval()(Z)
            model = batch_model(scaled(), X.expand(C, -1, -1)).eval()
            for prediction in (model(Z), model(Z.expand(C, -1, -1))):
                assert_close(prediction.mean, expected.mean)
                assert_close(prediction.covariance_matrix, expected.covariance_matrix)

    def test_missing_targets(self):
        y = Y.mT.clone()
        y[:, 2] = y[0, 4] = torch.nan
        model = batch_model(scaled(), y=y).eval()
        noise = NOISE.mT.clone()
        noise[y.isnan()] = 1e12  # as good as not observed
        mean, _ = posterior(known_sums()["alone"][1], noise, y.nan_to_num(0.0))
        with torch.no_grad(), gpytorch.settings.observation_nan_policy("mask"):
            assert_close(model(Z).mean, mean, 1e-8)
            assert_close(adapted_network(model)(Z), model(Z).mean)
            assert draw_functions(model, 2)(Z).shape == (2, C, 5)

    def test_fantasies(self):
        x, y, noise = points(2, 7), torch.randn(4, C, 2, dtype=torch.float64), NOISE.mT[:, :2]
        model = batch_model(scaled()).eval()
        both = torch.cat([X, x]), torch.cat([NOISE.mT, noise], -1)
        with torch.no_grad():
            model(Z)
            one = model.get_fantasy_model(x, y[0], noise=noise)
            several = model.get_fantasy_model(x.expand(C, -1, -1), y, noise=noise.expand(4, -1, -1))
            for i in range(2):
                expected = batch_model(scaled(), both[0], torch.cat([Y.mT, y[i]], -1), both[1]).eval()(Z)
                assert_close(several(Z).mean[i], expected.mean)
                if i == 0:
                    assert_close(one(Z).mean, expected.mean)
                    assert_close(one(Z).variance, expected.variance)

    def test_as_the_tasks_of_one_distribution(self):
        """GPyTorch's batch-independent multitask model."""

        class Tasks(Model):
            def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
                return MultitaskMultivariateNormal.from_batch_mvn(super().forward(x))

        likelihood = MultitaskGaussianLikelihood(num_tasks=C, rank=0, has_task_noise=False).double()
        likelihood.noise = 0.1
        model = Tasks(X, Y, likelihood, NetworkMean(NET, output="batch"), scaled(), MultivariateNormal).eval()
        noise = torch.full((C, 8), 0.1, dtype=torch.float64)
        mean, covariance = posterior(known_sums()["alone"][1], noise, Y.mT)
        with torch.no_grad():
            assert_close(model(Z).mean, mean.mT)
            assert_close(model(Z).variance, covariance.diagonal(dim1=-2, dim2=-1).mT)
            with pytest.raises(ValueError, match="put together from a batch"):
                adapted_network(model)

    @pytest.mark.parametrize("name", ["alone", "with gain", "with known features"])
    def test_networks_and_functions_handed_out(self, name):
        kernel, matrix = known_sums()[name]
        model = batch_model(kernel).eval()
        mean, covariance = posterior(matrix, NOISE.mT, Y.mT)
        adapted = adapted_network(model)
        assert_close(adapted(Z), mean)
        assert_close(adapted(Z.expand(2, 1, -1, -1)), mean.expand(2, -1, -1))
        own = torch.stack([Z, Z + 1, Z])
        assert_close(adapted(own), torch.stack([adapted(x)[c] for c, x in enumerate(own)]))
        functions = draw_functions(model, 4000, generator=torch.Generator().manual_seed(0))
        draws = functions(Z)
        assert draws.shape == (4000, C, 5)
        standard = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        assert ((draws.mean(0) - mean).abs() < 5 * standard / 4000**0.5).all()
        assert ((draws.var(0) / standard.square()).log().abs() < 0.2).all()
        # Outputs are independent of one another.
        first, second = draws[:, 0, 0] - mean[0, 0], draws[:, 1, 0] - mean[1, 0]
        assert abs(float((first * second).mean() / (first.std() * second.std()))) < 0.1

    def test_states_are_loaded(self):
        adapted = adapted_network(batch_model(scaled()).eval())
        assert adapted.displacement.shape == (C, 45)
        other = LinearizedNetwork(network(), output="batch")
        other.load_state_dict(adapted.state_dict())
        assert_close(other(Z), adapted(Z))
        with pytest.raises(ValueError, match=r"shape \(3, 45\)"):
            LinearizedNetwork(network(), torch.zeros(45), output="batch")


SELECTIONS = [pytest.param(chosen, id=str(chosen)) for chosen in ("all", [2, 0], [-1])]


def picked(chosen: Any) -> list[int]:
    return list(range(C)) if chosen == "all" else [i % C for i in chosen]


def tasks_model(chosen: Any, y: Tensor, noise: Tensor) -> Model:
    kernel = ScaleKernel(NTKKernel(NET, output=chosen)).double()
    kernel.outputscale = 0.75
    likelihood = FixedNoiseMultitaskGaussianLikelihood(noise)
    return Model(X, y, likelihood, NetworkMean(NET, output=chosen), kernel, MultitaskMultivariateNormal)


class TestTasks:
    """Some outputs, or all, and noise of its own for each point and output."""

    @pytest.mark.parametrize("chosen", SELECTIONS)
    def test_matrices(self, chosen):
        kernel, index = NTKKernel(NET, output=chosen), picked(chosen)
        J, K = (features(x)[index].transpose(0, 1).flatten(0, 1) for x in (X, Z))
        k = len(index)
        assert kernel(X).shape == (8 * k, 8 * k)
        assert_close(kernel(X).to_dense(), J @ J.mT)
        assert_close(kernel(X, Z).to_dense(), J @ K.mT)
        assert_close(kernel(X, diag=True), J.square().sum(-1))
        for rows in (slice(k, 3 * k), slice(1, 2 * k), torch.tensor([0, 2 * k - 1, 1])):
            assert_close(kernel(X)[rows, :].to_dense(), (J @ J.mT)[rows])
        assert_close(NetworkMean(NET, output=chosen)(X), values(X)[index].mT)
        gain = GainKernel(NET, output=chosen)
        f = values(X)[index].mT.diag_embed().flatten(0, 1)
        eye = torch.eye(k, dtype=torch.float64).repeat(8, 1)
        assert_close(gain(X).to_dense(), gain.gain_variance[0] * (f @ f.mT) + gain.offset_variance[0] * (eye @ eye.mT))

    @pytest.mark.parametrize("missing", [False, True])
    @pytest.mark.parametrize("chosen", SELECTIONS)
    def test_posterior(self, chosen, missing):
        index = picked(chosen)
        y, noise = Y[:, index].clone(), NOISE[:, index]
        if missing:
            y[2] = y[4, 0] = torch.nan
        J, K = (features(x)[index].transpose(0, 1).flatten(0, 1) * 0.75**0.5 for x in (X, Z))
        observed = ~y.flatten().isnan()
        both, f = torch.cat([J[observed], K]), torch.cat([values(x)[index].mT.flatten() for x in (X, Z)])
        f = torch.cat([f[: len(J)][observed], f[len(J) :]])
        D = torch.diag(noise.flatten()[observed])
        mean, covariance = references.posterior(f, both @ both.mT, D, y.flatten()[observed])
        model = tasks_model(chosen, y, noise).eval()
        with torch.no_grad(), gpytorch.settings.observation_nan_policy("mask" if missing else "ignore"):
            prediction = model(Z)
            assert_close(prediction.mean.flatten(), mean)
            assert_close(prediction.covariance_matrix, covariance)
            assert_close(adapted_network(model)(Z).flatten(), mean)
            draws = draw_functions(model, 4000, generator=torch.Generator().manual_seed(0))(Z)
            assert draws.shape == (4000, 5, len(index))
            standard = covariance.diagonal().sqrt()
            assert ((draws.mean(0).flatten() - mean).abs() < 5 * standard / 4000**0.5).all()
            assert ((draws.flatten(1).var(0) / standard.square()).log().abs() < 0.2).all()
            observations = model.likelihood(prediction, noise=noise[:5])
            assert_close(observations.variance, prediction.variance + noise[:5])

    @pytest.mark.engine_independent
    def test_no_backward_pass_for_what_is_left_out(self):
        terms = StructuredEngine(FrozenNetwork(NET, output=[2, 0])).linearize(X.unsqueeze(0)).terms
        assert terms and {term.gradients.shape[2] for term in terms} == {2}

    @pytest.mark.parametrize(
        "chosen, error, message",
        [
            ([0, 0], ValueError, "each once"),
            ([], ValueError, "one output or more"),
            ([0, True], TypeError, "list of integers"),
            ([0, 3], ValueError, "out of range: the network has 3 outputs"),
            ([0, -3], ValueError, "names an output twice"),
            (1.5, TypeError, "'batch'"),
        ],
    )
    def test_what_is_none_of_the_outputs_is_refused(self, chosen, error, message):
        with pytest.raises(error, match=message):
            NTKKernel(NET, output=chosen)(X).to_dense()
