"""Functions drawn from the posterior, and the adapted network: each is a vector of weights.

A draw from the posterior over functions is the network's linearisation at a draw from the posterior over weights
(pathwise conditioning: Wilson, Borovitskiy, Terenin, Mostowsky and Deisenroth, "Efficiently sampling functions from
Gaussian process posteriors", ICML 2020; exact here, since the prior has finitely many weights).
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.models import ExactGP
from torch import Tensor, nn

from .jacobian.linearization import Linearization
from .kernels import NTKKernel
from .means import NetworkMean
from .network import FrozenNetwork
from .prediction import NTKPredictionStrategy


class LinearizedFunctions(nn.Module):
    r"""Functions :math:`m(x) + J(x) w_s` for k weight vectors :math:`w_s`, evaluated anywhere by one Jacobian-vector
    product each, and differentiable in x.

    :param network: The frozen network whose Jacobian it is.
    :param weights: (k, P), float64.
    :param mean_module: The prior mean m.
    :param active_dims: The columns of the inputs that the network sees.
    :param input_transform: Applied to x first, as BoTorch's models do.
    :param outcome_transform: Undone on the functions' values, as BoTorch's models do.
    """

    weights: Tensor
    active_dims: Tensor | None

    def __init__(
        self,
        network: FrozenNetwork,
        weights: Tensor,
        mean_module: nn.Module,
        active_dims: Tensor | None = None,
        input_transform: nn.Module | None = None,
        outcome_transform: Any = None,
    ):
        super().__init__()
        self.network = network
        self.mean_module = mean_module
        self.register_buffer("weights", weights)
        self.register_buffer("active_dims", active_dims)
        self.input_transform = input_transform
        self.outcome_transform = outcome_transform
        self._linearization = Linearization(network)

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, n, d) to (k, *batch, n), or (k, *batch, n, C) for all of a network's outputs."""
        x = self.network.flattened(x)
        x = x if self.input_transform is None else self.input_transform(x)
        mean = self.mean_module(x)
        columns = x if self.active_dims is None else x.index_select(-1, self.active_dims)
        flat = columns.reshape(1, -1, columns.shape[-1])
        shift = self._linearization.autodiff.linearize(flat).jvp(self.weights.to(x).unsqueeze(0))
        values = mean + shift.reshape(len(self.weights), *mean.shape)
        if self.outcome_transform is None:
            return values
        if mean.dim() < x.dim():
            return self.outcome_transform.untransform(values.unsqueeze(-1))[0].squeeze(-1)
        return self.outcome_transform.untransform(values)[0]


class LinearizedNetwork(nn.Module):
    r"""The adapted network :math:`f(x) + J(x) \hat w`, for serving without GPyTorch.

    Maps (*batch, n, d) to (*batch, n), or (*batch, n, C) for all of a network's outputs, in the dtype and on the
    device of x. Its `state_dict` holds the network's weights and ŵ.

    :param network: The frozen network.
    :param displacement: ŵ, (P,).
    """

    displacement: Tensor

    def __init__(self, network: FrozenNetwork, displacement: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("displacement", displacement)
        self._linearization = Linearization(network)

    def forward(self, x: Tensor) -> Tensor:
        x = self.network.flattened(x)
        mean = self.network(x)
        flat = x.reshape(1, -1, x.shape[-1])
        shift = self._linearization.autodiff.linearize(flat).jvp(self.displacement.to(x).reshape(1, 1, -1))
        return mean + shift.reshape(mean.shape)


def draw_functions(
    model: ExactGP, num_functions: int, *, prior: bool = False, generator: torch.Generator | None = None
) -> LinearizedFunctions:
    r"""Draws functions from a model's posterior, or from its prior, exactly.

    With :math:`w \sim N(0, \Sigma)` and :math:`\varepsilon \sim N(0, D)`, the weights
    :math:`w + \Sigma J^\top (K + D)^{-1} (y - m - J w - \varepsilon)` are a draw from their posterior. Costs one
    solve with `num_functions` columns; memory of num_functions·P.

    :param model: An :class:`~gpytorch.models.ExactGP` in eval mode whose kernel is an
        :class:`~ntk_gp.kernels.NTKKernel`, scaled or not, without batches.
    :param num_functions: How many, k.
    :param prior: Draw from the prior instead.
    :param generator: The source of randomness. (Default: torch's own, on the CPU.)
    :return: A module that maps (*batch, n, d) to (k, *batch, n).
    :raises TypeError: If the kernel is of another kind.
    :raises ValueError: If the model has batches, or its `forward` does more than apply mean and kernel to its inputs.
    """
    _check_is_model(model)
    kernel = _ntk_kernel(model.covar_module)
    strategy = _prediction_strategy(model)
    system = strategy.solver.system
    device = system.x.device
    roots = system.root_variances
    weights = _normal((num_functions, system.num_parameters), generator, device) * roots
    if not prior:
        noise = _normal((num_functions, system.num_rows), generator, device) * system.noise.sqrt()
        residual = strategy.residual.reshape(1, -1) - system.jacobian.jvp(weights.unsqueeze(0))[0] - noise
        weights = weights + strategy.solver.mean_weights(residual.unsqueeze(0))[0]
    return LinearizedFunctions(
        kernel.network,
        weights,
        model.mean_module,
        model.covar_module.active_dims,
        getattr(model, "input_transform", None),
        getattr(model, "outcome_transform", None),
    )


def adapted_network(model: ExactGP) -> LinearizedNetwork:
    """The posterior mean of a model as a network of its own, f(x) + J(x) ŵ.

    :param model: An :class:`~gpytorch.models.ExactGP` in eval mode with a :class:`~ntk_gp.means.NetworkMean` and an
        :class:`~ntk_gp.kernels.NTKKernel` (scaled or not) of the same network, without batches.
    :raises TypeError: If mean or kernel are of another kind.
    :raises ValueError: If they are of different networks, or the model does more than apply them to its inputs.
    """
    _check_is_model(model)
    kernel, mean = _ntk_kernel(model.covar_module), model.mean_module
    if not isinstance(mean, NetworkMean):
        raise TypeError(f"Expected a NetworkMean as the model's mean, got {type(mean).__name__}.")
    if not _same_network(kernel.network, mean.network):
        raise ValueError(
            "Expected mean and kernel of the same network, with the same output and input_shape; they differ. Make "
            "both from one network, or call model(x) instead."
        )
    if model.covar_module.active_dims is not None or mean.active_dims is not None:
        raise ValueError("A kernel or mean with active_dims sees only some inputs: call model(x) instead.")
    if any(getattr(model, name, None) is not None for name in ("input_transform", "outcome_transform")):
        raise ValueError("A model that transforms inputs or outcomes is more than a network: call model.posterior(x).")
    return LinearizedNetwork(kernel.network, _prediction_strategy(model).mean_weights)


def _check_is_model(model: Any) -> None:
    if not isinstance(model, ExactGP) or not all(hasattr(model, name) for name in ("covar_module", "mean_module")):
        raise TypeError(
            f"Expected a gpytorch.models.ExactGP with a mean_module and a covar_module, got {type(model).__name__}. A "
            "network becomes one with training data: its mean_module is NetworkMean(network), its covar_module "
            "ScaleKernel(NTKKernel(network)); pass that model, in eval mode."
        )


def _same_network(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    if (one.output, one.input_shape) != (other.output, other.input_shape):
        return False
    tensors, others = dict(one.named_buffers()), dict(other.named_buffers())
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def _ntk_kernel(kernel: Kernel) -> NTKKernel:
    inner = kernel
    while isinstance(inner, ScaleKernel):
        inner = inner.base_kernel
    if not isinstance(inner, NTKKernel):
        raise TypeError(f"Expected an NTKKernel, or a ScaleKernel of one, as the model's kernel, got {kernel}.")
    return inner


def _prediction_strategy(model: ExactGP) -> NTKPredictionStrategy:
    if model.training:
        raise RuntimeError("The model is in train mode. Call model.eval() (and likelihood.eval()) first.")
    if model.prediction_strategy is None:
        first = [inputs[..., :1, :] for inputs in model.train_inputs]
        with torch.no_grad(), gpytorch_settings.skip_posterior_variances(), gpytorch_settings.debug(False):
            model(*first)
    strategy = model.prediction_strategy
    if not isinstance(strategy, NTKPredictionStrategy):
        raise TypeError(f"The model predicts by a {type(strategy).__name__}; an NTKPredictionStrategy was expected.")
    _check_is_plain(model, strategy)
    return strategy


def _check_is_plain(model: ExactGP, strategy: NTKPredictionStrategy) -> None:
    """Functions of weights stand for the model only where it has no batches and its prior is mean and kernel of x."""
    system, x = strategy.solver.system, strategy.train_inputs[0]
    if system.batch > 1 or strategy.residual.dim() > 1:
        raise ValueError(
            f"Expected a model without batches, got one with inputs of shape {tuple(x.shape)} and targets of shape "
            f"{tuple(strategy.train_labels.shape)}."
        )
    dims = model.covar_module.active_dims
    seen = x if dims is None else x.index_select(-1, dims)
    mean = model.mean_module(x).reshape(-1)
    if not torch.equal(system.x, seen.double().reshape(system.x.shape)) or not torch.allclose(
        mean, strategy.train_prior_dist.loc.reshape(-1)
    ):
        raise ValueError(
            "The model's forward does more than apply mean_module and covar_module to its inputs. Put what it does "
            "into the network, and linearise that."
        )


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=source).to(device)
