"""Variational models of GPyTorch's with the kernel and the mean, against their formulas written out."""

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, GaussianLikelihood, SoftmaxLikelihood
from gpytorch.models import ApproximateGP
from gpytorch.variational import (
    CholeskyVariationalDistribution,
    CiqVariationalStrategy,
    DeltaVariationalDistribution,
    IndependentMultitaskVariationalStrategy,
    LMCVariationalStrategy,
    MeanFieldVariationalDistribution,
    UnwhitenedVariationalStrategy,
    VariationalStrategy,
)

from ntk_gp import GainKernel, NetworkMean, NTKKernel, adapted_network, draw_functions
from ntk_gp.variational import VariationalWeights
from tests import references
from tests.adapted import assert_close, data, network

M, JITTER = 5, 1e-9
STRATEGIES = [VariationalStrategy, UnwhitenedVariationalStrategy]


class SparseGP(ApproximateGP):
    """The network as the mean, a scaled NTK as the kernel."""

    def __init__(self, net, z, strategy=VariationalStrategy, learn=False, distribution=None, kernel=None):
        distribution = (distribution or CholeskyVariationalDistribution)(len(z))
        super().__init__(strategy(self, z, distribution, learn_inducing_locations=learn, jitter_val=JITTER))
        self.mean_module = NetworkMean(net)
        self.covar_module = ScaleKernel(NTKKernel(net)) if kernel is None else kernel
        self.double()

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class ByClass(ApproximateGP):
    """A function for each class, with the same kernel or mixtures of latent ones."""

    def __init__(self, net, z, classes, mixed):
        latents = 2 if mixed else classes
        distribution = CholeskyVariationalDistribution(len(z), batch_shape=torch.Size([latents]))
        base = VariationalStrategy(self, z, distribution, learn_inducing_locations=True)
        if mixed:
            strategy = LMCVariationalStrategy(base, num_tasks=classes, num_latents=latents, latent_dim=-1)
        else:
            strategy = IndependentMultitaskVariationalStrategy(base, num_tasks=classes)
        super().__init__(strategy)
        shape = torch.Size([latents])
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=shape)
        self.covar_module = ScaleKernel(NTKKernel(net, batch_shape=shape, normalize=True), batch_shape=shape)
        self.double()

    def forward(self, x):
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _with_some_q(model):
    """Eval mode, and a variational distribution that is neither the prior nor the posterior."""
    torch.manual_seed(3)
    model(model.variational_strategy.inducing_points[:1])
    with torch.no_grad():
        for parameter in model.variational_strategy._variational_distribution.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.covar_module.raw_outputscale.fill_(0.4) if hasattr(model.covar_module, "raw_outputscale") else None
    return model.train().eval()


def _formulas(model, net, x):
    """Mean and covariance at x, dense."""
    strategy = model.variational_strategy
    z, q = strategy.inducing_points.detach(), strategy.variational_distribution
    scale = model.covar_module.outputscale.detach()
    kzz, kzx, kxx = (scale * references.kernel(net, *pair) for pair in ((z, z), (z, x), (x, x)))
    kzz = kzz + JITTER * torch.eye(len(z), dtype=z.dtype)
    m = q.mean
    s = q.covariance_matrix if isinstance(q, MultivariateNormal) else torch.zeros_like(kzz)
    if type(strategy) is VariationalStrategy:
        root = torch.linalg.cholesky(kzz)
        m, s = net(z).squeeze(-1) + root @ m, root @ s @ root.mT
    solved = torch.linalg.solve(kzz, kzx)
    mean = net(x).squeeze(-1) + solved.mT @ (m - net(z).squeeze(-1))
    return mean.detach(), (kxx + solved.mT @ (s - kzz) @ solved).detach()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("distribution", [CholeskyVariationalDistribution, MeanFieldVariationalDistribution])
def test_predictions_and_weights(strategy, distribution):
    net, (x, _) = network(), data(7, seed=1)
    model = _with_some_q(SparseGP(net, data(M)[0], strategy, distribution=distribution))
    mean, covariance = _formulas(model, net, x)
    with torch.no_grad():
        prediction = model(x)
        assert_close(prediction.mean, mean, tolerance=1e-8)
        assert_close(prediction.covariance_matrix, covariance, tolerance=1e-6)  # jitter on all of its diagonal
        assert_close(adapted_network(model)(x), prediction.mean, tolerance=1e-8)
    _check_draws(model, net, x, mean, covariance)


def _check_draws(model, net, x, mean, covariance):
    """Draws are affine in normal numbers: their covariance is known from unit vectors, without drawing."""
    posterior = VariationalWeights(model)
    basis = torch.eye(posterior.num_parameters + 2 * M, dtype=torch.float64)
    zero = posterior.draw(*basis[:1].mul(0).split([posterior.num_parameters, 2 * M], dim=-1))
    root = posterior.draw(*basis.split([posterior.num_parameters, 2 * M], dim=-1)) - zero
    rows = references.jacobian(net, x)
    assert_close(net(x).squeeze(-1).detach() + rows @ zero[0], mean, tolerance=1e-8)
    assert_close(rows @ root.mT @ root @ rows.mT, covariance, tolerance=1e-7)
    functions = draw_functions(model, 3, generator=torch.Generator().manual_seed(0))
    assert functions(x).shape == (3, 7)
    prior = draw_functions(model, 2000, prior=True, generator=torch.Generator().manual_seed(0))(x[:1])
    scale = model.covar_module.outputscale.detach() * references.kernel(net, x[:1])[0, 0]
    assert abs(prior.var() / scale - 1) < 0.2


def test_point_masses():
    """A Delta distribution: GPyTorch has the prior's covariance less what is known of it, and so do draws."""
    net, (x, _) = network(), data(7, seed=1)
    model = _with_some_q(SparseGP(net, data(M)[0], distribution=DeltaVariationalDistribution))
    mean, covariance = _formulas(model, net, x)
    assert_close(model(x).mean, mean, tolerance=1e-8)
    assert_close(adapted_network(model)(x), mean, tolerance=1e-8)
    _check_draws(model, net, x, mean, covariance)


def test_known_features_beside_the_kernel():
    net, (x, _) = network(), data(7, seed=1)
    kernel = AdditiveKernel(ScaleKernel(NTKKernel(net)), GainKernel(net))
    model = _with_some_q(SparseGP(net, data(M)[0], kernel=kernel))
    with torch.no_grad():
        assert_close(adapted_network(model)(x), model(x).mean, tolerance=1e-8)
    assert draw_functions(model, 2)(x).shape == (2, 7)


def test_single_precision():
    net, (x, _) = network().float(), data(7, seed=1)
    model = SparseGP(net, data(M)[0].float()).float()
    model.variational_strategy.jitter_val = 1e-4
    model = _with_some_q(model)
    served = adapted_network(model)(x.float())
    assert served.dtype == torch.float32
    torch.testing.assert_close(served, model(x.float()).mean.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("likelihood", [GaussianLikelihood, BernoulliLikelihood])
def test_training(learn, likelihood):
    net, (x, y) = network(), data(30)
    y = (y > 0).double() if likelihood is BernoulliLikelihood else y
    model = SparseGP(net, x[:M].clone(), learn=learn)
    likelihood = likelihood().double()
    before = model.variational_strategy.inducing_points.detach().clone()
    losses = _train(model, likelihood, x, y)
    assert losses[-1] < 0.9 * losses[0]
    assert bool((model.variational_strategy.inducing_points != before).any()) == learn
    prediction = likelihood(model.eval()(x))
    assert prediction.mean.isfinite().all()


@pytest.mark.parametrize("mixed", [False, True])
def test_training_of_classes(mixed):
    x = data(30)[0]
    labels = (x.sum(-1) > 0).long() + (x[:, 0] > 0.5).long()
    model = ByClass(network(), x[:M].clone(), 3, mixed)
    likelihood = SoftmaxLikelihood(num_classes=3, mixing_weights=False).double()
    losses = _train(model, likelihood, x, labels)
    assert losses[-1] < 0.9 * losses[0]
    assert likelihood(model.eval()(x)).probs.mean(0).argmax(-1).shape == (30,)


def _train(model, likelihood, x, y, steps=25):
    torch.manual_seed(0)
    model.train(), likelihood.train()
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, len(x))
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.1)
    losses = []
    with gpytorch.settings.num_likelihood_samples(16):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = -objective(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_of_inducing_points(strategy):
    """By central differences of the ELBO."""
    net, (x, y) = network(), data(12, seed=1)
    model = SparseGP(net, data(M)[0], strategy, learn=True)
    likelihood = GaussianLikelihood().double()
    _with_some_q(model).train()
    objective = gpytorch.mlls.VariationalELBO(likelihood, model, len(x))
    z = model.variational_strategy.inducing_points
    objective(model(x), y).backward()
    direction = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            z.add_(step * direction)
            model.eval().train()  # GPyTorch keeps the factor of K(Z, Z)
            values.append(objective(model(x), y))
    slope = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((z.grad * direction).sum(), slope, rtol=1e-5, atol=1e-7)


def test_what_is_refused():
    net, (x, _) = network(), data(7, seed=1)
    with pytest.raises(RuntimeError, match="train mode"):
        adapted_network(SparseGP(net, x))
    with pytest.raises(TypeError, match=r"one of VariationalStrategy.*CiqVariationalStrategy.*Call model"):
        draw_functions(_eval_of(net, x, CiqVariationalStrategy), 2)
    with pytest.raises(TypeError, match="Expected an NTKKernel"):
        adapted_network(SparseGP(net, x, kernel=ScaleKernel(MaternKernel())).eval())
    model = ByClass(net, x, 3, mixed=False).eval()
    with pytest.raises(TypeError, match="IndependentMultitaskVariationalStrategy"):
        draw_functions(model, 2)
    batched = SparseGP(net, x).eval()
    with pytest.raises(ValueError, match="of one function"):
        batched.variational_strategy.register_buffer("inducing_points", x.expand(2, *x.shape))
        draw_functions(batched, 2)
    doubled = SparseGP(net, x).eval()
    doubled.forward = lambda x: MultivariateNormal(2 * doubled.mean_module(x), doubled.covar_module(x))
    with pytest.raises(ValueError, match="does more than apply"):
        draw_functions(doubled, 2)


def _eval_of(net, x, strategy):
    class Model(ApproximateGP):
        def __init__(self):
            super().__init__(strategy(self, x, CholeskyVariationalDistribution(len(x))))
            self.mean_module, self.covar_module = NetworkMean(net), ScaleKernel(NTKKernel(net))

    return Model().double().eval()
