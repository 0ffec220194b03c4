"""Models that ranks make alike: each kind of kernel, with data and what is asked of it."""

from __future__ import annotations

from collections.abc import Callable

import gpytorch
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

from ntk_gp import GainKernel, NTKKernel
from tests.adapted import LARGE, SMALL, AdaptedGP, data, network

Results = dict[str, Tensor]

# Kernels of a network with one output.
KERNELS: dict[str, Callable[[nn.Module], Kernel]] = {
    "ntk": NTKKernel,
    "scaled": lambda net: ScaleKernel(NTKKernel(net)),
    "layers": lambda net: NTKKernel(net, variance_groups="layer"),
    "gain": lambda net: ScaleKernel(NTKKernel(net)) + GainKernel(net),
    "stationary": lambda net: ScaleKernel(NTKKernel(net)) + ScaleKernel(MaternKernel()),
    "product": lambda net: NTKKernel(net) * MaternKernel(),
}


def model_of(kernel: str, n: int = SMALL, dtype: torch.dtype = torch.float64) -> AdaptedGP:
    """With one output, of n points."""
    net = network()
    x, y = (tensor.to(dtype) for tensor in data(n))
    model = AdaptedGP(x, y, net, KERNELS[kernel](net).to(dtype), GaussianLikelihood().to(dtype))
    model.likelihood.noise = 0.1
    return model


def batched() -> AdaptedGP:
    """Three data sets, of one network."""
    net, (x, y) = network(), data(LARGE, 3)
    kernel = ScaleKernel(NTKKernel(net), batch_shape=torch.Size([3])).double()
    model = AdaptedGP(x, y, net, kernel, GaussianLikelihood(batch_shape=torch.Size([3])).double())
    model.likelihood.noise = 0.1
    return model


def multitask(last_layer: bool = False) -> AdaptedGP:
    """Two outputs, of all parameters or of those of the last layer, which share none."""
    net, (x, y) = network(outputs=2), data(LARGE // 2, outputs=2)
    parameters = ["2.weight", "2.bias"] if last_layer else None
    likelihood = MultitaskGaussianLikelihood(num_tasks=2, rank=0).double()
    kernel = NTKKernel(net, output="all", parameters=parameters).double()
    return AdaptedGP(x, y, net, kernel, likelihood, output="all")


def training_terms(model: AdaptedGP) -> Results:
    """The marginal likelihood with its derivatives."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    value = ExactMarginalLogLikelihood(model.likelihood, model)(model(*model.train_inputs), model.train_targets).sum()
    gradients = torch.autograd.grad(value, parameters)
    return {"marginal likelihood": value.detach(), "its gradient": torch.cat([g.reshape(-1) for g in gradients])}


def predictions(model: AdaptedGP, fast: bool = False) -> Results:
    """At test points, few and more than there are ranks."""
    model.eval()
    x = model.train_inputs[0]
    test_x = data(5, *x.shape[:-2], seed=1)[0].to(x.dtype)
    with torch.no_grad(), gpytorch.settings.fast_pred_var(fast):
        posterior = model(test_x)
        found = {"mean": posterior.mean, "variance": posterior.variance}
        if not fast:
            found["covariance"] = posterior.covariance_matrix
    if isinstance(posterior, MultitaskMultivariateNormal):
        assert posterior.mean.shape[-1] == 2
    return found


def everything(model: AdaptedGP) -> Results:
    return {**training_terms(model), **predictions(model)}
