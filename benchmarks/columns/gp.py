"""Gaussian processes in GPyTorch: this package through its public interface, and GPyTorch with an explicit Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import gpytorch
import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ConstantKernel, Kernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import Mean
from linear_operator.operators import LinearOperator, MatmulLinearOperator, RootLinearOperator
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel

from .torch_base import TorchColumn


class AdaptedGP(gpytorch.models.ExactGP):
    """A plain `ExactGP`, as in GPyTorch's tutorials."""

    def __init__(self, x: Tensor, y: Tensor, likelihood: GaussianLikelihood, mean: Mean, kernel: Kernel):
        super().__init__(x, y, likelihood)
        self.mean_module = mean
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


class PosteriorColumn(TorchColumn):
    """Posterior, fit and service with a model that is made anew by every call, so that nothing is left in a cache."""

    def make_mean(self) -> Mean:
        return NetworkMean(self.network)

    def make_kernel(self) -> Kernel:
        return NTKKernel(self.network)

    def make_model(self, arrays: dict[str, np.ndarray], noise: float, *, scaled: bool = False) -> AdaptedGP:
        likelihood = GaussianLikelihood(noise_constraint=Positive()).to(self.x)
        likelihood.noise = self.x.new_tensor(noise)  # GPyTorch rounds a float to float32
        kernel = ScaleKernel(self.make_kernel()) if scaled else self.make_kernel()
        if scaled:
            kernel.outputscale = 1.0
        return AdaptedGP(self.x, self.tensor(arrays["y"]), likelihood, self.make_mean(), kernel).to(self.x)

    def posterior(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        """Mean and variance at the test inputs."""
        x_test = self.tensor(arrays["x_test"])

        def call() -> tuple[Tensor, Tensor]:
            model = self.make_model(arrays, noise).eval()
            with torch.no_grad():
                prediction = model(x_test)
                return prediction.mean, prediction.variance

        return call

    def mean(self, arrays: dict[str, np.ndarray], noise: float, tolerance: float) -> Callable:
        """The mean at the test inputs, no variance; where it takes iteration, to this relative residual."""
        x_test = self.tensor(arrays["x_test"])

        def call() -> Tensor:
            skip, stop = gpytorch.settings.skip_posterior_variances(), ntk_gp.settings.solve_tolerance(tolerance)
            with torch.no_grad(), skip, stop:
                return self.make_model(arrays, noise).eval()(x_test).mean

        return call

    def love(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        """Mean and fast variance at the test inputs."""
        call = self.posterior(arrays, noise)

        def fast() -> tuple[Tensor, Tensor]:
            with gpytorch.settings.fast_pred_var():
                return call()

        return fast

    def fit(self, arrays: dict[str, np.ndarray], steps: int, beside: tuple[str, ...] = ()) -> Callable:
        """Steps of Adam on noise, outputscale and the variances of kernels added; returns noise and outputscale.

        :param beside: What is added to the kernel, of "constant" and "gain".
        """

        def call() -> Tensor:
            model = self.make_model(arrays, 0.1, scaled=True)
            scaled = model.covar_module
            for name in beside:
                added = ConstantKernel() if name == "constant" else ntk_gp.GainKernel(self.network)
                model.covar_module = model.covar_module + added.to(self.x)
            fit(model, steps)
            return torch.stack([model.likelihood.noise.squeeze(), scaled.outputscale])

        return call

    def serve(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        """The mean at as many new inputs as there are test inputs, after everything was cached."""
        model = self.make_model(arrays, noise).eval()
        x_test = self.tensor(arrays["x_test"])

        def call() -> Tensor:
            # Inputs that were never seen: nothing computed for earlier ones is of use.
            with torch.no_grad(), gpytorch.settings.skip_posterior_variances():
                return model(x_test + 1e-3 * torch.rand_like(x_test)).mean

        call()
        return call

    def adapted(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        """The adapted network at one input."""
        adapted = ntk_gp.adapted_network(self.make_model(arrays, noise).eval())
        x = self.tensor(arrays["x_test"])[:1]
        return lambda: torch.no_grad()(adapted)(x)

    def adapted_by_hand(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        """The same, as one would write it with `torch.func`."""
        displacement = ntk_gp.adapted_network(self.make_model(arrays, noise).eval()).displacement
        parameters = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        pieces = displacement.split([parameter.numel() for parameter in parameters.values()])
        tangents = {name: t.reshape(parameters[name].shape) for name, t in zip(parameters, pieces, strict=True)}
        x = self.tensor(arrays["x_test"])[:1]

        def call() -> Tensor:
            with torch.no_grad():
                values, shift = torch.func.jvp(
                    lambda p: torch.func.functional_call(self.network, p, (x,)), (parameters,), (tangents,)
                )
                return (values + shift).squeeze(-1)

        return call

    def forward_pass(self, arrays: dict[str, np.ndarray]) -> Callable:
        """The network alone at the test inputs."""
        x_test = self.tensor(arrays["x_test"])

        def call() -> Tensor:
            with torch.no_grad():
                return self.network(x_test)

        return call


def fit(model: AdaptedGP, steps: int, learning_rate: float = 0.1) -> None:
    """GPyTorch's usual training loop."""
    model.train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -mll(model(*model.train_inputs), model.train_targets)
        loss.backward()
        optimizer.step()


class ExplicitJacobianColumn(PosteriorColumn):
    """What a GPyTorch user would write: the Jacobian as a matrix, in a `RootLinearOperator`.

    :param solver: "default" for GPyTorch's defaults (CG beyond 800 points), "cholesky" for exact solves.
    """

    def __init__(self, solver: str, device: str = "cpu"):
        super().__init__(device)
        self.solver = solver

    def make_mean(self) -> Mean:
        return ModuleMean(self.network)

    def make_kernel(self) -> Kernel:
        return ExplicitJacobianKernel(self.network)

    def posterior(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        call = super().posterior(arrays, noise)

        def solved() -> tuple[Tensor, Tensor]:
            size = len(self.x) if self.solver == "cholesky" else gpytorch.settings.max_cholesky_size.value()
            with gpytorch.settings.max_cholesky_size(size):
                return call()

        return solved


class ModuleMean(Mean):
    """A module as a mean function."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = [network]  # in a list: its parameters are not the model's

    def forward(self, x: Tensor) -> Tensor:
        return self.network[0](x).squeeze(-1)


class ExplicitJacobianKernel(Kernel):
    """J Jᵀ with an explicit J."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = [network]  # in a list: its parameters are not the model's

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params) -> LinearOperator | Tensor:
        first = explicit_jacobian(self.network[0], x1)
        if diag:
            return first.square().sum(-1)
        if x1.shape == x2.shape and torch.equal(x1, x2):
            return RootLinearOperator(first)
        return MatmulLinearOperator(first, explicit_jacobian(self.network[0], x2).mT)


def explicit_jacobian(network: nn.Module, x: Tensor) -> Tensor:
    """(n, d) to (n, P), for one output."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def single(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(network, parameters, (x[None],)).squeeze()

    pieces = vmap(jacrev(single), (None, 0))(parameters, x)
    return torch.cat([piece.flatten(1) for piece in pieces.values()], dim=-1)
