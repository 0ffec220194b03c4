"""Functions drawn from the posterior, and the adapted network: each is a vector of weights.

A draw from the posterior over functions is the network's linearisation at a draw from the posterior over weights
(pathwise conditioning: Wilson, Borovitskiy, Terenin, Mostowsky and Deisenroth, "Efficiently sampling functions from
Gaussian process posteriors", ICML 2020; exact here, since the prior has finitely many weights).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.kernels import Kernel
from gpytorch.models import ApproximateGP, ExactGP
from torch import Tensor, nn

from ._compat import children_in
from .bridge.feature_sums import Summand, parts_of_features, summands
from .bridge.prediction_strategies import NTKPredictionStrategy
from .jacobian.columns import Column, Values, sizes_of
from .jacobian.columns import products as products_of_columns
from .kernels import GainKernel, NTKKernel
from .linearized import LinearizedModule, owned
from .means import NetworkMean
from .network import FrozenNetwork, ParameterSelection
from .operators import NTKAddedDiagLinearOperator
from .solvers.system import System
from .variational import VariationalWeights


class LinearizedFunctions(LinearizedModule):
    r"""Functions :math:`m(x) + J(x) w_s` for k weight vectors :math:`w_s`, evaluated anywhere by one Jacobian-vector
    product each, and differentiable in x.

    It owns its tensors: neither the model that it was drawn from nor this module sees a change made to the other. It
    can be saved, copied, compiled and exported, as far as its prior mean and transforms can.

    :param network: The frozen network whose Jacobian it is.
    :param weights: (k, P), float64.
    :param mean_module: The prior mean m; None for the network itself.
    :param active_dims: The columns of the inputs that the network sees.
    :param input_transform: Applied to x first, as BoTorch's models do.
    :param outcome_transform: Undone on the functions' values, as BoTorch's models do.
    :param columns: Known features Ψ beside J, functions of x and f(x).
    :param column_weights: The weights of these, (k, q), float64: Ψ(x) v is added.
    """

    weights: Tensor
    column_weights: Tensor | None
    active_dims: Tensor | None

    def __init__(
        self,
        network: FrozenNetwork,
        weights: Tensor,
        mean_module: nn.Module | None,
        active_dims: Tensor | None = None,
        input_transform: nn.Module | None = None,
        outcome_transform: Any = None,
        columns: Sequence[Column] = (),
        column_weights: Tensor | None = None,
    ):
        super().__init__(network)
        self._columns = tuple(columns)
        # Where the mean is the network, the pass that gives J(x) w gives it as well.
        is_network = mean_module is None or _is_mean_of(network, active_dims, mean_module)
        self.mean_module = None if is_network else _own_copy(mean_module)
        self.register_buffer("weights", weights.detach().clone())
        self.register_buffer("column_weights", None if column_weights is None else column_weights.detach().clone())
        self.register_buffer("active_dims", None if active_dims is None else active_dims.clone())
        self.input_transform = _own_copy(input_transform)
        self.outcome_transform = _own_copy(outcome_transform)

    def forward(self, x: Tensor) -> Tensor:
        """(*batch, n, d) to (k, *batch, n), or (k, *batch, n, C) for all of a network's outputs."""
        x = self.network.flattened(x)
        x = x if self.input_transform is None else self.input_transform(x)
        columns = x if self.active_dims is None else x.index_select(-1, self.active_dims)
        points = columns.reshape(-1, columns.shape[-1])
        values, products = self.values_and_products(points, self.weights)
        if self.column_weights is not None:
            products = products + products_of_columns(self._columns, points, values, self.column_weights.to(points))
        if self.mean_module is None:
            values = self.shaped(values + products, columns)
        else:
            values = self.mean_module(x) + self.shaped(products, columns)
        if self.outcome_transform is None:
            return values
        if values.dim() - 1 < x.dim():
            return self.outcome_transform.untransform(values.unsqueeze(-1))[0].squeeze(-1)
        return self.outcome_transform.untransform(values)[0]


class LinearizedNetwork(LinearizedModule):
    r"""The adapted network :math:`f(x) + J(x) \hat w`, for serving without GPyTorch.

    Maps (*batch, n, d) to (*batch, n), or (*batch, n, C) for all of a network's outputs, in the dtype and on the
    device of x; inputs in the shape `input_shape` need not be flattened. It owns its tensors. Its `state_dict` holds
    the network's weights and ŵ, and goes into any other one that was made of a network of this form:

        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> served = LinearizedNetwork(network)
        >>> _ = served.load_state_dict(LinearizedNetwork(network, torch.randn(65)).state_dict())

    :param network: The network, or a frozen one (a kernel's `network`, with its options); copied.
    :param displacement: ŵ, (P,), for the parameters in the order of `LinearizedNetwork.network.parameter_names`, each
        flattened. (Default: zeros, to be loaded.)
    :param parameters: The parameters that it is linearised in, as for :class:`~ntk_gp.NTKKernel`.
    :param input_shape: The shape of one input as the network wants it.
    :param output: Index of the output to take, or `"all"`.
    :param columns: Known features Ψ beside J, functions of x and f(x), such as those of a
        :class:`~ntk_gp.GainKernel`.
    :param column_weights: The weights of these, (q,): Ψ(x) v̂ is added. (Default: zeros, to be loaded.)
    :raises ValueError: If ŵ has another number of elements than these parameters have.
    """

    displacement: Tensor
    column_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        displacement: Tensor | None = None,
        *,
        parameters: ParameterSelection = None,
        input_shape: tuple[int, ...] | None = None,
        output: int | str | None = None,
        columns: Sequence[Column] = (),
        column_weights: Tensor | None = None,
    ):
        if not isinstance(network, FrozenNetwork):
            network = FrozenNetwork(network, parameters=parameters, input_shape=input_shape, output=output)
        elif any(option is not None for option in (parameters, input_shape, output)):
            raise TypeError("A FrozenNetwork brings parameters, input_shape and output with it: leave them out.")
        super().__init__(network)
        own = [self.network.get_buffer(f"tensors.{name}") for name in self.network.parameter_names]
        size = sum(tensor.numel() for tensor in own)
        if displacement is None:
            displacement = torch.zeros(size, dtype=self.network.dtype, device=self.network.device)
        if displacement.shape != (size,):
            raise ValueError(
                f"Expected a displacement of shape ({size},), one number for each element of the selected parameters, "
                f"got {tuple(displacement.shape)}."
            )
        self.register_buffer("displacement", displacement.detach().clone())
        self._columns = tuple(columns)
        self.register_buffer("column_weights", self._own_column_weights(column_weights))

    def _own_column_weights(self, given: Tensor | None) -> Tensor | None:
        size = sum(sizes_of(self._columns))
        if given is None:
            return self.displacement.new_zeros(size) if size else None
        if given.shape != (size,):
            raise ValueError(
                f"Expected column_weights of shape ({size},), one number for each of the known features, got "
                f"{tuple(given.shape)}."
            )
        return given.detach().clone() if size else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.network.flattened(x)
        points = x.reshape(-1, x.shape[-1])
        values, products = self.values_and_products(points, self.displacement.unsqueeze(0))
        if self.column_weights is not None:
            weights = self.column_weights.to(points).unsqueeze(0)
            products = products + products_of_columns(self._columns, points, values, weights)
        return self.shaped(values + products[0], x)


def draw_functions(
    model: ExactGP | ApproximateGP,
    num_functions: int,
    *,
    prior: bool = False,
    generator: torch.Generator | None = None,
) -> LinearizedFunctions:
    r"""Draws functions from a model's posterior, or from its prior, exactly.

    With :math:`w \sim N(0, \Sigma)` and :math:`\varepsilon \sim N(0, D)`, the weights
    :math:`w + \Sigma J^\top (K + D)^{-1} (y - m - J w - \varepsilon)` are a draw from their posterior. Costs one
    solve with `num_functions` columns; memory of num_functions·P. Of a variational model the draws are those of its
    predictive distribution (:mod:`ntk_gp.variational`).

    :param model: An :class:`~gpytorch.models.ExactGP`, or an :class:`~gpytorch.models.ApproximateGP` with a
        VariationalStrategy or UnwhitenedVariationalStrategy, in eval mode whose kernel is an
        :class:`~ntk_gp.NTKKernel`, scaled or not, without batches; or its sum with a
        :class:`~ntk_gp.GainKernel` of the same network and GPyTorch's ConstantKernel and LinearKernel.
    :param num_functions: How many, k.
    :param prior: Draw from the prior instead.
    :param generator: The source of randomness. (Default: torch's own, on the CPU.)
    :return: A module that maps (*batch, n, d) to (k, *batch, n).
    :raises TypeError: If the kernel is of another kind.
    :raises ValueError: If the model has batches, or its `forward` does more than apply mean and kernel to its inputs.
    """
    _check_is_model(model)
    tangent = _ntk_summand(model.covar_module)
    draw = _draw_variational if isinstance(model, ApproximateGP) else _draw_exact
    weights, points, columns = draw(model, tangent, num_functions, prior, generator)
    size = weights.shape[-1] - sum(sizes_of(columns))
    functions = LinearizedFunctions(
        tangent.kernel.network,
        weights[:, :size],
        model.mean_module,
        _dims(model, tangent),
        getattr(model, "input_transform", None),
        getattr(model, "outcome_transform", None),
        columns,
        weights[:, size:] if columns else None,
    )
    functions.try_at(points)
    return functions


def _draw_exact(
    model: ExactGP, tangent: Summand, num_functions: int, prior: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, tuple[Column, ...]]:
    """Weights (k, P + q), two inputs, and the known features."""
    strategy = _prediction_strategy(model, tangent)
    system = strategy.solver.system
    device = system.x.device
    weights = _normal((num_functions, system.num_parameters), generator, device) * system.root_variances
    if not prior:
        noise = _normal((num_functions, system.num_rows), generator, device) * system.noise.sqrt()
        residual = strategy.residual.reshape(1, -1) - system.jacobian.jvp(weights.unsqueeze(0))[0] - noise
        weights = weights + strategy.solver.mean_weights(residual.unsqueeze(0))[0]
    return weights, _two_points(strategy), _columns(tangent, system)


def _draw_variational(
    model: ApproximateGP, tangent: Summand, num_functions: int, prior: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, tuple[Column, ...]]:
    """The same."""
    posterior = _variational_weights(model)
    device = posterior.x.device
    weights = _normal((num_functions, posterior.num_parameters), generator, device)
    if prior:
        weights = posterior.prior(weights)
    else:
        normal = _normal((num_functions, 2 * posterior.x.shape[-2]), generator, device)
        weights = posterior.draw(weights, normal)
    return weights, posterior.x[0, :2].to(posterior.dtype), _columns(tangent, posterior)


def _variational_weights(model: ApproximateGP) -> VariationalWeights:
    posterior = VariationalWeights(model)
    posterior.check_is_plain(model)
    return posterior


def adapted_network(model: ExactGP | ApproximateGP) -> LinearizedNetwork:
    """The posterior mean of a model as a network of its own, f(x) + J(x) ŵ.

    :param model: An :class:`~gpytorch.models.ExactGP`, or an :class:`~gpytorch.models.ApproximateGP` with a
        VariationalStrategy or UnwhitenedVariationalStrategy, in eval mode with a :class:`~ntk_gp.means.NetworkMean` and
        an :class:`~ntk_gp.NTKKernel` (scaled or not) of the same network, without batches; or with its sum with a
        :class:`~ntk_gp.GainKernel` of that network and GPyTorch's ConstantKernel and LinearKernel, whose
        features are functions of x and f(x) and cost no pass of their own.
    :raises TypeError: If mean or kernel are of another kind.
    :raises ValueError: If they are of different networks, or the model does more than apply them to its inputs.
    """
    _check_is_model(model)
    tangent, mean = _ntk_summand(model.covar_module), model.mean_module
    if not isinstance(mean, NetworkMean):
        raise TypeError(f"Expected a NetworkMean as the model's mean, got {type(mean).__name__}.")
    if not _same_network(tangent.kernel.network, mean.network):
        raise ValueError(
            "Expected mean and kernel of the same network, with the same output and input_shape; they differ. Make "
            "both from one network, or call model(x) instead."
        )
    if _dims(model, tangent) is not None or mean.active_dims is not None:
        raise ValueError("A kernel or mean with active_dims sees only some inputs: call model(x) instead.")
    if any(getattr(model, name, None) is not None for name in ("input_transform", "outcome_transform")):
        raise ValueError("A model that transforms inputs or outcomes is more than a network: call model.posterior(x).")
    if isinstance(model, ApproximateGP):
        posterior = _variational_weights(model)
        points, columns = posterior.x[0, :2].to(posterior.dtype), _columns(tangent, posterior)
        weights = posterior.mean().to(points.dtype)
    else:
        strategy = _prediction_strategy(model, tangent)
        points, columns = _two_points(strategy), _columns(tangent, strategy.solver.system)
        weights = strategy.mean_weights.to(points.dtype)
    size = len(weights) - sum(sizes_of(columns))
    own = weights[size:] if columns else None
    adapted = LinearizedNetwork(tangent.kernel.network, weights[:size], columns=columns, column_weights=own)
    adapted.try_at(points)
    return adapted


def _own_copy(module: Any) -> Any:
    """A copy that shares no tensor, which those of frozen networks would."""
    new = copy.deepcopy(module)
    if isinstance(new, nn.Module):
        for part in list(new.modules()):
            for name, child in children_in(part).items():
                if isinstance(child, FrozenNetwork):
                    children_in(part)[name] = owned(child)
    return new


def _is_mean_of(network: FrozenNetwork, active_dims: Tensor | None, mean: nn.Module) -> bool:
    """Whether the mean is this network, of the same columns."""
    if not isinstance(mean, NetworkMean) or not _same_network(network, mean.network):
        return False
    if active_dims is None or mean.active_dims is None:
        return active_dims is mean.active_dims
    return torch.equal(active_dims, mean.active_dims)


def _check_is_model(model: Any) -> None:
    is_model = isinstance(model, ExactGP | ApproximateGP)
    if not is_model or not all(hasattr(model, name) for name in ("covar_module", "mean_module")):
        raise TypeError(
            "Expected a gpytorch.models.ExactGP or ApproximateGP with a mean_module and a covar_module, got "
            f"{type(model).__name__}. A "
            "network becomes one with training data: its mean_module is NetworkMean(network), its covar_module "
            "ScaleKernel(NTKKernel(network)); pass that model, in eval mode."
        )


def _same_network(one: FrozenNetwork, other: FrozenNetwork) -> bool:
    if (one.output, one.input_shape) != (other.output, other.input_shape):
        return False
    tensors, others = dict(one.named_buffers()), dict(other.named_buffers())
    return tensors.keys() == others.keys() and all(_is_equal(tensor, others[name]) for name, tensor in tensors.items())


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    dense = [tensor if tensor.layout == torch.strided else tensor.to_dense() for tensor in (one, other)]
    return torch.equal(*dense)


def _ntk_summand(kernel: Kernel) -> Summand:
    """The NTKKernel that a model's kernel is, or that has nothing but known features beside it in a sum."""
    parts = summands(kernel)
    of_sum = parts_of_features(kernel) if len(parts) > 1 else (parts[0], [])
    if of_sum is None or not isinstance(of_sum[0].kernel, NTKKernel):
        raise TypeError(
            "Expected an NTKKernel, or a ScaleKernel of one, as the model's kernel, or its sum with a GainKernel, "
            f"ConstantKernel or LinearKernel that sees the same columns of the inputs; got {kernel}."
        )
    tangent, others = of_sum
    gains = (part.kernel for part in others if isinstance(part.kernel, GainKernel))
    if not all(_same_network(tangent.kernel.network, gain.network) for gain in gains):
        raise ValueError(
            "Expected an NTKKernel and a GainKernel of the same network, with the same output; they differ."
        )
    return tangent


def _dims(model: ExactGP | ApproximateGP, tangent: Summand) -> Tensor | None:
    """The columns of the model's inputs that the network sees; None for all."""
    own, inner = model.covar_module.active_dims, tangent.active_dims
    if own is None or inner is None:
        return inner if own is None else own
    return own[inner]


def _columns(tangent: Summand, system: System | VariationalWeights) -> tuple[Column, ...]:
    """What stands beside J in the model's features, for modules that have f(x) from the pass for J(x) w."""
    served: list[Column] = []
    for column in system.linearization.columns:
        if isinstance(column, Values) and column.network is not None:
            own, others = (network(system.x) for network in (column.network, tangent.kernel.network))
            if not torch.allclose(own, others, rtol=1e-9):
                raise ValueError(
                    "The GainKernel's network gives other values than the NTKKernel's at the training inputs, though "
                    "their tensors are the same: make both from one network."
                )
            column = Values(column.width)
        served.append(column)
    return tuple(served)


def _prediction_strategy(model: ExactGP, tangent: Summand) -> NTKPredictionStrategy:
    if model.training:
        raise RuntimeError("The model is in train mode. Call model.eval() (and likelihood.eval()) first.")
    if model.prediction_strategy is None:
        first = [inputs[..., :1, :] for inputs in model.train_inputs]
        with torch.no_grad(), gpytorch_settings.skip_posterior_variances(), gpytorch_settings.debug(False):
            model(*first)
    strategy = model.prediction_strategy
    if not isinstance(strategy, NTKPredictionStrategy):
        raise TypeError(f"The model predicts by a {type(strategy).__name__}; an NTKPredictionStrategy was expected.")
    _check_is_plain(model, strategy, _dims(model, tangent))
    return strategy


def _two_points(strategy: NTKPredictionStrategy) -> Tensor:
    """Two training inputs, as the network sees them, in the precision that the model predicts in."""
    x = strategy.solver.system.x
    return x.reshape(-1, x.shape[-1])[:2].to(strategy.train_inputs[0].dtype)


def _check_is_plain(model: ExactGP, strategy: NTKPredictionStrategy, dims: Tensor | None) -> None:
    """Functions of weights stand for the model only where it has no batches and its prior is mean and kernel of x."""
    if not isinstance(strategy._train_matrix, NTKAddedDiagLinearOperator):
        raise ValueError(
            "The model's posterior is not one over weights: targets are missing, noise is not positive, or the sum's "
            "features do not fit in ntk_gp.settings.memory_budget. Call model(x) instead."
        )
    system, x = strategy.solver.system, strategy.train_inputs[0]
    if system.batch > 1 or strategy.residual.dim() > 1:
        raise ValueError(
            f"Expected a model without batches, got one with inputs of shape {tuple(x.shape)} and targets of shape "
            f"{tuple(strategy.train_labels.shape)}."
        )
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
