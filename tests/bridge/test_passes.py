"""f(x), J(x) ŵ and J(x) from one pass through the network, where one gives them; and never those of another network."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from torch import Tensor, nn

from ntk_gp import GainKernel, NetworkMean, NTKKernel, adapted_network
from ntk_gp.network import NetworkFunction
from tests import references
from tests.adapted import AdaptedGP, assert_close, data, network

MANY = 40


def deep(outputs: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


def noisy() -> gpytorch.likelihoods.GaussianLikelihood:
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = torch.tensor(0.1, dtype=torch.float64)
    return likelihood


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, torch.dtype]]:
    """The points and the dtype of every pass over many of them."""
    seen, default = [], NetworkFunction.__call__

    def call(self, parameters, x, *arguments, **options):
        if len(x) >= MANY:
            seen.append((len(x), x.dtype))
        return default(self, parameters, x, *arguments, **options)

    monkeypatch.setattr(NetworkFunction, "__call__", call)
    return seen


def dense(net: nn.Module, x: Tensor, y: Tensor, test_x: Tensor, names: str, noise: float) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance in the parameters whose names begin so."""
    joint = torch.cat([x, test_x]).double()
    chosen = [parameter for name, parameter in net.named_parameters() if name.startswith(names)]
    rows = references.jacobian(net, joint, chosen)
    mean = net(joint).detach().reshape(-1)
    return references.posterior(mean, rows @ rows.mT, torch.tensor([noise], dtype=torch.float64), y.double())


def step(model: gpytorch.models.ExactGP) -> Tensor:
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model.train())
    return mll(model(*model.train_inputs), model.train_targets)


def warmed(model: gpytorch.models.ExactGP, x: Tensor) -> gpytorch.models.ExactGP:
    """With the network tried at as many points, in the precision of the inputs and in float64."""
    with torch.no_grad():
        step(model), model.eval()(x + 0.5).variance
    model.set_train_data(model.train_inputs[0] + 1e-3, model.train_targets)
    return model


@pytest.mark.names_engine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_last_layer_takes_one_pass_for_each_set_of_inputs(passes, dtype):
    net = deep()
    (x, y), test_x = data(MANY), data(MANY + 1, seed=1)[0]
    x, y, test_x = x.to(dtype), y.to(dtype), test_x.to(dtype)
    kernel = NTKKernel(net, parameters="last_layer", engine="structured")
    model = warmed(AdaptedGP(x, y, net, kernel, noisy()).to(dtype), test_x)
    passes.clear()
    step(model)
    assert passes == [(MANY, torch.float64)]
    passes.clear()
    with torch.no_grad():
        posterior = model.eval()(test_x)
        mean, variance = posterior.mean, posterior.variance
    assert passes == [(MANY + 1, torch.float64)]
    expected, covariance = dense(net, model.train_inputs[0], y, test_x, "4", 0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_close(mean.double(), expected, tolerance)
    assert_close(variance.double(), covariance.diagonal(), tolerance)


def test_all_parameters_take_one_for_the_mean(passes):
    net, (x, y), test_x = network(), data(MANY), data(MANY + 1, seed=1)[0]
    model = warmed(AdaptedGP(x, y, net, NTKKernel(net), noisy()), test_x)
    model.eval()(test_x + 1.0)
    passes.clear()
    mean = model(test_x).mean
    assert passes == [(MANY + 1, torch.float64)]
    assert_close(mean, dense(net, model.train_inputs[0], y, test_x, "", 0.1)[0], 1e-10)
    assert torch.equal(model(test_x).mean, mean)
    assert_close(adapted_network(model)(test_x), mean, 1e-12)


def test_all_outputs_of_the_last_layer():
    net, x, test_x = deep(3), data(12)[0], data(9, seed=1)[0]
    y = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, has_task_noise=False).double()
    likelihood.noise = torch.tensor(0.1, dtype=torch.float64)
    kernel = NTKKernel(net, parameters="last_layer", output="all")
    model = AdaptedGP(x, y, net, kernel, likelihood, output="all").eval()
    posterior = model(test_x)
    assert isinstance(posterior, MultitaskMultivariateNormal)
    expected, covariance = dense(net, x, y.reshape(-1), test_x, "4", float(likelihood.noise))
    assert_close(posterior.mean.reshape(-1), expected, 1e-10)
    assert_close(posterior.variance.reshape(-1), covariance.diagonal(), 1e-10)


def test_in_batches_of_test_inputs():
    net, (x, y) = deep(), data(12)
    model = AdaptedGP(x, y, net, NTKKernel(net, parameters="last_layer"), noisy()).eval()
    test_x = data(12, seed=1)[0].reshape(3, 4, 3)
    posterior = model(test_x)
    for mean, variance, points in zip(posterior.mean, posterior.variance, test_x, strict=True):
        expected, covariance = dense(net, x, y, points, "4", 0.1)
        assert_close(mean, expected, 1e-10)
        assert_close(variance, covariance.diagonal(), 1e-10)


def test_a_mean_of_another_network_is_its_own():
    net, other, (x, y), test_x = deep(), deep(), data(12), data(9, seed=1)[0]
    with torch.no_grad():
        other[4].weight.add_(1.0)
    plain = AdaptedGP(x, y - other(x).squeeze(-1).detach(), net, NTKKernel(net, parameters="last_layer"), noisy())
    plain.mean_module = gpytorch.means.ZeroMean()
    model = AdaptedGP(x, y, other, NTKKernel(net, parameters="last_layer"), noisy()).eval()
    assert_close(model(test_x).mean, other(test_x).squeeze(-1).detach() + plain.eval()(test_x).mean, 1e-10)


def test_edits_without_a_trace_are_seen():
    net, (x, y), test_x = deep(), data(12), data(9, seed=1)[0]
    model = AdaptedGP(x, y, net, NTKKernel(net, parameters="last_layer"), noisy())
    step(model), model.eval()(test_x)
    for snapshot in (model.mean_module.network, model.covar_module.network):
        snapshot.get_buffer("tensors.2.weight").data.mul_(0.5)
    with torch.no_grad():
        net[2].weight.mul_(0.25)  # the two snapshots share the tensor
    model.train().eval()
    model.set_train_data(x + 1e-3, y)
    expected, covariance = dense(net, x + 1e-3, y, test_x, "4", 0.1)
    posterior = model(test_x)
    assert_close(posterior.mean, expected, 1e-10)
    assert_close(posterior.variance, covariance.diagonal(), 1e-10)


def test_users_may_write_to_what_they_are_given():
    net, (x, y), test_x = deep(), data(12), data(9, seed=1)[0]
    model = AdaptedGP(x, y, net, NTKKernel(net, parameters="last_layer"), noisy())
    prior, expected = model(x).mean, net(x).squeeze(-1).detach()
    prior.zero_()
    assert_close(model(x).mean, expected, 1e-12)
    posterior = model.eval()(test_x)
    before = posterior.mean.clone(), posterior.variance.clone()
    posterior.mean.zero_(), posterior.variance.zero_()
    again = model(test_x)
    assert torch.equal(again.mean, before[0]) and torch.equal(again.variance, before[1])


def test_derivatives_by_the_inputs_after_values_without():
    net, (x, y), test_x = deep(), data(12), data(9, seed=1)[0]
    model = AdaptedGP(x, y, net, NTKKernel(net, parameters="last_layer"), noisy()).eval()
    model(test_x).variance.sum()
    wanted = test_x.clone().requires_grad_()
    posterior = model(wanted)
    (posterior.mean.sum() + posterior.variance.sum()).backward()

    def total(points: Tensor) -> Tensor:
        posterior = model(points)
        return posterior.mean.sum() + posterior.variance.sum()

    shift = 1e-5 * torch.randn(test_x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    difference = total(test_x + shift) - total(test_x - shift)
    assert_close((wanted.grad * shift).sum() * 2, difference, 1e-6)


def test_sums_with_other_kernels():
    net, (x, y), test_x = deep(), data(12), data(9, seed=1)[0]
    kernel = NTKKernel(net, parameters="last_layer")
    joint = torch.cat([x, test_x])
    chosen = list(net[4].parameters())
    rows, mean = references.jacobian(net, joint, chosen), net(joint).squeeze(-1).detach()
    for other in (GainKernel(net), ScaleKernel(RBFKernel())):
        model = AdaptedGP(x, y, net, kernel + other.double(), noisy()).eval()
        step(model)
        posterior = model.eval()(test_x)
        covariance = rows @ rows.mT + other(joint).to_dense().detach()
        expected, covariance = references.posterior(mean, covariance, torch.tensor([0.1], dtype=torch.float64), y)
        assert_close(posterior.mean, expected, 1e-9)
        assert_close(posterior.variance, covariance.diagonal(), 1e-9)


def test_a_mean_of_other_inputs_than_the_kernels():
    """The mean may be a function of something else than what the kernel is given."""
    net, (x, y), test_x = deep(), data(12), data(9, seed=1)[0]

    class Shifted(AdaptedGP):
        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x + 1.0), self.covar_module(x))

    model = Shifted(x, y, net, NTKKernel(net, parameters="last_layer"), noisy())
    step(model)
    joint = torch.cat([x, test_x])
    rows = references.jacobian(net, joint, list(net[4].parameters()))
    mean = net(joint + 1.0).squeeze(-1).detach()
    expected, covariance = references.posterior(mean, rows @ rows.mT, torch.tensor([0.1], dtype=torch.float64), y)
    posterior = model.eval()(test_x)
    assert_close(posterior.mean, expected, 1e-10)
    assert_close(posterior.variance, covariance.diagonal(), 1e-10)


def test_is_the_mean_module_alone():
    """Outside of a model the mean is the network in the inputs' dtype."""
    net, x = deep().float(), data(5)[0].float()
    assert torch.equal(NetworkMean(net)(x), net(x).squeeze(-1).detach())
