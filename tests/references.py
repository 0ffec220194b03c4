"""Independent references: explicit Jacobians by plain autograd, some points at a time, and closed forms on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def jacobian(network: nn.Module, x: Tensor, parameters: list[Tensor] | None = None) -> Tensor:
    """The Jacobian (*batch, n·C, P) of a network's outputs at x (*batch, n, …), rows point-major.

    Some points go through the network together; differentiable with respect to `x` where it requires that.
    """
    parameters = [p for p in network.parameters() if p.requires_grad] if parameters is None else parameters
    with torch.enable_grad():
        result = _jacobian(network, x, parameters)
    return result if torch.is_grad_enabled() and x.requires_grad else result.detach()


def _jacobian(network: nn.Module, x: Tensor, parameters: list[Tensor]) -> Tensor:
    rows = [_rows(network(points), parameters, x.requires_grad) for points in x.reshape(-1, x.shape[-1]).split(16)]
    return torch.cat(rows).reshape(*x.shape[:-2], -1, rows[0].shape[1])


def _rows(outputs: Tensor, parameters: list[Tensor], create_graph: bool) -> Tensor:
    gradients = torch.autograd.grad(
        outputs.reshape(-1),
        parameters,
        torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device),
        is_grads_batched=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([gradient.reshape(outputs.numel(), -1) for gradient in gradients], dim=1)


def kernel(network: nn.Module, x1: Tensor, x2: Tensor | None = None, variances: Tensor | None = None) -> Tensor:
    """J(x₁) Σ J(x₂)ᵀ, (*batch, n₁·C, n₂·C), with one prior variance for each parameter, (..., P), if not all one."""
    jacobian1 = jacobian(network, x1)
    jacobian2 = jacobian1 if x2 is None else jacobian(network, x2)
    return (jacobian1 if variances is None else jacobian1 * variances) @ jacobian2.mT


def posterior(
    prior_mean: Tensor, prior_covariance: Tensor, noise: Tensor | float, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Closed-form posterior of the last rows of a joint prior, given noisy targets for the first ones."""
    n = targets.shape[-1]
    noisy = prior_covariance[..., :n, :n] + torch.eye(n, dtype=targets.dtype) * noise
    cross = prior_covariance[..., n:, :n]
    gain = torch.linalg.solve(noisy, cross.mT).mT
    mean = prior_mean[..., n:] + (gain @ (targets - prior_mean[..., :n]).unsqueeze(-1)).squeeze(-1)
    return mean, prior_covariance[..., n:, n:] - gain @ cross.mT


def log_marginal_likelihood(residual: Tensor, covariance: Tensor) -> Tensor:
    """log N(residual; 0, covariance), per data point as `gpytorch.mlls.ExactMarginalLogLikelihood` gives it."""
    zero = torch.zeros_like(residual)
    return torch.distributions.MultivariateNormal(zero, covariance).log_prob(residual) / residual.shape[-1]
