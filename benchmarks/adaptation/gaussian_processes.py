"""Gaussian processes beside the recipe, as a user of GPyTorch would write them, each with weak priors from the data.

A method is a mean and a sum of scaled kernels, as `GaussianProcess` puts them together. Their priors are of the
recipe's kind, so that what differs is the kernel. With v₀ the mean squared residual that the mean leaves, they start,
and have the medians of log-normal priors, at a noise of 0.1 v₀ and at shares of v₀ for the terms, on average over the
labels, both 1.5 e-folds wide; lengthscales at the median distance between the labels in the kernel's metric, one e-fold
wide. Fitting maximises the posterior density of the logarithms; `ntk_gp.averaging.averaged` averages over it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gpytorch
import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ConstantKernel, Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.means import ConstantMean, Mean
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel, register_log_prior
from ntk_gp.averaging import averaged as averaged_over

from .predictions import Gaussian, Prediction
from .training import make_network

NOISE, WIDTH, LENGTHSCALE_WIDTH = 0.1, 1.5, 1.0
GAIN = 0.3

Map = Callable[[Tensor], Tensor]


class GaussianProcess(gpytorch.models.ExactGP):
    """A GP whose kernel is a sum, started from the data and under weak priors.

    :param terms: Each kernel, with the share of v₀ that it has at first.
    """

    def __init__(self, x: Tensor, y: Tensor, mean: Mean, terms: Sequence[tuple[Kernel, float]]):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood(noise_constraint=positive()))
        self.mean_module = mean
        self.likelihood.to(x)
        with torch.no_grad():
            unexplained = (y - mean(x)).square().mean().clamp_min(1e-8)
            scaled = [ScaleKernel(kernel.to(x), outputscale_constraint=positive()).to(x) for kernel, _ in terms]
            for term, (kernel, share) in zip(scaled, terms, strict=True):
                register_log_prior(term, "outputscale", share * unexplained / kernel(x, diag=True).mean(), WIDTH)
            register_log_prior(self.likelihood, "noise", NOISE * unexplained, WIDTH)
        self.covar_module = sum(scaled[1:], start=scaled[0])

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class Mapped(Kernel):
    """A kernel of what a fixed function makes of the inputs: of a layer's features, or of the network's output."""

    def __init__(self, function: Map, base_kernel: Kernel):
        super().__init__()
        self.function = [function]  # in a list: a network's parameters are not the model's
        self.base_kernel = base_kernel

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params):
        return self.base_kernel.forward(self._mapped(x1), self._mapped(x2), diag=diag, **params)

    def _mapped(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function[0](x)


class WithOne(NamedTuple):
    """A layer's features, and a one for the bias."""

    features: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)


# ---- The models: network and labels to a GP ----


def matern(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    return GaussianProcess(x, y, NetworkMean(network), [(_stationary(MaternKernel(1.5), x), 1.0)])


def matern_and_features(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    terms = [(_stationary(MaternKernel(1.5), x), 0.5), (_on(network[:-1], MaternKernel(1.5), x), 0.5)]
    return GaussianProcess(x, y, NetworkMean(network), terms)


def rbf_on_features(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    return GaussianProcess(x, y, NetworkMean(network), [(_on(network[:-1], RBFKernel(), x), 1.0)])


def rbf_with_gain(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    """y = a f(x) + b + δ(x): what is known of two levels of fidelity (Kennedy and O'Hagan, 2000)."""
    gain = Mapped(network, _linear())
    terms = [(gain, GAIN), (_fixed_constant(), GAIN), (_stationary(RBFKernel(), x), 1.0)]
    return GaussianProcess(x, y, NetworkMean(network), terms)


def last_layer(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    """Bayesian linear regression on the penultimate features; the prior is centred on the trained last layer."""
    return GaussianProcess(x, y, NetworkMean(network), [(Mapped(WithOne(network[:-1]), _linear()), 1.0)])


def ntk(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    return GaussianProcess(x, y, NetworkMean(network), [(NTKKernel(network), 1.0)])


def ntk_and_matern(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    terms = [(NTKKernel(network), 0.5), (_stationary(MaternKernel(1.5), x), 0.5)]
    return GaussianProcess(x, y, NetworkMean(network), terms)


def untrained_ntk(network: nn.Sequential, x: Tensor, y: Tensor) -> GaussianProcess:
    """A control: the mean is the trained network, the kernel that of one of the same form with random weights."""
    untrained = make_network(x.shape[-1], seed=1000 + isinstance(network[1], nn.SiLU))
    return GaussianProcess(x, y, NetworkMean(network), [(NTKKernel(untrained), 1.0)])


def _rbf_ard(num_inputs: int) -> Kernel:
    return RBFKernel(ard_num_dims=num_inputs)


def from_scratch(
    network: nn.Sequential, x: Tensor, y: Tensor, kernel: Callable[[int], Kernel] = _rbf_ard
) -> GaussianProcess:
    """Without the network: a stationary kernel for so many inputs, and an unknown constant."""
    mean = ConstantMean().to(x)
    mean.initialize(constant=y.mean()).raw_constant.requires_grad_(False)  # what is unknown of it is in the kernel
    terms = [(_stationary(kernel(x.shape[-1]), x), 1.0), (_fixed_constant(), GAIN)]
    return GaussianProcess(x, y, mean, terms)


# ---- Fitting and predicting ----


def fit(model: GaussianProcess, with_priors: bool = True) -> GaussianProcess:
    """The mode of the posterior density of the logarithms of all hyperparameters; without priors, of the evidence.

    The latter may have its supremum at no noise at all: it is sought within seven e-folds of where it starts.
    """
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = functools.partial(_loss, model.train(), start, with_priors)
    if not _minimised(torch.optim.LBFGS(_trained(model), max_iter=100, line_search_fn="strong_wolfe"), loss, steps=1):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name])
        if not _minimised(torch.optim.Adam(_trained(model), lr=0.05), loss, steps=300):
            raise RuntimeError(f"No finite mode was found from {start}.")
    return model.eval()


def at_mode(model: GaussianProcess, x: Tensor, with_priors: bool = True) -> Gaussian:
    """With the hyperparameters of the mode."""
    fit(model, with_priors)
    with torch.no_grad():
        observed = model.likelihood(model(x))
        return Gaussian(observed.mean, observed.variance)


def averaged(model: GaussianProcess, x: Tensor) -> Prediction:
    """With hyperparameters averaged over, from the same mode."""
    return observations(averaged_over(fit(model), seed=0), x)


class Distributed(NamedTuple):
    """A distribution of this package's as a prediction; its densities are those of each point by itself."""

    distribution: torch.distributions.Distribution

    @property
    def mean(self) -> Tensor:
        return self.distribution.mean

    @property
    def variance(self) -> Tensor:
        return self.distribution.variance

    def log_density(self, y: Tensor) -> Tensor:
        return self.distribution.log_prob(y)


def observations(model: Any, x: Tensor) -> Prediction:
    """What an averaged model, or a ready one of this package's, predicts."""
    with torch.no_grad():
        distribution = model.predict(x)
        if isinstance(distribution, MultivariateNormal):  # its density is that of all points together
            return Gaussian(distribution.mean, distribution.variance)
        return Distributed(distribution)


# ---- Pieces ----


def positive() -> Positive:
    """A constraint whose raw parameter is the logarithm: a search goes as well from 1e-4 as from 1e4."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


def _stationary(kernel: Kernel, x: Tensor) -> Kernel:
    """With its lengthscales at the median distance between these points."""
    distances = torch.pdist(x)
    median = distances[distances > 0].median() if (distances > 0).any() else x.new_tensor(1.0)
    kernel.register_constraint("raw_lengthscale", positive())
    register_log_prior(kernel.to(x), "lengthscale", median, LENGTHSCALE_WIDTH)
    return kernel


def _on(features: nn.Module, kernel: Kernel, x: Tensor) -> Mapped:
    with torch.no_grad():
        return Mapped(features, _stationary(kernel, features(x)))


def _linear() -> Kernel:
    """The inner product; how large it is, its outputscale says."""
    kernel = LinearKernel()
    kernel.initialize(variance=1.0).raw_variance.requires_grad_(False)
    return kernel


def _fixed_constant() -> Kernel:
    kernel = ConstantKernel()
    kernel.initialize(constant=torch.ones(1)).raw_constant.requires_grad_(False)
    return kernel


def _trained(model: GaussianProcess) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loss(model: GaussianProcess, start: dict[str, Tensor], with_priors: bool) -> Tensor:
    (x,), y = model.train_inputs, model.train_targets
    loss = -model.likelihood(model(x)).log_prob(y)
    if with_priors:
        for _, module, prior, closure, _ in model.named_priors():
            loss = loss - prior.log_prob(closure(module)).sum()
        return loss
    for name, parameter in model.named_parameters():
        loss = loss + 1e2 * ((parameter - start[name]).abs() - 7.0).clamp_min(0.0).square().sum()
    return loss


def _minimised(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> bool:
    """Whether that ended at a finite value."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    try:
        for _ in range(steps):
            optimizer.step(closure)
        with torch.no_grad():
            return bool(loss().isfinite())
    except (NanError, NotPSDError):  # a step of the search went too far
        return False
