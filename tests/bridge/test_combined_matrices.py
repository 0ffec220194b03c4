"""Kernel matrices combined in a model's forward: exact, however they are put together, on both sides of 800 points."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import IndexKernel, Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.operators import (
    BatchRepeatLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    MulLinearOperator,
    PsdSumLinearOperator,
    ZeroLinearOperator,
)
from linear_operator.utils.warnings import NumericalWarning
from torch import Size, Tensor, nn

from ntk_gp import NetworkMean, NTKKernel, NTKLinearOperator, settings
from ntk_gp.bridge.prediction_strategies import NTKPredictionStrategy
from tests import references
from tests.adapted import SMALL, AdaptedGP, assert_close, data, network, reference_kernel
from tests.marks import beyond

N_TEST = 9


class Model(gpytorch.models.ExactGP):
    """GPyTorch's Hadamard multitask model, with a function that puts the matrix together."""

    def __init__(self, x: Tensor, tasks: Tensor, y: Tensor, net: nn.Module, combine: Callable[..., LinearOperator]):
        likelihood = gpytorch.likelihoods.GaussianLikelihood()
        super().__init__((x, tasks), y, likelihood)
        torch.manual_seed(0)
        self.mean_module = NetworkMean(net)
        self.covar = ScaleKernel(NTKKernel(net))
        self.second = NTKKernel(network(seed=3, width=5))
        self.rbf, self.matern, self.task = RBFKernel(), MaternKernel(), IndexKernel(num_tasks=3)
        self.combine = combine
        self.to(x.dtype)
        self.covar.outputscale, likelihood.noise = 1.7, 0.1

    def forward(self, x: Tensor, tasks: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.combine(self, x, tasks))


class Case(NamedTuple):
    """How to put a matrix together, and the dense one from those of the NTK, another NTK, RBF, and tasks."""

    combine: Callable[[Model, Tensor, Tensor], LinearOperator]
    dense: Callable[..., Tensor]


def positive(x: Tensor) -> Tensor:
    """A positive definite matrix with entries of its own, for products with tensors."""
    return 1 + x @ x.mT


CASES = {
    "hadamard": Case(lambda m, x, i: m.covar(x).mul(m.task(i)), lambda k, l, r, t, x: k * t),
    "hadamard the other way": Case(lambda m, x, i: m.task(i).mul(m.covar(x)), lambda k, l, r, t, x: k * t),
    "hadamard, evaluated": Case(
        lambda m, x, i: m.covar(x).evaluate_kernel() * m.task(i).evaluate_kernel(), lambda k, l, r, t, x: k * t
    ),
    "times two": Case(lambda m, x, i: m.covar(x) * 2.0, lambda k, l, r, t, x: 2 * k),
    "times two, evaluated": Case(lambda m, x, i: 2.0 * m.covar(x).evaluate_kernel(), lambda k, l, r, t, x: 2 * k),
    "plus rbf": Case(lambda m, x, i: m.covar(x) + m.rbf(x), lambda k, l, r, t, x: k + r),
    "rbf plus": Case(lambda m, x, i: m.rbf(x) + m.covar(x), lambda k, l, r, t, x: k + r),
    "plus rbf, evaluated": Case(
        lambda m, x, i: m.covar(x).evaluate_kernel() + m.rbf(x).evaluate_kernel(), lambda k, l, r, t, x: k + r
    ),
    "psd sum": Case(lambda m, x, i: PsdSumLinearOperator(m.covar(x), m.rbf(x)), lambda k, l, r, t, x: k + r),
    "times rbf": Case(lambda m, x, i: m.covar(x) * m.rbf(x), lambda k, l, r, t, x: k * r),
    "rbf times": Case(lambda m, x, i: m.rbf(x) * m.covar(x), lambda k, l, r, t, x: k * r),
    "times ntk": Case(lambda m, x, i: m.covar(x) * m.second(x), lambda k, l, r, t, x: k * l),
    "times itself": Case(lambda m, x, i: m.covar(x) * m.covar(x), lambda k, l, r, t, x: k * k),
    "plus ntk": Case(lambda m, x, i: m.covar(x) + m.second(x), lambda k, l, r, t, x: k + l),
    "plus transposed": Case(lambda m, x, i: m.covar(x) + m.covar(x).mT, lambda k, l, r, t, x: 2 * k),
    "jitter": Case(lambda m, x, i: m.covar(x).add_jitter(0.2), lambda k, l, r, t, x: k + 0.2 * eye(k)),
    "jitter, evaluated": Case(
        lambda m, x, i: m.covar(x).evaluate_kernel().add_jitter(0.2), lambda k, l, r, t, x: k + 0.2 * eye(k)
    ),
    "times tensor": Case(lambda m, x, i: m.covar(x) * positive(x), lambda k, l, r, t, x: k * positive(x)),
    "times dense": Case(
        lambda m, x, i: DenseLinearOperator(positive(x)) * m.covar(x), lambda k, l, r, t, x: k * positive(x)
    ),
    "times diagonal": Case(
        lambda m, x, i: m.rbf(x) + m.covar(x) * DiagLinearOperator(x[..., 0].square()),
        lambda k, l, r, t, x: r + k * torch.diag_embed(x[..., 0].square()),
    ),
    "plus tensor": Case(lambda m, x, i: m.covar(x) + positive(x), lambda k, l, r, t, x: k + positive(x)),
    "sum of products": Case(
        lambda m, x, i: m.covar(x) * m.task(i) + m.second(x) * m.rbf(x) * 0.5,
        lambda k, l, r, t, x: k * t + l * r / 2,
    ),
    "product of sums": Case(
        lambda m, x, i: (m.covar(x) + m.rbf(x)) * (m.second(x) + m.rbf(x)) * 0.3,
        lambda k, l, r, t, x: (k + r) * (l + r) * 0.3,
    ),
    "three factors": Case(lambda m, x, i: m.covar(x) * m.rbf(x) * m.task(i), lambda k, l, r, t, x: k * r * t),
    "scaled product": Case(lambda m, x, i: (m.covar(x) * m.task(i)).mul(2.5), lambda k, l, r, t, x: 2.5 * k * t),
    "a difference": Case(lambda m, x, i: m.covar(x) - m.covar(x) * 0.4, lambda k, l, r, t, x: 0.6 * k),
    "by hand": Case(
        lambda m, x, i: ConstantMulLinearOperator(m.covar(x).evaluate_kernel(), torch.tensor(1.5).to(x)),
        lambda k, l, r, t, x: 1.5 * k,
    ),
    "dense tensor": Case(lambda m, x, i: m.covar(x).to_dense() + m.rbf(x).to_dense(), lambda k, l, r, t, x: k + r),
    "dense operator": Case(
        lambda m, x, i: DenseLinearOperator(m.covar(x).to_dense() * m.task(i).to_dense()), lambda k, l, r, t, x: k * t
    ),
    "permuted": Case(
        lambda m, x, i: m.covar(x.flip(-2))[..., torch.arange(x.shape[-2]).flip(0), :][
            ..., :, torch.arange(x.shape[-2]).flip(0)
        ],
        lambda k, l, r, t, x: k,
    ),
}


def eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype)


def reference(model: Model, case: Case, net: nn.Module, x: Tensor, tasks: Tensor) -> Tensor:
    """The matrix in float64 with the graph of the hyperparameters, the NTKs by explicit Jacobians."""
    ntk = model.covar.outputscale * reference_kernel(net, x)
    other = reference_kernel(network(seed=3, width=5), x)
    return case.dense(ntk, other, model.rbf(x).to_dense(), model.task(tasks).to_dense(), x)


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    (x, y), test_x = data(n), data(N_TEST, seed=1)[0]
    tasks, test_tasks = (torch.randint(3, (k, 1), generator=generator) for k in (n, N_TEST))
    return x, tasks, y, test_x, test_tasks


def gradients(value: Tensor, model: Model) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        value, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


@pytest.mark.parametrize("n", [12, beyond(801)])
@pytest.mark.parametrize("name", CASES)
def test_likelihood_gradients_and_predictions(name, n):
    case, net, (x, tasks, y, test_x, test_tasks) = CASES[name], network(), inputs(n)
    model = Model(x, tasks, y, net, case.combine)
    joint = torch.cat([x, test_x]), torch.cat([tasks, test_tasks])
    prior, mean = reference(model, case, net, *joint), net(joint[0]).squeeze(-1).detach()

    actual = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x, tasks), y)
    noisy = prior[:n, :n] + model.likelihood.noise * eye(prior[:n, :n])
    expected = references.log_marginal_likelihood(y - mean[:n], noisy)
    assert_close(actual, expected)
    for a, b in zip(gradients(actual, model), gradients(expected, model), strict=True):
        assert_close(a, b, 1e-7)

    with torch.no_grad():
        posterior = model.eval()(test_x, test_tasks)
        expected_mean, covariance = references.posterior(mean, prior, model.likelihood.noise, y)
        assert isinstance(model.prediction_strategy, NTKPredictionStrategy)
        assert_close(posterior.mean, expected_mean, 1e-7)
        assert_close(posterior.variance, covariance.diagonal(), 1e-7)
        assert_close(posterior.covariance_matrix, covariance, 1e-7)


@pytest.mark.engine_independent
@pytest.mark.parametrize("n", [799, 1000])
@pytest.mark.parametrize("name", ["hadamard", "plus rbf"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_precisions_around_the_size_at_which_gpytorch_iterates(name, n, dtype):
    case, net, (x, tasks, y, test_x, test_tasks) = CASES[name], network(), inputs(n)
    single = copy.deepcopy(net).to(dtype)
    model = Model(x.to(dtype), tasks, y.to(dtype), single, case.combine).eval()
    with torch.no_grad():
        posterior = model(test_x.to(dtype), test_tasks)
        variance = posterior.variance.double()
        model.double()
        net = single.double()
        joint = torch.cat([x, test_x]).to(dtype).double(), torch.cat([tasks, test_tasks])
        prior, mean = reference(model, case, net, *joint), net(joint[0]).squeeze(-1)
        _, covariance = references.posterior(mean, prior, model.likelihood.noise, y)
    error = ((variance - covariance.diagonal()) / covariance.diagonal()).abs().max()
    assert error <= (1e-7 if dtype == torch.float64 else 5e-3)


@pytest.mark.engine_independent
@pytest.mark.parametrize("name", ["hadamard", "times two", "product of sums", "psd sum"])
@pytest.mark.parametrize("base_samples", [False, True])
def test_samples_are_of_full_rank(name, base_samples):
    """Draws of the prior at more points than GPyTorch factorises, by the root that they are made from."""
    case, net, (x, tasks, y, *_) = CASES[name], network(width=40), inputs(850)
    model = Model(x, tasks, y, net, case.combine)
    with torch.no_grad():
        prior = MultivariateNormal(torch.zeros(850, dtype=x.dtype), case.combine(model, x, tasks))
        expected = reference(model, case, net, x, tasks)
        if base_samples:  # the images of unit vectors are the root's columns
            samples = prior.rsample(Size([850]), base_samples=eye(expected))
            assert_close(samples.mT @ samples, expected, 1e-7)
        else:
            samples = prior.sample(Size([4000]))
            deviation = samples.square().mean(0) / expected.diagonal() - 1
            assert deviation.abs().max() <= 6 * (2 / 4000) ** 0.5
            values, vectors = torch.linalg.eigh(expected)
            direction = samples @ vectors[:, -150]  # beyond rank 100
            assert abs(float(direction.square().mean() / values[-150].clamp_min(1e-300)) - 1) <= 6 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("name", ["hadamard", "plus rbf", "times two", "times tensor", "sum of products"])
@pytest.mark.parametrize("n", [12, beyond(801)])
def test_batches(name, n):
    case, net = CASES[name], network()
    (x, y), test_x = data(n, 2), data(N_TEST, 2, seed=1)[0]
    tasks, test_tasks = (torch.randint(3, (2, k, 1)) for k in (n, N_TEST))
    model = Model(x, tasks, y, net, case.combine)
    joint = torch.cat([x, test_x], -2), torch.cat([tasks, test_tasks], -2)
    prior, mean = reference(model, case, net, *joint), net(joint[0]).squeeze(-1).detach()
    actual = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x, tasks), y)
    noisy = prior[..., :n, :n] + model.likelihood.noise * torch.eye(n, dtype=x.dtype)
    expected = references.log_marginal_likelihood(y - mean[..., :n], noisy)
    assert_close(actual, expected)
    for a, b in zip(gradients(actual.sum(), model), gradients(expected.sum(), model), strict=True):
        assert_close(a, b, 1e-7)
    with torch.no_grad():
        posterior = model.eval()(test_x, test_tasks)
        expected_mean, covariance = references.posterior(mean, prior, model.likelihood.noise, y)
        assert_close(posterior.mean, expected_mean, 1e-7)
        assert_close(posterior.covariance_matrix, covariance, 1e-7)


@pytest.mark.engine_independent
@pytest.mark.parametrize("repeated", ["repeat", "expand", "batch repeat", "targets"])
@pytest.mark.parametrize("name", ["hadamard", "plus rbf", "times two", "jitter"])
def test_repetitions(name, repeated):
    n, case, net = 801, CASES[name], network()
    x, tasks, y, *_ = inputs(n)
    model = Model(x, tasks, y, net, case.combine)
    targets = torch.stack([data(n, seed=seed)[1] for seed in range(2)])
    noise = DiagLinearOperator(torch.full((n,), 0.1, dtype=x.dtype))
    matrix = case.combine(model, x, tasks) + noise
    if repeated == "repeat":
        matrix = matrix.repeat(2, 1, 1)
    elif repeated == "expand":
        matrix = matrix.expand(2, n, n)
    elif repeated == "batch repeat":
        matrix = BatchRepeatLinearOperator(matrix.evaluate_kernel(), Size([2]))
    mean = torch.zeros(*(() if repeated == "targets" else (2,)), n, dtype=x.dtype)
    actual = MultivariateNormal(mean, matrix).log_prob(targets)
    dense = reference(model, case, net, x, tasks) + 0.1 * torch.eye(n, dtype=x.dtype)
    expected = torch.distributions.MultivariateNormal(mean, dense).log_prob(targets)
    assert_close(actual, expected)
    for a, b in zip(gradients(actual.sum(), model), gradients(expected.sum(), model), strict=True):
        assert_close(a, b, 1e-7)


def test_constants_with_more_batches_than_the_matrix():
    net, x = network(), data(7)[0]
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for matrix in (NTKKernel(net)(x), NTKKernel(net)(x).evaluate_kernel(), NTKKernel(net)(x) + RBFKernel().double()(x)):
        assert_close((matrix * scale.reshape(2, 1, 1)).to_dense(), matrix.to_dense() * scale.reshape(2, 1, 1))


@pytest.mark.engine_independent
def test_roots_of_factors_are_exact():
    """What GPyTorch multiplies by roots of its own accord."""
    net, x = network(width=40), data(850)[0]
    kernel, other = NTKKernel(net), RBFKernel().double()
    with torch.no_grad():
        product = MulLinearOperator(kernel(x).evaluate_kernel(), kernel(x).evaluate_kernel())
        assert_close(product.to_dense(), references.kernel(net, x).square())
        prior = MultivariateNormal(torch.zeros(850, dtype=x.dtype), kernel(x))
        samples = prior.rsample(Size([850]), base_samples=torch.eye(850, dtype=x.dtype))
        assert_close(samples.mT @ samples, references.kernel(net, x))
    assert other(x).shape == (850, 850)


def test_a_joint_matrix_is_computed_only_where_it_is_asked_for(monkeypatch):
    """Predicting at m points from n takes no (n + m)² numbers."""
    net, (x, tasks, y, test_x, test_tasks) = network(), inputs(300)
    model = Model(x, tasks, y, net, CASES["hadamard"].combine).eval()
    with torch.no_grad():
        model(test_x, test_tasks).variance  # noqa: B018 -- training caches
        shapes = []
        original = NTKLinearOperator.to_dense
        monkeypatch.setattr(NTKLinearOperator, "to_dense", lambda self: shapes.append(self.shape) or original(self))
        model(test_x, test_tasks).variance  # noqa: B018
    assert shapes
    assert all(shape[-2] == N_TEST for shape in shapes)


@pytest.mark.parametrize("name", ["hadamard", "plus rbf", "times two", "jitter"])
def test_a_network_that_changed_behind_the_caches_raises(name):
    net, (x, tasks, y, test_x, test_tasks) = network(), inputs(600)
    model = Model(x, tasks, y, net, CASES[name].combine).eval()
    with torch.no_grad():
        model(test_x, test_tasks)
        model.covar.base_kernel.linearize(network(seed=4))
        with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
            model(test_x, test_tasks)
        model.train().eval()
        model(test_x, test_tasks)


@pytest.mark.parametrize("name", ["hadamard", "plus rbf", "times two", "jitter"])
def test_derivatives_after_predictions_in_inference_mode(name):
    case, net, (x, tasks, y, test_x, test_tasks) = CASES[name], network(), inputs(60)
    model = Model(x, tasks, y, net, case.combine).eval()
    with torch.inference_mode():
        model(test_x, test_tasks).variance  # noqa: B018
    fresh = Model(x, tasks, y, net, case.combine).eval()
    derivatives = []
    for each in (model, fresh):
        points = test_x.clone().requires_grad_()
        posterior = each(points, test_tasks)
        derivatives.append(torch.autograd.grad(posterior.mean.sum() + posterior.variance.sum(), points)[0])
    assert_close(*derivatives)


@pytest.mark.engine_independent
@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("reduce", ["prod", "sum"])
def test_products_and_sums_over_a_batch(reduce, lazily):
    """As `ProductStructureKernel` and `AdditiveStructureKernel` have them over the columns of the inputs."""
    net, (x, y), test_x = network(inputs=1), data(810), data(N_TEST, seed=1)[0]
    kernel, noise = NTKKernel(net), 0.1
    joint = torch.cat([x, test_x])
    prior = getattr(torch.stack([references.kernel(net, column.unsqueeze(-1)) for column in joint.unbind(-1)]), reduce)(
        0
    )

    def combine(model: Model, x: Tensor, tasks: Tensor) -> LinearOperator:
        matrices = kernel(x.mT.unsqueeze(-1))
        return getattr(matrices if lazily else matrices.evaluate_kernel(), reduce)(0)

    model = Model(x, torch.zeros(810, 1), y, network(), combine).eval()
    model.mean_module = gpytorch.means.ZeroMean()
    mean, covariance = references.posterior(torch.zeros(len(joint), dtype=x.dtype), prior, noise, y)
    with torch.no_grad():
        posterior = model(test_x, torch.zeros(N_TEST, 1))
        assert_close(posterior.mean, mean, 1e-7)
        assert_close(posterior.covariance_matrix, covariance, 1e-7)


@pytest.mark.engine_independent
def test_samples_that_do_not_fit_say_so():
    net, x = network(), data(810)[0]
    prior = MultivariateNormal(torch.zeros(810, dtype=x.dtype), NTKKernel(net)(x) + RBFKernel().double()(x))
    with settings.memory_budget(8 * 810**2), pytest.warns(NumericalWarning, match="rank 100"), torch.no_grad():
        prior.sample()


@pytest.mark.parametrize("name", ["hadamard", "plus rbf", "times two"])
def test_more_data_and_missing_targets(name):
    net, (x, tasks, y, test_x, test_tasks) = network(), inputs(60)
    seen = torch.arange(60) % 5 > 0

    def predict(model: Model) -> tuple[Tensor, Tensor]:
        posterior = model(test_x, test_tasks)
        return posterior.mean, posterior.covariance_matrix

    with torch.no_grad():
        model = Model(x[:50], tasks[:50], y[:50], net, CASES[name].combine).eval()
        predict(model)
        expected = predict(Model(x, tasks, y, net, CASES[name].combine).eval())
        for a, b in zip(predict(model.get_fantasy_model([x[50:], tasks[50:]], y[50:])), expected, strict=True):
            assert_close(a, b)
        expected = predict(Model(x[seen], tasks[seen], y[seen], net, CASES[name].combine).eval())
        with gpytorch.settings.observation_nan_policy("mask"):
            actual = predict(Model(x, tasks, y.where(seen, torch.nan), net, CASES[name].combine).eval())
        for a, b in zip(actual, expected, strict=True):
            assert_close(a, b)


class White(Kernel):
    """One at equal inputs; at others there are no numbers at all."""

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params):
        same = torch.equal(x1, x2)
        if diag:
            return torch.full(x1.shape[:-1], float(same), dtype=x1.dtype)
        if same:
            return DiagLinearOperator(torch.ones(x1.shape[:-1], dtype=x1.dtype))
        return ZeroLinearOperator(*x1.shape[:-1], x2.shape[-2], dtype=x1.dtype)


@pytest.mark.parametrize("form", ["ntk first", "ntk last", "scaled", "with another"])
def test_a_kernel_that_is_zero_between_different_inputs(form):
    net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
    kernel = {
        "ntk first": lambda: NTKKernel(net) + White(),
        "ntk last": lambda: White() + NTKKernel(net),
        "scaled": lambda: ScaleKernel(NTKKernel(net) + ScaleKernel(White())),
        "with another": lambda: White() + NTKKernel(net) + RBFKernel(),
    }[form]().double()
    model = AdaptedGP(x, y, net, kernel).eval()
    with torch.no_grad():
        prior = kernel(torch.cat([x, test_x])).to_dense()
        noise = model.likelihood.noise * torch.eye(SMALL, dtype=x.dtype)
        cross = prior[SMALL:, :SMALL]
        solved = torch.linalg.solve(prior[:SMALL, :SMALL] + noise, cross.mT)
        posterior = model(test_x)
        mean = net(x).squeeze(-1)
        assert_close(posterior.mean, net(test_x).squeeze(-1) + solved.mT @ (y - mean))
        assert_close(posterior.covariance_matrix, prior[SMALL:, SMALL:] - cross @ solved)
