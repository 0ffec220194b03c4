"""Models to average over as shared data, with their marginal likelihoods and predictions in plain torch."""

from __future__ import annotations

import math

import gpytorch
import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor

from ntk_gp.priors import register_log_prior


class PlainGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, covar_module: Kernel, likelihood: Likelihood | None = None, mean=None):
        super().__init__(x, y, likelihood or GaussianLikelihood(noise_constraint=Positive()))
        self.mean_module = mean or gpytorch.means.ZeroMean()
        self.covar_module = covar_module
        self.double()

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def data(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, (5 * x).sin().squeeze(-1) + 0.3 * noise


# The medians and widths of the priors on noise, outputscale and lengthscale.
PRIORS = {"noise": (0.05, 1.0), "outputscale": (0.8, 1.2), "lengthscale": (0.4, 0.7)}


def rbf_model(free: tuple[str, ...] = tuple(PRIORS), n: int = 12) -> PlainGP:
    """A squared exponential kernel; what is not free stays at its prior's median."""
    model = PlainGP(*data(n), ScaleKernel(RBFKernel()))
    owners = {"noise": model.likelihood, "outputscale": model.covar_module}
    owners["lengthscale"] = model.covar_module.base_kernel
    for name, (value, width) in PRIORS.items():
        register_log_prior(owners[name], name, value, width)
        if name not in free:
            parameter = next(p for key, p in model.named_parameters() if key.endswith(f"raw_{name}"))
            parameter.requires_grad_(False)
    return model


def rbf_matrices(model: PlainGP, u: Tensor, z: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance at the training inputs with noise, that between those and z, and the prior variance at z, for
    u (..., 3), the logarithms of noise, outputscale and lengthscale."""
    noise, scale, lengthscale = (part[..., None, None] for part in u.exp().unbind(-1))
    (x,) = model.train_inputs
    z = x if z is None else z

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return scale * (-(one - other.mT).square() / (2 * lengthscale.square())).exp()

    return kernel(x, x) + noise * torch.eye(len(x), dtype=x.dtype), kernel(z, x), scale[..., 0]


def rbf_log_likelihood(model: PlainGP, u: Tensor) -> Tensor:
    """log p(y | u), (...)."""
    factor = torch.linalg.cholesky(rbf_matrices(model, u)[0])
    y = model.train_targets
    white = torch.linalg.solve_triangular(factor, y[:, None].expand(*factor.shape[:-1], 1), upper=False)
    logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -white.square().sum((-1, -2)) / 2 - logdet / 2 - len(y) / 2 * math.log(2 * math.pi)


def log_priors(u: Tensor) -> Tensor:
    """The log density of the priors at u (..., 3)."""
    centers = u.new_tensor([math.log(value) for value, _ in PRIORS.values()])
    widths = u.new_tensor([width for _, width in PRIORS.values()])
    return torch.distributions.Normal(centers, widths).log_prob(u)


def rbf_predictions(model: PlainGP, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the function at z (m, 1), (..., m) each."""
    covariance, cross, prior = rbf_matrices(model, u, z)
    solved = torch.linalg.solve(covariance, cross.mT)
    mean = (solved.mT @ model.train_targets[:, None]).squeeze(-1)
    return mean, prior - (cross * solved.mT).sum(-1)
