"""What a model's data say of its weights: the posterior that adapted networks and drawn functions are made of.

Weights are w − w₀ and those of known features beside J, P numbers in all; of a batch of outputs, each has its own. O is
the number of outputs in such a batch, or 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.models import ApproximateGP, ExactGP
from torch import Tensor

from .bridge.feature_sums import Summand, parts_of_features, summands
from .bridge.prediction_strategies import NTKPredictionStrategy
from .classification import LaplaceGP
from .jacobian.columns import Column, Values
from .jacobian.linearization import Linearization
from .kernels import GainKernel, NTKKernel
from .network import FrozenNetwork
from .solvers import System
from .variational import VariationalWeights

_NOT_PLAIN = (
    "The model's forward does more than apply mean_module and covar_module to its inputs. Put what it does into the "
    "network, and linearise that."
)


Normals = Callable[..., Tensor]


class WeightPosterior(ABC):
    """The distribution of a model's weights given its data.

    :param linearization: Of the kernel's features.
    :param x: The training inputs, or inducing points, (O, n, d), in float64; of a batch of outputs with the number of
        each as one more column.
    :param tangent: The neural tangent kernel in the model's.
    :param dtype: The one that the model predicts in.
    """

    def __init__(self, linearization: Linearization, x: Tensor, tangent: Summand, dtype: torch.dtype):
        self.linearization = linearization
        self.x = x
        self.tangent = tangent
        self.dtype = dtype

    @abstractmethod
    def prior(self, number: int, normals: Normals) -> Tensor:
        """Draws from the prior, (O, number, P), float64.

        :param normals: Gives standard normals of a shape.
        """

    @abstractmethod
    def mean(self) -> Tensor:
        """ŵ, (O, P), float64."""

    @abstractmethod
    def draws(self, number: int, normals: Normals) -> Tensor:
        """Draws, (O, number, P), float64.

        :param normals: Gives standard normals of a shape.
        """

    def columns(self) -> tuple[Column, ...]:
        """What stands beside J in the model's features, for modules that have f(x) from the pass for J(x) w."""
        served: list[Column] = []
        for column in self.linearization.columns:
            if isinstance(column, Values) and column.network is not None:
                networks = (column.network, self.tangent.kernel._linearization.network)
                own, others = (network.values(self.x, network.fingerprint()) for network in networks)
                if not torch.allclose(own, others, rtol=1e-9):
                    raise ValueError(
                        "The GainKernel's network gives other values than the NTKKernel's at the training inputs, "
                        "though their tensors are the same: make both from one network."
                    )
                column = Values(column.width)
            served.append(column)
        return tuple(served)

    def inputs(self) -> Tensor:
        """The training inputs as the network sees them, (1, n, d), or (O, n, d); in float64."""
        x = self.x
        return x[..., :-1] if self.tangent.kernel.is_by_output else x

    def two_points(self) -> Tensor:
        """Two of them, (2, d), in the precision that the model predicts in."""
        x = self.inputs()
        return x.reshape(-1, x.shape[-1])[:2].to(self.dtype)


class _OfSystem(WeightPosterior):
    """Of models whose kernel matrix at the training inputs is a system.

    :param system: It.
    """

    def __init__(self, system: System, tangent: Summand, dtype: torch.dtype):
        super().__init__(system.linearization, system.x, tangent, dtype)
        self.system = system

    def prior(self, number: int, normals: Normals) -> Tensor:
        system = self.system
        return normals(len(system.x), number, system.num_parameters) * system.root_variances.unsqueeze(1)


class ExactPosterior(_OfSystem):
    """Of regression.

    :param strategy: What an ExactGP predicts by.
    :param tangent: The neural tangent kernel in the model's.
    """

    def __init__(self, strategy: NTKPredictionStrategy, tangent: Summand):
        super().__init__(_linear_model(strategy), tangent, strategy.train_labels.dtype)
        self.strategy = strategy

    def mean(self) -> Tensor:
        if self.strategy._missing.any():
            return self.strategy.weights_for(self._residual()).squeeze(1)
        return self.strategy.mean_weights.reshape(len(self.system.x), -1)

    def draws(self, number: int, normals: Normals) -> Tensor:
        system, outputs = self.system, len(self.system.x)
        weights = self.prior(number, normals)
        noise = normals(outputs, number, system.num_rows) * system.noise.sqrt().unsqueeze(1)
        return weights + self.strategy.weights_for(self._residual() - system.jacobian.jvp(weights) - noise)

    def _residual(self) -> Tensor:
        return self.strategy.residual.reshape(len(self.system.x), 1, -1)


class LaplacePosterior(_OfSystem):
    """Of classification, by Laplace's approximation.

    :param model: The classifier.
    :param system: What its kernel matrix is made of.
    :param tangent: The neural tangent kernel in the model's.
    """

    def __init__(self, model: LaplaceGP, system: System, tangent: Summand):
        x = model.train_inputs[0]
        super().__init__(system, tangent, x.dtype if x.is_floating_point() else tangent.kernel.dtype)
        self.posterior = model.latent_posterior()

    def mean(self) -> Tensor:
        return self.posterior.weights.unsqueeze(0)

    def draws(self, number: int, normals: Normals) -> Tensor:
        curvature = self.posterior.approximation.curvature
        return self.mean().unsqueeze(1) + curvature.draw_weights(normals(number, curvature.num_normals))


class VariationalPosterior(WeightPosterior):
    """Of variational models.

    :param model: The model.
    :param tangent: The neural tangent kernel in the model's.
    """

    def __init__(self, model: ApproximateGP, tangent: Summand):
        self.weights = VariationalWeights(model)
        if not self.weights.is_plain(model):
            raise ValueError(_NOT_PLAIN)
        super().__init__(self.weights.linearization, self.weights.x, tangent, self.weights.dtype)

    def prior(self, number: int, normals: Normals) -> Tensor:
        return self.weights.prior(normals(number, self.weights.num_parameters)).unsqueeze(0)

    def mean(self) -> Tensor:
        return self.weights.mean().unsqueeze(0)

    def draws(self, number: int, normals: Normals) -> Tensor:
        weights = normals(number, self.weights.num_parameters)
        return self.weights.draw(weights, normals(number, 2 * self.x.shape[-2])).unsqueeze(0)


def ntk_summand(model: Any) -> Summand:
    """The NTKKernel that a model's kernel is, or that has nothing but known features beside it in a sum.

    :raises TypeError: If the model, or its kernel, is of another kind.
    :raises ValueError: If what stands beside it is of another network.
    """
    has_parts = all(hasattr(model, name) for name in ("covar_module", "mean_module"))
    if not isinstance(model, (ExactGP, LaplaceGP, ApproximateGP)) or not has_parts:
        raise TypeError(
            "Expected a gpytorch.models.ExactGP, an ApproximateGP, or an ntk_gp.LaplaceGP, with a mean_module and a "
            f"covar_module, got {type(model).__name__}. A network becomes one with training data: its mean_module is "
            "NetworkMean(network), its covar_module ScaleKernel(NTKKernel(network)); pass that model, in eval mode."
        )
    kernel = model.covar_module
    parts = summands(kernel)
    of_sum = parts_of_features(kernel) if len(parts) > 1 else (parts[0], [])
    if of_sum is None or not isinstance(of_sum[0].kernel, NTKKernel):
        raise TypeError(
            "Expected an NTKKernel, or a ScaleKernel of one, as the model's kernel, or its sum with a GainKernel, "
            f"ConstantKernel or LinearKernel that sees the same columns of the inputs; got {kernel}."
        )
    tangent, others = of_sum
    gains = (part.kernel for part in others if isinstance(part.kernel, GainKernel))
    if not all(same_network(tangent.kernel.network, gain.network) for gain in gains):
        raise ValueError(
            "Expected an NTKKernel and a GainKernel of the same network, with the same output; they differ."
        )
    return tangent


def dims_seen(model: ExactGP | LaplaceGP | ApproximateGP, tangent: Summand) -> Tensor | None:
    """The columns of the model's inputs that the network sees; None for all."""
    own, inner = model.covar_module.active_dims, tangent.active_dims
    if own is None or inner is None:
        return inner if own is None else own
    return own[inner]


def weight_posterior(model: ExactGP | LaplaceGP | ApproximateGP, tangent: Summand) -> WeightPosterior:
    """That of a model.

    :raises RuntimeError: In train mode.
    :raises TypeError: If the model predicts by another strategy than this package's.
    :raises ValueError: If the posterior is not one over weights, or the model does more than apply mean and kernel.
    """
    if model.training:
        raise RuntimeError("The model is in train mode. Call model.eval() (and likelihood.eval()) first.")
    if isinstance(model, ApproximateGP):
        return VariationalPosterior(model, tangent)
    return _of_exact(model, tangent) if isinstance(model, ExactGP) else _of_laplace(model, tangent)


def _of_exact(model: ExactGP, tangent: Summand) -> ExactPosterior:
    if model.prediction_strategy is None:
        first = [inputs[..., :1, :] for inputs in model.train_inputs]
        with torch.no_grad(), gpytorch_settings.skip_posterior_variances(), gpytorch_settings.debug(False):
            model(*first)
    strategy = model.prediction_strategy
    if not isinstance(strategy, NTKPredictionStrategy):
        raise TypeError(f"The model predicts by a {type(strategy).__name__}; an NTKPredictionStrategy was expected.")
    posterior = ExactPosterior(strategy, tangent)
    _check_is_plain(model, posterior)
    return posterior


def _of_laplace(model: LaplaceGP, tangent: Summand) -> LaplacePosterior:
    prior, dims = model.latent_posterior().approximation.prior, dims_seen(model, tangent)
    if prior.system is None:
        raise ValueError(
            "The model's posterior is not one over weights: the sum's features do not fit in "
            "ntk_gp.settings.memory_budget. Call model(x) instead."
        )
    x = model.train_inputs[0]
    seen = x if dims is None else x.index_select(-1, dims)
    is_plain = torch.equal(prior.system.x[0], seen.double())
    if not is_plain or not torch.allclose(model.mean_module(x).double().reshape(-1), prior.mean.reshape(-1)):
        raise ValueError(_NOT_PLAIN)
    return LaplacePosterior(model, prior.system, tangent)


def _check_is_plain(model: ExactGP, posterior: ExactPosterior) -> None:
    """Functions of weights stand for the model only where it has no batches but those of the outputs, and its prior is
    mean and kernel of x."""
    strategy, tangent = posterior.strategy, posterior.tangent
    x, outputs = strategy.train_inputs[0], _outputs_in_batch(tangent)
    shape = (outputs,) if tangent.kernel.is_by_output else ()
    if posterior.system.batch != outputs or strategy.residual.shape[:-1] != shape:
        raise ValueError(
            "Expected a model without batches, or with output='batch' and no others, got one with inputs of shape "
            f"{tuple(x.shape)} and targets of shape {tuple(strategy.train_labels.shape)}."
        )
    dims = dims_seen(model, tangent)
    seen = x if dims is None else x.index_select(-1, dims)
    mean = model.mean_module(x).reshape(-1)
    inputs = posterior.inputs()
    same = seen.shape[-2:] == inputs.shape[-2:] and torch.equal(inputs, seen.double().expand(inputs.shape))
    if not same or not torch.allclose(mean, strategy.train_prior_dist.loc.reshape(-1)):
        raise ValueError(_NOT_PLAIN)


def _linear_model(strategy: NTKPredictionStrategy) -> System:
    """K + D of the model's training data."""
    system = strategy.linear_model
    if system is None:
        raise ValueError(
            "The model's posterior is not one over weights: noise is not positive, outputs are put together from a "
            "batch, or the sum's features, or a model with missing targets, do not fit in "
            "ntk_gp.settings.memory_budget. Call model(x) instead."
        )
    return system


def _outputs_in_batch(tangent: Summand) -> int | None:
    """C of a batch of all outputs, in their order; 1 for a kernel without batches of outputs, None for other batches of
    them."""
    if not tangent.kernel.is_by_output:
        return 1
    numbers = tangent.kernel.outputs_of_batches
    return len(numbers) if numbers.dim() == 1 and torch.equal(numbers, torch.arange(len(numbers)).to(numbers)) else None


def same_network(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    """Whether two are of the same function."""
    ours, theirs = one.specification, other.specification
    if (ours.outputs, ours.steps, ours.inputs) != (theirs.outputs, theirs.steps, theirs.inputs):
        return False
    tensors, others = dict(one.named_buffers()), dict(other.named_buffers())
    return tensors.keys() == others.keys() and all(_is_equal(tensor, others[name]) for name, tensor in tensors.items())


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    dense = [tensor if tensor.layout == torch.strided else tensor.to_dense() for tensor in (one, other)]
    return torch.equal(*dense)
