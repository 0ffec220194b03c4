"""The network as it is, and trained on with the labels."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .predictions import Gaussian, with_constant_variance

STEPS, FOLDS, RATE = 300, 5, 1e-2


def unadapted(network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor) -> Gaussian:
    """Its variance is what it leaves of the labels."""
    with torch.no_grad():
        residuals = network(x).squeeze(-1) - y
        return with_constant_variance(network(x_test).squeeze(-1), residuals.square().mean())


def all_layers(network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor, rate: float = RATE) -> Gaussian:
    return _predict(network, x, y, x_test, False, rate)


def last_layer(network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor, rate: float = RATE) -> Gaussian:
    return _predict(network, x, y, x_test, True, rate)


def fine_tuned(
    network: nn.Sequential, x: Tensor, y: Tensor, last_layer_only: bool = False, rate: float = RATE
) -> nn.Sequential:
    """Least squares by Adam, from the trained weights; the network that is passed stays as it is."""
    network = copy.deepcopy(network)
    part: nn.Module = network
    if last_layer_only:
        part = network[-1]
        with torch.no_grad():
            x = network[:-1](x)  # always the same
    optimizer = torch.optim.Adam(part.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (part(x).squeeze(-1) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network


def cross_validated(
    network: nn.Sequential, x: Tensor, y: Tensor, last_layer_only: bool = False, rate: float = RATE
) -> Tensor:
    """The mean squared error on labels that were left out, (): those that were fitted to would say nearly zero."""
    errors = torch.empty_like(y)
    for fold in range(FOLDS):
        held_out = torch.arange(len(y)) % FOLDS == fold
        tuned = fine_tuned(network, x[~held_out], y[~held_out], last_layer_only, rate)
        with torch.no_grad():
            errors[held_out] = tuned(x[held_out]).squeeze(-1) - y[held_out]
    return errors.square().mean()


def _predict(
    network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor, last_layer_only: bool, rate: float
) -> Gaussian:
    """A network has no error bars of its own: it gets one variance, from cross-validation."""
    tuned = fine_tuned(network, x, y, last_layer_only, rate)
    with torch.no_grad():
        mean = tuned(x_test).squeeze(-1)
    return with_constant_variance(mean, cross_validated(network, x, y, last_layer_only, rate))
