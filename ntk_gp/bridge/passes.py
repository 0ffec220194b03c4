"""Passes through the network that serve a model's mean and its kernel at once.

At training inputs J(X) is captured for whatever follows, a marginal likelihood or predictions, and f(X) comes with it.
At test inputs J(x) ŵ takes a pass that gives f(x) too; where only the last layer takes part, J(x) is what that layer is
given, and the variances may have it as well.
"""

from __future__ import annotations

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from gpytorch.models import GP, ExactGP
from torch import Tensor

from ..jacobian.linearization import Linearization
from ..network import FrozenNetwork, check_finite
from .prediction_strategies import NTKPredictionStrategy
from .recognised import KnownFeaturesKernel, named_modules_of

# What may stand around or beside the kernel.
_LINEAR = (ScaleKernel, AdditiveKernel, KnownFeaturesKernel)


def values_along(model: GP, network: FrozenNetwork, x: Tensor) -> Tensor | None:
    """f, (N, C), of a model's mean at inputs (*batch, m, d) from a pass that its kernel needs; None where it needs
    none, or not at these inputs, or its network is another."""
    if not isinstance(model, ExactGP) or x.numel() == 0:
        return None
    strategy = model.prediction_strategy
    if not model.training and isinstance(strategy, NTKPredictionStrategy):
        return strategy.values_along(network, x)
    if strategy is not None or x.dim() != 2 or model.train_targets is None or gpytorch_settings.prior_mode.on():
        return None
    linearization = _linearization_of(model)
    if linearization is None or not linearization.has_values_of(network):
        return None
    check_finite(x)
    with torch.no_grad():
        values = linearization.jacobian(x.double().unsqueeze(0)).values
    return None if values is None else values[0].to(x.dtype, copy=True)


def _linearization_of(model: ExactGP) -> Linearization | None:
    """That of the one neural tangent kernel, where the model's matrix is linear in its weights: those are solved from
    J in float64."""
    kernels = [module for _, module in named_modules_of(model) if isinstance(module, Kernel)]
    tangent = [kernel for kernel in kernels if getattr(kernel, "is_linear_in_weights", False)]
    if len(tangent) != 1 or not all(isinstance(kernel, _LINEAR) for kernel in kernels if kernel is not tangent[0]):
        return None
    return tangent[0]._linearization
