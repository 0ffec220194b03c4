"""Adapted Gaussian processes as shared data: models, and the closed forms they are held against."""

from __future__ import annotations

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from tests import references

# A network with 41 parameters in 2 layers: less than the points of LARGE data sets, more than those of SMALL ones.
SMALL, LARGE = 12, 60


def network(inputs: int = 3, outputs: int = 1, width: int = 8, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def data(
    n: int, *batch_shape: int, inputs: int = 3, seed: int = 0, outputs: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs (*batch, n, d) and targets (*batch, n), or (*batch, n, C)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch_shape, n, inputs, dtype=torch.float64, generator=generator)
    size = () if outputs is None else (outputs,)
    noise = torch.randn(*batch_shape, n, *size, dtype=torch.float64, generator=generator)
    y = x.sin().sum(-1)
    return x, (y if outputs is None else y.unsqueeze(-1)) + 0.1 * noise


class AdaptedGP(gpytorch.models.ExactGP):
    """The model of the README: the network as the mean, a neural tangent kernel (or what is given) as the kernel."""

    def __init__(
        self,
        x: Tensor | None,
        y: Tensor | None,
        net: nn.Module,
        covar_module: Kernel | None = None,
        likelihood: Likelihood | None = None,
        output: str | None = None,
    ):
        likelihood = GaussianLikelihood().double() if likelihood is None else likelihood
        super().__init__(x, y, likelihood)
        self.mean_module = NetworkMean(net, output=output)
        kernel = NTKKernel(net, output=output)
        self.covar_module = ScaleKernel(kernel).double() if covar_module is None else covar_module
        self.multitask = output == "all"

    def forward(self, x: Tensor) -> MultivariateNormal:
        cls = MultitaskMultivariateNormal if self.multitask else MultivariateNormal
        return cls(self.mean_module(x), self.covar_module(x))


_kernels: dict[tuple, Tensor] = {}


def reference_kernel(net: nn.Module, x: Tensor) -> Tensor:
    """`references.kernel` of one of these networks, once for the same inputs and weights: at 800 points it takes longer
    than what it is compared with."""
    tensors = [x, *net.parameters()]
    key = (str(net), *((t.dtype, t.shape, t.detach().cpu().numpy().tobytes()) for t in tensors))
    if key not in _kernels:
        _kernels[key] = references.kernel(net, x)
    return _kernels[key]


def closed_form(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    noise: Tensor | float,
    variances: Tensor | float = 1.0,
    added: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Posterior mean and covariance at test inputs, by explicit Jacobians and a dense solve in float64.

    :param noise: The diagonal, (*batch, N), or one number.
    :param variances: One prior variance for each parameter, or one for all.
    :param added: Another kernel to add.
    """
    batch = torch.broadcast_shapes(x.shape[:-2], test_x.shape[:-2], y.shape[:-1])
    joint = torch.cat([z.expand(*batch, *z.shape[-2:]) for z in (x, test_x)], dim=-2)
    variances = torch.as_tensor(variances, dtype=torch.float64)
    covariance = references.kernel(net, joint, variances=variances)
    if added is not None:
        covariance = covariance + added(joint).to_dense()
    mean = net(joint).reshape(*joint.shape[:-2], -1).detach()
    noise = torch.as_tensor(noise, dtype=torch.float64).unsqueeze(-1)
    return references.posterior(mean, covariance, noise, y)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    """Equal up to a part of the largest element."""
    assert actual.shape == expected.shape
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * max(scale, 1e-300))


def beyond_gain_and_offset(f: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """v₁ by projection: the residual sum of squares, and half a point of v₀."""
    columns = torch.stack([f, torch.ones_like(f)], dim=-1)
    rest = residual - columns @ (torch.linalg.pinv(columns) @ residual)
    v0 = residual.square().mean()
    return ((rest.square().sum() + v0 / 2) / (len(f) - 2 + 0.5)).minimum(v0)
