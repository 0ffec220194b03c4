"""The kernel and the mean in BoTorch's models, acquisition functions and fits."""

from collections.abc import Iterator

import gpytorch
import pytest
import torch
from torch import Tensor, nn

botorch = pytest.importorskip("botorch")

from botorch.acquisition import LogExpectedImprovement, qKnowledgeGradient, qLogExpectedImprovement  # noqa: E402
from botorch.fit import fit_gpytorch_mll  # noqa: E402
from botorch.models import ModelListGP, SingleTaskGP  # noqa: E402
from botorch.optim import optimize_acqf  # noqa: E402
from botorch.sampling import SobolQMCNormalSampler  # noqa: E402
from gpytorch.kernels import MaternKernel, ScaleKernel  # noqa: E402
from gpytorch.mlls import ExactMarginalLogLikelihood  # noqa: E402

from ntk_gp import NetworkMean, NTKKernel  # noqa: E402
from tests import references  # noqa: E402

BOUNDS = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def gpytorch_settings() -> Iterator[None]:
    """What importing BoTorch sets."""
    torch.manual_seed(0)
    with (
        gpytorch.settings.fast_computations(False, False, False),
        gpytorch.settings.max_cholesky_size(4096),
        gpytorch.settings.max_eager_kernel_size(4096),
    ):
        yield


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 1))


def make_model(n: int = 12, noise: float | None = None) -> SingleTaskGP:
    torch.manual_seed(1)
    x = 2 * torch.rand(n, 2, dtype=torch.float64) - 1
    y = (3 * x[:, :1]).sin() + x[:, 1:].square()
    network = make_network()
    return SingleTaskGP(
        x,
        y,
        torch.full_like(y, noise) if noise is not None else None,
        covar_module=ScaleKernel(NTKKernel(network)),
        mean_module=NetworkMean(network),
        outcome_transform=None,
    )


def dense_posterior(model: SingleTaskGP, z: Tensor) -> tuple[Tensor, Tensor]:
    network = make_network().double()
    joint = torch.cat([model.train_inputs[0], z])
    prior = model.covar_module.outputscale.detach() * references.kernel(network, joint)
    noise = model.likelihood.noise.detach().expand(len(model.train_targets)).diag()
    return references.posterior(network(joint).squeeze(-1).detach(), prior, noise, model.train_targets)


@pytest.mark.parametrize("noise", [None, 0.01])
def test_posterior(noise):
    model = make_model(noise=noise)
    z = torch.randn(5, 2, dtype=torch.float64)
    mean, covariance = dense_posterior(model, z)
    posterior = model.posterior(z)
    torch.testing.assert_close(posterior.mean.squeeze(-1), mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(posterior.variance.squeeze(-1), covariance.diagonal(), rtol=0, atol=1e-8)
    torch.testing.assert_close(posterior.distribution.covariance_matrix, covariance, rtol=0, atol=1e-8)


@pytest.mark.parametrize("batch_shape", [(4,), (3, 4)])
def test_posterior_of_t_batches(batch_shape):
    model = make_model()
    z = torch.randn(*batch_shape, 2, 2, dtype=torch.float64)
    posterior = model.posterior(z)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in batch_shape]).reshape(-1, len(batch_shape)):
        mean, covariance = dense_posterior(model, z[tuple(index)])
        torch.testing.assert_close(posterior.mean[tuple(index)].squeeze(-1), mean, rtol=0, atol=1e-8)
        actual = posterior.distribution.covariance_matrix[tuple(index)]
        torch.testing.assert_close(actual, covariance, rtol=0, atol=1e-8)


def test_the_network_stays_as_it_is():
    """SingleTaskGP converts itself to the data's dtype, and fitting sets every parameter."""
    network = make_network()
    weights = [parameter.clone() for parameter in network.parameters()]
    x = torch.rand(8, 2, dtype=torch.float64)
    model = SingleTaskGP(
        x,
        x[:, :1],
        covar_module=ScaleKernel(NTKKernel(network)),
        mean_module=NetworkMean(network),
        outcome_transform=None,
    )
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    for before, after in zip(weights, network.parameters(), strict=True):
        assert after.dtype == torch.float32
        assert torch.equal(before, after)
    assert torch.equal(model.mean_module.network.tensors.get_submodule("0")._buffers["weight"], weights[0].double())


def test_fit_increases_the_marginal_likelihood():
    model = make_model()
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    before = mll(model(*model.train_inputs), model.train_targets).item()
    fit_gpytorch_mll(mll)
    model.train()
    after = mll(model(*model.train_inputs), model.train_targets).item()
    assert after > before + 0.1


@pytest.mark.parametrize("compose", [lambda ntk, other: other + ntk, lambda ntk, other: other * ntk])
def test_marginal_likelihoods_do_not_depend_on_what_botorch_sets(monkeypatch, compose):
    """Its own switch, GPyTorch's default, and an exact Cholesky factor."""
    torch.manual_seed(1)
    x = 2 * torch.rand(820, 2, dtype=torch.float64) - 1
    network = make_network()
    kernel = compose(ScaleKernel(NTKKernel(network)), MaternKernel())
    model = SingleTaskGP(x, x.sin().sum(-1, keepdim=True), covar_module=kernel, outcome_transform=None)
    mll, flag = ExactMarginalLogLikelihood(model.likelihood, model), gpytorch.settings.fast_computations.log_prob
    results = []
    for default, state in ((False, None), (True, None), (True, False)):
        monkeypatch.setattr(flag, "_default", default)
        monkeypatch.setattr(flag, "_state", state)
        with gpytorch.settings.max_cholesky_size(800):
            value = mll(model(*model.train_inputs), model.train_targets)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for result in results[:2]:
        torch.testing.assert_close(result, results[2], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("q", [1, 2])
def test_optimize_acquisition(q):
    model = make_model()
    best = model.train_targets.max()
    if q == 1:
        acquisition = LogExpectedImprovement(model, best_f=best)
    else:
        acquisition = qLogExpectedImprovement(
            model, best_f=best, sampler=SobolQMCNormalSampler(torch.Size([32]), seed=0)
        )
    torch.manual_seed(0)
    candidates, value = optimize_acqf(acquisition, BOUNDS, q=q, num_restarts=2, raw_samples=16)
    assert candidates.shape == (q, 2)
    grid = 2 * torch.rand(64, q, 2, dtype=torch.float64) - 1
    with torch.no_grad():
        assert value >= acquisition(grid).max() - 1e-6


def test_gradients_of_an_acquisition_function():
    acquisition = LogExpectedImprovement(make_model(), best_f=0.5)
    z = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(acquisition, (z,), atol=1e-6, fast_mode=True)


def test_fantasies():
    model = make_model()
    model.posterior(model.train_inputs[0][:1])
    new_x = torch.randn(2, 2, dtype=torch.float64)
    fantasies = model.fantasize(new_x, sampler=SobolQMCNormalSampler(torch.Size([3]), seed=0))
    z = torch.randn(4, 2, dtype=torch.float64)
    posterior = fantasies.posterior(z)
    assert posterior.mean.shape == (3, 4, 1)
    for i in range(3):
        one = make_model()
        one.set_train_data(fantasies.train_inputs[0][i], fantasies.train_targets[i], strict=False)
        mean, covariance = dense_posterior(one, z)
        torch.testing.assert_close(posterior.mean[i].squeeze(-1), mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(posterior.variance[i].squeeze(-1), covariance.diagonal(), rtol=0, atol=1e-8)


def test_condition_on_observations():
    model = make_model()
    z = torch.randn(4, 2, dtype=torch.float64)
    model.posterior(z)
    conditioned = model.condition_on_observations(z[:2], torch.ones(2, 1, dtype=torch.float64))
    one = make_model()
    one.set_train_data(
        torch.cat([model.train_inputs[0], z[:2]]),
        torch.cat([model.train_targets, torch.ones(2).double()]),
        strict=False,
    )
    mean, covariance = dense_posterior(one, z)
    torch.testing.assert_close(conditioned.posterior(z).mean.squeeze(-1), mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(conditioned.posterior(z).variance.squeeze(-1), covariance.diagonal(), rtol=0, atol=1e-8)


def test_knowledge_gradient():
    """Fantasies with gradients with respect to the points they are made at."""
    model = make_model()
    acquisition = qKnowledgeGradient(model, num_fantasies=2)
    x = (2 * torch.rand(1, 3, 2, dtype=torch.float64) - 1).requires_grad_()
    value = acquisition(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    step = torch.zeros_like(x)
    step[0, 0, 0] = 1e-5
    with torch.no_grad():
        expected = (acquisition(x + step) - acquisition(x - step)) / 2e-5
    torch.testing.assert_close(gradient[0, 0, 0], expected[0], rtol=1e-4, atol=1e-6)


def test_several_outcomes_and_model_lists():
    torch.manual_seed(1)
    x = torch.rand(9, 2, dtype=torch.float64)
    y = torch.cat([x.sin().sum(-1, keepdim=True), x.cos().sum(-1, keepdim=True)], dim=-1)
    network, two = make_network(), torch.Size([2])
    kernel = ScaleKernel(NTKKernel(network, batch_shape=two), batch_shape=two)
    batched = SingleTaskGP(x, y, covar_module=kernel, mean_module=NetworkMean(network), outcome_transform=None)
    singles = [
        SingleTaskGP(
            x,
            y[:, i : i + 1],
            covar_module=ScaleKernel(NTKKernel(network)),
            mean_module=NetworkMean(network),
            outcome_transform=None,
        )
        for i in range(2)
    ]
    z = torch.rand(3, 4, 2, dtype=torch.float64)
    expected = ModelListGP(*singles).posterior(z)
    torch.testing.assert_close(batched.posterior(z).mean, expected.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(batched.posterior(z).variance, expected.variance, rtol=0, atol=1e-8)
