"""Marginal likelihoods of sums and products, whose derivatives are written out, and what is predicted from a factor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from ntk_gp import NTKKernel, settings
from ntk_gp.jacobian.structured.gram import Gram
from ntk_gp.operators import _marginal_terms
from ntk_gp.operators.ntk_sum_linear_operator import NTKSumLinearOperator
from ntk_gp.solvers import cholesky
from tests import references
from tests.adapted import AdaptedGP, assert_close, data, network

pytestmark = pytest.mark.engine_independent


def layer_matrices(net: nn.Module, x: Tensor) -> Tensor:
    """The kernel matrix of each layer, (2, *batch, n, n); differentiable by the inputs."""
    jacobian = references.jacobian(net, x)
    first = sum(p.numel() for p in net[0].parameters())
    return torch.stack([part @ part.mT for part in (jacobian[..., :first], jacobian[..., first:])])


class Case(NamedTuple):
    """A kernel, and its matrix from those of the layers and the inputs."""

    kernel: Callable[[nn.Module], Kernel]
    dense: Callable[[Kernel, Tensor, Tensor], Tensor]


CASES = {
    "plus rbf": Case(
        lambda net: ScaleKernel(NTKKernel(net)) + ScaleKernel(RBFKernel()),
        lambda k, layers, x: k.kernels[0].outputscale * layers.sum(0) + k.kernels[1](x).to_dense(),
    ),
    "plus matern": Case(
        lambda net: ScaleKernel(MaternKernel(nu=1.5, ard_num_dims=3)) + ScaleKernel(NTKKernel(net)),
        lambda k, layers, x: k.kernels[1].outputscale * layers.sum(0) + k.kernels[0](x).to_dense(),
    ),
    "times rbf": Case(
        lambda net: ScaleKernel(ScaleKernel(NTKKernel(net)) * RBFKernel()),
        lambda k, layers, x: (
            k.outputscale
            * k.base_kernel.kernels[0].outputscale
            * layers.sum(0)
            * k.base_kernel.kernels[1](x).to_dense()
        ),
    ),
    "scaled sum": Case(
        lambda net: ScaleKernel(NTKKernel(net) + RBFKernel()),
        lambda k, layers, x: k.outputscale * (layers.sum(0) + k.base_kernel.kernels[1](x).to_dense()),
    ),
    "layers plus matern": Case(
        lambda net: NTKKernel(net, variance_groups="layer") + MaternKernel(nu=2.5),
        lambda k, layers, x: torch.einsum("g,g...->...", k.kernels[0].variance[0], layers) + k.kernels[1](x).to_dense(),
    ),
    "layers": Case(
        lambda net: NTKKernel(net, variance_groups="layer"),
        lambda k, layers, x: torch.einsum("g,g...->...", k.variance[0], layers),
    ),
    "two networks": Case(
        lambda net: ScaleKernel(NTKKernel(net)) + NTKKernel(net) * ScaleKernel(NTKKernel(net)),
        lambda k, layers, x: (
            k.kernels[0].outputscale * layers.sum(0) + k.kernels[1].kernels[1].outputscale * layers.sum(0).square()
        ),
    ),
}


def marginal(model: AdaptedGP, x: Tensor, y: Tensor) -> Tensor:
    return ExactMarginalLogLikelihood(model.likelihood, model)(model(x), y).sum()


def expected_marginal(case: Case, model: AdaptedGP, net: nn.Module, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    matrix = case.dense(model.covar_module, layer_matrices(net, x), x) + torch.diag_embed(noise.expand(y.shape))
    return references.log_marginal_likelihood(y - net(x).squeeze(-1), matrix).sum()


def gradients(value: Tensor, leaves: list[Tensor], **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True, **options)


@pytest.mark.parametrize("differentiated", ["hyperparameters", "inputs as well"])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, n, batch, differentiated):
    if n > 30 and (batch or differentiated != "hyperparameters"):
        pytest.skip("the same, and the reference takes long")
    case, net, (x, y) = CASES[name], network(width=12), data(n, *batch)
    for parameter in net.parameters():
        parameter.requires_grad_()
    model = AdaptedGP(x, y, net, case.kernel(net).double()).train()
    leaves = list(model.parameters())
    if differentiated != "hyperparameters":
        x.requires_grad_()
        model.set_train_data(x, y, strict=False)
        leaves.append(x)
    with gpytorch.settings.debug(False):
        actual = marginal(model, x, y)
    expected = expected_marginal(case, model, net, x, y, model.likelihood.noise)
    assert_close(actual, expected)
    for a, b in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_a_noise_of_its_own_for_each_point(name):
    case, net, (x, y) = CASES[name], network(width=12), data(30)
    noise = torch.linspace(0.05, 0.4, 30, dtype=x.dtype).requires_grad_()
    likelihood = FixedNoiseGaussianLikelihood(noise, learn_additional_noise=True).double()
    model = AdaptedGP(x, y, net, case.kernel(net).double(), likelihood).train()
    leaves = [*model.parameters(), noise]
    actual = marginal(model, x, y)
    expected = expected_marginal(case, model, net, x, y, noise + likelihood.second_noise)
    assert_close(actual, expected)
    for a, b in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_float32_inputs_lose_no_more_than_the_other_kernels_do(name):
    case, net, (x, y) = CASES[name], network(width=12), data(30)
    single = copy.deepcopy(net).float()
    x, y = x.float(), y.float()
    model = AdaptedGP(x, y, single, case.kernel(single).float(), GaussianLikelihood()).train()
    leaves = list(model.parameters())
    actual = marginal(model, x, y)
    found = gradients(actual, leaves)
    model.double()
    expected = expected_marginal(case, model, single.double(), x.double(), y.double(), model.likelihood.noise)
    assert_close(actual.double(), expected, 2e-6)
    for a, b in zip(found, gradients(expected, list(model.parameters())), strict=True):
        assert_close(a.double(), b, 2e-5)


@pytest.mark.parametrize("name", ["plus rbf", "plus matern", "times rbf", "layers plus matern"])
def test_a_graph_that_is_kept_and_second_derivatives(name):
    """What is made of the factor overwrites it: a second pass makes another."""
    case, net, (x, y) = CASES[name], network(width=12), data(20)
    model = AdaptedGP(x, y, net, case.kernel(net).double()).train()
    leaves = list(model.parameters())
    actual = marginal(model, x, y)
    first = gradients(actual, leaves, retain_graph=True)
    for a, b in zip(first, gradients(actual, leaves, retain_graph=True), strict=True):
        assert_close(a, b, 1e-12)
    expected = expected_marginal(case, model, net, x, y, model.likelihood.noise)
    weights = [torch.randn_like(leaf) for leaf in leaves]
    seconds = []
    for value in (actual, expected):
        grads = gradients(value, leaves, create_graph=True)
        directional = sum((g * w).sum() for g, w in zip(grads, weights, strict=True))
        seconds.append(gradients(directional, leaves))
    for a, b in zip(*seconds, strict=True):
        assert_close(a, b, 1e-7)


@pytest.mark.parametrize("asked", ["quadratic form", "log-determinant"])
def test_one_of_the_two_terms(asked):
    net, x = network(), data(20)[0]
    scale = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    rhs = torch.randn(3, 20, 2, dtype=torch.float64).requires_grad_()  # with more batches than the matrix
    other = scale * (-torch.cdist(x, x)).exp()
    operator = NTKKernel(net).double()(x).evaluate_kernel() + DenseLinearOperator(other)
    operator = operator + DiagLinearOperator(torch.full((20,), 0.1, dtype=torch.float64))
    dense = references.kernel(net, x) + other + 0.1 * torch.eye(20, dtype=torch.float64)
    if asked == "quadratic form":
        actual, _ = operator.inv_quad_logdet(rhs, reduce_inv_quad=False)
        expected = (rhs * torch.linalg.solve(dense, rhs)).sum(-2)
    else:
        _, actual = operator.inv_quad_logdet(logdet=True)
        expected = dense.logdet()
    assert_close(actual, expected)
    found = gradients(actual.sum(), [scale, rhs], retain_graph=True)
    for a, b in zip(found, gradients(expected.sum(), [scale, rhs]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["plus rbf", "plus matern", "times rbf", "layers plus matern", "layers"])
def test_a_step_forms_no_gram_matrix_and_factorises_once(name, monkeypatch):
    case, net, (x, y) = CASES[name], network(width=80), data(60)  # no layer so small that a spectrum serves all
    model = AdaptedGP(x, y, net, case.kernel(net).double()).train()
    marginal(model, x, y).backward()
    formed, factorised, inverted = [], [], []
    original = Gram.dense
    monkeypatch.setattr(Gram, "dense", lambda self: formed.append(1) or original(self))
    for name, calls in (("factorise_in_place", factorised), ("invert_in_place", inverted)):
        function = getattr(cholesky, name)
        monkeypatch.setattr(_marginal_terms, name, lambda m, f=function, c=calls: c.append(tuple(m.shape)) or f(m))
    monkeypatch.setattr(torch.linalg, "cholesky", None)
    for _ in range(2):
        model.likelihood.noise = model.likelihood.noise * 1.1
        marginal(model, x, y).backward()
    assert not formed
    assert factorised == inverted == [(60, 60)] * 2


@pytest.mark.parametrize("n", [5, 700])
def test_the_inverse_in_the_memory_of_the_factor(n):
    matrix = torch.randn(2, n, n + 5, dtype=torch.float64)
    matrix = matrix @ matrix.mT
    memory = matrix.clone()
    factor, info = cholesky.factorise_in_place(memory)
    assert not info.any()
    assert factor.data_ptr() == memory.data_ptr()
    assert_close(factor @ factor.mT, matrix, 1e-13)
    inverse = cholesky.invert_in_place(factor)
    assert inverse.data_ptr() == memory.data_ptr()
    assert_close(inverse, torch.linalg.inv(matrix), 1e-9)


def test_matrices_that_are_not_positive_definite():
    """As linear_operator has it: jitter and a warning for what is singular, an error for what is not even that."""
    net, x = network(), data(60)[0]
    scale = torch.ones((), dtype=x.dtype).requires_grad_()
    kernel_matrix = NTKKernel(net).double()(x).evaluate_kernel()  # of rank 41
    singular = NTKSumLinearOperator(kernel_matrix, DenseLinearOperator(scale * torch.ones(60, 60, dtype=x.dtype)))
    rhs = torch.ones(60, 1, dtype=x.dtype)
    with pytest.warns(NumericalWarning, match="jitter"):
        inv_quad, logdet = singular.inv_quad_logdet(rhs, logdet=True)
    dense = references.kernel(net, x) + scale + 1e-8 * torch.eye(60, dtype=x.dtype)
    assert_close(logdet, dense.logdet(), 1e-6)
    assert torch.isfinite(torch.autograd.grad(inv_quad + logdet, scale)[0])
    indefinite = NTKSumLinearOperator(kernel_matrix, DenseLinearOperator(-9.0 * scale * torch.ones(60, 60).double()))
    with pytest.warns(NumericalWarning, match="jitter"), pytest.raises(NotPSDError):
        indefinite.inv_quad_logdet(rhs, logdet=True)


def test_without_room_for_what_is_kept():
    """The same numbers where no Gram matrix is kept."""
    case, net, (x, y) = CASES["layers plus matern"], network(width=12), data(100)
    found = []
    for budget in (1 << 30, 8 * 4 * 100**2):
        with settings.memory_budget(budget):
            model = AdaptedGP(x, y, net, case.kernel(net).double()).train()
            found.append(gradients(marginal(model, x, y), list(model.parameters())))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, 1e-10)


# Beyond memory.


def large(noise: float) -> tuple[NTKSumLinearOperator, Tensor]:
    net, x = network(), data(900)[0]
    other = (-torch.cdist(x, x)).exp()
    operator = NTKKernel(net).double()(x).evaluate_kernel() + DenseLinearOperator(other)
    operator = operator + DiagLinearOperator(torch.full((900,), noise, dtype=x.dtype))
    return operator, references.kernel(net, x) + other + noise * torch.eye(900, dtype=x.dtype)


@pytest.mark.parametrize("noise", [0.5, 1e-3, 1e-6])
def test_iteration_is_preconditioned(noise):
    operator, dense = large(noise)
    rhs = torch.randn(900, 2, dtype=torch.float64)
    with settings.memory_budget(8 * 900**2), torch.no_grad():
        solution = operator.solve(rhs)
    residuals = (dense @ solution - rhs).norm(dim=0) / rhs.norm(dim=0)
    assert residuals.max() <= 1e-4
    assert operator._iteration.report.converged
    assert operator._iteration.report.steps <= 100


def test_iteration_that_does_not_converge_says_so():
    operator, _ = large(1e-3)
    rhs = torch.randn(900, 2, dtype=torch.float64)
    with (
        settings.memory_budget(8 * 900**2),
        gpytorch.settings.max_cg_iterations(3),
        torch.no_grad(),
        pytest.warns(NumericalWarning, match="stopped after 3 steps"),
    ):
        operator.solve(rhs)


# Predictions.


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variances", ["exact", "fast", "skipped"])
def test_predictions(name, dtype, variances, monkeypatch):
    """Against dense algebra; a second one neither factorises nor forms a matrix of all training points."""
    case, net, (x, y), test_x = CASES[name], network(width=40), data(60), data(7, seed=1)[0]
    single = copy.deepcopy(net).to(dtype)
    model = AdaptedGP(
        x.to(dtype), y.to(dtype), single, case.kernel(single).to(dtype), GaussianLikelihood().to(dtype)
    ).eval()
    joint = torch.cat([x, test_x]).to(dtype).double()
    skipped, fast = variances == "skipped", variances == "fast"
    with (
        torch.no_grad(),
        gpytorch.settings.fast_pred_var(fast),
        gpytorch.settings.skip_posterior_variances(skipped),
    ):
        model(test_x.to(dtype)[:3]).mean  # noqa: B018 -- what is kept
        factorised, shapes = [], []
        dense = Gram.dense
        monkeypatch.setattr(Gram, "dense", lambda self: shapes.append((self.n, self.m)) or dense(self))
        monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: factorised.append(1))
        posterior = model(test_x.to(dtype))
        mean, variance = posterior.mean.double(), None if skipped else posterior.variance.double()
        monkeypatch.undo()
        assert not factorised
        assert all(60 not in (n, m) or 7 in (n, m) for n, m in shapes)
        if skipped:
            assert "times" in name or "two" in name or not shapes
        model.double()
        prior = case.dense(model.covar_module, layer_matrices(single.double(), joint), joint)
        expected_mean, covariance = references.posterior(
            single(joint).squeeze(-1), prior, model.likelihood.noise, y.to(dtype).double()
        )
    assert_close(mean, expected_mean, 1e-8 if dtype == torch.float64 else 2e-5)
    if variance is not None and not (fast and name == "layers"):
        relative = (variance / covariance.diagonal() - 1).abs().max()
        assert relative <= (1e-8 if dtype == torch.float64 else 5e-4)


def test_kept_weights_follow_the_kernel():
    """A kernel with other hyperparameters than when weights were prepared does not get these."""
    net, (x, y), test_x = network(width=40), data(60), data(7, seed=1)[0]
    model = AdaptedGP(x, y, net, CASES["plus rbf"].kernel(net).double()).eval()
    with torch.no_grad(), gpytorch.settings.skip_posterior_variances():
        model(test_x)
        alpha = model.prediction_strategy.kept_factor.alpha
        model.covar_module.kernels[0].outputscale = 5.0
        actual = model(test_x).mean
        cross = model.covar_module(test_x, x).to_dense()
        assert_close(actual, net(test_x).squeeze(-1) + cross @ alpha)


def test_distributions_without_a_model():
    net, x = network(), data(30)[0]
    matrix = NTKKernel(net).double()(x) + RBFKernel().double()(x)
    matrix = matrix.add_diagonal(torch.tensor(0.1, dtype=x.dtype))
    y = data(30)[1]
    dense = references.kernel(net, x) + RBFKernel().double()(x).to_dense() + 0.1 * torch.eye(30, dtype=x.dtype)
    actual = MultivariateNormal(torch.zeros_like(y), matrix).log_prob(y)
    assert_close(actual, torch.distributions.MultivariateNormal(torch.zeros_like(y), dense).log_prob(y))
