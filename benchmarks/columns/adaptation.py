"""Ways to adapt a trained network to new data, or to do without it. Each returns mean and variance of new targets."""

from __future__ import annotations

import copy
from collections.abc import Callable

import gpytorch
import numpy as np
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.variational import CholeskyVariationalDistribution, VariationalStrategy
from torch import Tensor, nn

from ..problems import fit_network
from .gp import PosteriorColumn, fit
from .torch_base import TorchColumn

Prediction = tuple[Tensor, Tensor]

# Two hyperparameters are known well from so many; an eigendecomposition of all points would take most of the time.
FITTING_ROWS = 4000


class NetworkColumn(TorchColumn):
    """The network as it is, with its mean squared error on the new data as the variance."""

    def adapt(self, arrays: dict[str, np.ndarray]) -> Callable:
        y, x_test = self.tensor(arrays["y"]), self.tensor(arrays["x_test"])
        return lambda: _with_constant_variance(self.network, self.x, y, x_test)


class FineTuningColumn(TorchColumn):
    """Trains on with nine tenths of the new data; the variance is the mean squared error on the last tenth."""

    def adapt(self, arrays: dict[str, np.ndarray], steps: int) -> Callable:
        y, x_test = self.tensor(arrays["y"]), self.tensor(arrays["x_test"])
        held_out = slice(None, len(y) // 10)
        used = slice(len(y) // 10, None)

        def call() -> Prediction:
            network = copy.deepcopy(self.network)
            fit_network(network, self.x[used], y[used], steps)
            return _with_constant_variance(network, self.x[held_out], y[held_out], x_test)

        return call


class NTKColumn(PosteriorColumn):
    """Noise and outputscale fitted by Adam on some of the points, then the exact posterior from all of them."""

    def adapt(self, arrays: dict[str, np.ndarray], steps: int) -> Callable:
        x_test = self.tensor(arrays["x_test"])

        def call() -> Prediction:
            model = self.make_model(arrays, 0.1, scaled=True)
            x, y = model.train_inputs[0], model.train_targets
            some = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:FITTING_ROWS]
            model.set_train_data(x[some], y[some], strict=False)
            fit(model, steps)
            model.set_train_data(x, y, strict=False)
            model.eval()
            with torch.no_grad():
                prediction = model(x_test)
                return prediction.mean, prediction.variance + model.likelihood.noise

        return call


class SVGPColumn(TorchColumn):
    """Sparse variational regression with a Matérn-5/2 kernel on the new data alone."""

    def adapt(self, arrays: dict[str, np.ndarray], steps: int, num_inducing: int) -> Callable:
        y, x_test = self.tensor(arrays["y"]), self.tensor(arrays["x_test"])

        def call() -> Prediction:
            model, likelihood = SVGP(self.x[:num_inducing].clone()), GaussianLikelihood()
            mll = gpytorch.mlls.VariationalELBO(likelihood, model, len(y))
            optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.02)
            generator = torch.Generator().manual_seed(0)
            for _ in range(steps):
                rows = torch.randint(len(y), (1000,), generator=generator)
                optimizer.zero_grad()
                (-mll(model(self.x[rows]), y[rows])).backward()
                optimizer.step()
            model.eval(), likelihood.eval()
            with torch.no_grad():
                prediction = likelihood(model(x_test))
                return prediction.mean, prediction.variance

        return call


class SVGP(gpytorch.models.ApproximateGP):
    def __init__(self, inducing: Tensor):
        distribution = CholeskyVariationalDistribution(len(inducing))
        super().__init__(VariationalStrategy(self, inducing, distribution, learn_inducing_locations=True))
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = ScaleKernel(MaternKernel(ard_num_dims=inducing.shape[-1]))

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _with_constant_variance(network: nn.Module, x: Tensor, y: Tensor, x_test: Tensor) -> Prediction:
    with torch.no_grad():
        mean = network(x_test).squeeze(-1)
        variance = (network(x).squeeze(-1) - y).square().mean()
    return mean, variance.expand_as(mean)
