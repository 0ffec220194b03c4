"""Float64 references, independent of every engine and solver that is measured."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from .columns.gp import explicit_jacobian
from .columns.torch_func import TorchFuncColumn

Posterior = tuple[np.ndarray, np.ndarray]


class Reference:
    """J u, Jᵀ v, K V and the diagonal of K by `torch.func`, in float64, at the same weights and inputs.

    :param network: The network.
    :param x: The inputs, (n, d).
    """

    def __init__(self, network: nn.Module, x: Tensor):
        self.column = TorchFuncColumn()
        self.column.network = copy.deepcopy(network).double()
        self.column.x = x.double()
        self.column.parameters = {name: p.detach() for name, p in self.column.network.named_parameters()}

    def jvp(self, tangent: np.ndarray) -> np.ndarray:
        return self.column.jvp({"tangent": tangent.astype(np.float64)})().numpy()

    def vjp(self, cotangents: np.ndarray) -> np.ndarray:
        return self.column.vjp({"rhs": cotangents.astype(np.float64)})().numpy()

    def kernel_matmul(self, rhs: np.ndarray) -> np.ndarray:
        columns = torch.tensor(rhs.T.astype(np.float64))
        return torch.stack([self.column.apply(self.column.transposed(v)) for v in columns], dim=-1).numpy()

    def diagonal(self, chunk: int = 64) -> np.ndarray:
        """Chunk by chunk, because the explicit Jacobian of a large network is larger than the network."""
        x, pieces = self.column.x, []
        for self.column.x in x.split(chunk):
            pieces.append(self.column.diagonal({})())
        self.column.x = x
        return torch.cat(pieces).numpy()


class Problem:
    """A regression problem in float64: network, training data and test inputs.

    :param network: An MLP with one output.
    :param arrays: The case's arrays `x`, `y` and `x_test`.
    """

    def __init__(self, network: nn.Sequential, arrays: dict[str, np.ndarray]):
        self.network = copy.deepcopy(network).double()
        self.x, y, self.x_test = (torch.tensor(arrays[name]).double() for name in ("x", "y", "x_test"))
        with torch.no_grad():
            self.residuals = y - self.network(self.x).squeeze(-1)
            self.prior_mean = self.network(self.x_test).squeeze(-1)

    def closed_form(self, noise: float) -> Posterior:
        """Mean and variance by a Cholesky factor of K + noise·I. For the usual noises; see :meth:`spectral`."""
        train, test = layer_factors(self.network, self.x), layer_factors(self.network, self.x_test)
        kernel = gram(train, train)
        kernel.diagonal().add_(noise)
        factor = torch.linalg.cholesky(kernel)
        cross = gram(train, test)
        mean = self.prior_mean + cross.mT @ torch.cholesky_solve(self.residuals[:, None], factor).squeeze(-1)
        explained = torch.linalg.solve_triangular(factor, cross, upper=False).square().sum(0)
        prior = sum((a.square().sum(-1) + 1) * g.square().sum(-1) for a, g in test)
        return mean.numpy(), (prior - explained).numpy()

    def weight_space(self, noise: float, chunk: int = 10_000) -> Posterior:
        """Mean and variance by a Cholesky factor of JᵀJ + noise·I, accumulated over chunks of the dense J."""
        test = explicit_jacobian(self.network, self.x_test)
        precision = noise * torch.eye(test.shape[1], dtype=test.dtype)
        moment = test.new_zeros(test.shape[1])
        for x, residuals in zip(self.x.split(chunk), self.residuals.split(chunk), strict=True):
            jacobian = explicit_jacobian(self.network, x)
            precision.addmm_(jacobian.mT, jacobian)
            moment.addmv_(jacobian.mT, residuals)
        factor = torch.linalg.cholesky(precision)
        mean = self.prior_mean + test @ torch.cholesky_solve(moment[:, None], factor).squeeze(-1)
        variance = noise * torch.linalg.solve_triangular(factor, test.mT, upper=False).square().sum(0)
        return mean.numpy(), variance.numpy()

    def spectral(self, noises: list[float]) -> list[Posterior]:
        """Mean and variance by the singular values of the dense J, whose condition number is the square root of K's."""
        jacobian, test = explicit_jacobian(self.network, self.x), explicit_jacobian(self.network, self.x_test)
        left, values, right = torch.linalg.svd(jacobian, full_matrices=False)
        coordinates = left.mT @ self.residuals
        features = test @ right.mT
        rest = (test - features @ right).square().sum(-1) if len(self.x) < jacobian.shape[1] else 0.0
        posteriors = []
        for noise in noises:
            mean = self.prior_mean + features @ (values / (values.square() + noise) * coordinates)
            variance = features.square() @ (noise / (values.square() + noise)) + rest
            posteriors.append((mean.numpy(), variance.numpy()))
        return posteriors


def layer_factors(network: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each linear layer of an MLP with one output: its inputs a, and the output's gradient g at its outputs."""
    inputs, outputs = [], []
    hidden = x
    with torch.enable_grad():
        for layer in network:
            if isinstance(layer, nn.Linear):
                inputs.append(hidden.detach())
            hidden = layer(hidden)
            if isinstance(layer, nn.Linear):
                outputs.append(hidden)
        gradients = torch.autograd.grad(hidden.sum(), outputs)
    return list(zip(inputs, gradients, strict=True))


def gram(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> Tensor:
    """K = Σ_l (A A'ᵀ + 1) ∘ (G G'ᵀ) over the linear layers."""
    return sum((a1 @ a2.mT + 1) * (g1 @ g2.mT) for (a1, g1), (a2, g2) in zip(first, second, strict=True))
