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
from gpytorch.models import ApproximateGP, ExactGP
from torch import Tensor, nn

from ._compat import children_in
from .classification import LaplaceGP
from .distributed.replicated import same_on_all_ranks
from .jacobian.columns import Column, sizes_of
from .jacobian.columns import products as products_of_columns
from .linearized import LinearizedModule, owned
from .means import NetworkMean
from .network import FrozenNetwork, InputDtype, InputShape, Output, ParameterSelection, count_outputs
from .weight_posteriors import dims_seen, ntk_summand, same_network, weight_posterior


class LinearizedFunctions(LinearizedModule):
    r"""Functions :math:`m(x) + J(x) w_s` for k weight vectors :math:`w_s`, evaluated anywhere by one Jacobian-vector
    product each, and differentiable in x.

    It owns its tensors: neither the model that it was drawn from nor this module sees a change made to the other. It
    can be saved, copied, compiled and exported, as far as its prior mean and transforms can.

    :param network: The frozen network whose Jacobian it is.
    :param weights: (k, P), float64; or (k, C, P) for a batch of outputs, each with its own.
    :param mean_module: The prior mean m; None for the network itself.
    :param active_dims: The columns of the inputs that the network sees.
    :param input_transform: Applied to x first, as BoTorch's models do.
    :param outcome_transform: Undone on the functions' values, as BoTorch's models do.
    :param columns: Known features Ψ beside J, functions of x and f(x).
    :param column_weights: The weights of these, (k, q) or (k, C, q), float64: Ψ(x) v is added.
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
        """(*batch, n, d) to (k, *batch, n); (k, *batch, n, C) for several of a network's outputs together, and
        (k, *batch, C, n) for a batch of them."""
        x = self.network.flattened(x)
        x = x if self.input_transform is None else self.input_transform(x)
        columns = x if self.active_dims is None else x.index_select(-1, self.active_dims)
        points = columns.reshape(-1, columns.shape[-1])
        values, products = self.values_and_functions(points, self.weights)
        if self.column_weights is not None:
            products = products + products_of_columns(self._columns, points, values, self.column_weights.to(points))
        if self.mean_module is None:
            values = self.shaped(values + products, columns)
        else:
            values = self.mean_module(x) + self.shaped(products, columns)
        if self.outcome_transform is None:
            return values
        if self.network.outputs.is_batch:
            return self.outcome_transform.untransform(values.mT)[0].mT
        if values.dim() - 1 < x.dim():
            return self.outcome_transform.untransform(values.unsqueeze(-1))[0].squeeze(-1)
        return self.outcome_transform.untransform(values)[0]


class LinearizedNetwork(LinearizedModule):
    r"""The adapted network :math:`f(x) + J(x) \hat w`, for serving without GPyTorch.

    Maps (*batch, n, d) to (*batch, n); or (*batch, n, C) for several of a network's outputs together, and
    (*batch, C, n) for a batch of them; in the dtype and on the device of x. Inputs in the shape `input_shape` need not
    be flattened. It owns its tensors. Its `state_dict` holds the network's weights and ŵ, and goes into any other one
    that was made of a network of this form:

        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> served = LinearizedNetwork(network)
        >>> _ = served.load_state_dict(LinearizedNetwork(network, torch.randn(65)).state_dict())

    :param network: The network, or a frozen one (a kernel's `network`, with its options); copied.
    :param displacement: ŵ, (P,), for the parameters in the order of `LinearizedNetwork.network.parameter_names`, each
        flattened; (C, P) for a batch of outputs, each with its own. (Default: zeros, to be loaded.)
    :param parameters: The parameters that it is linearised in, as for :class:`~ntk_gp.NTKKernel`.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: Index of the output to take, a list of some, `"all"`, or `"batch"`, likewise.
    :param columns: Known features Ψ beside J, functions of x and f(x), such as those of a
        :class:`~ntk_gp.GainKernel`.
    :param column_weights: The weights of these, (q,) or (C, q): Ψ(x) v̂ is added. (Default: zeros, to be loaded.)
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
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        columns: Sequence[Column] = (),
        column_weights: Tensor | None = None,
    ):
        if not isinstance(network, FrozenNetwork):
            options: dict[str, Any] = {"input_shape": input_shape, "input_dtype": input_dtype, "output": output}
            network = FrozenNetwork(network, parameters=parameters, **options)
        elif any(option is not None for option in (parameters, input_shape, input_dtype, output)):
            raise TypeError("A FrozenNetwork brings parameters, its inputs and output with it: leave them out.")
        super().__init__(network)
        self.network.fix_parameters()
        own = [self.network.get_buffer(f"tensors.{name}") for name in self.network.parameter_names]
        size = sum(tensor.numel() for tensor in own)
        lead = self._lead(displacement)
        if displacement is None:
            displacement = torch.zeros(*lead, size, dtype=self.network.dtype, device=self.network.device)
        if displacement.shape != (*lead, size):
            raise ValueError(
                f"Expected a displacement of shape {(*lead, size)}, one number for each element of the selected "
                f"parameters, got {tuple(displacement.shape)}."
            )
        self.register_buffer("displacement", displacement.detach().clone())
        self._columns = tuple(columns)
        self.register_buffer("column_weights", self._own_column_weights(column_weights))

    def _lead(self, displacement: Tensor | None) -> tuple[int, ...]:
        """() or (C,), the shape of weight vectors but for their length."""
        if not self.network.outputs.is_batch:
            return ()
        outputs = count_outputs(self.network)
        if outputs is None and (displacement is None or displacement.dim() != 2):
            raise ValueError(
                "How many outputs the network has is not known before it is given inputs: give displacement (C, P)."
            )
        return (len(displacement),) if outputs is None and displacement is not None else (outputs or 1,)

    def _own_column_weights(self, given: Tensor | None) -> Tensor | None:
        size = sum(sizes_of(self._columns))
        shape = (*self.displacement.shape[:-1], size)
        if given is None:
            return self.displacement.new_zeros(shape) if size else None
        if given.shape != shape:
            raise ValueError(
                f"Expected column_weights of shape {shape}, one number for each of the known features, got "
                f"{tuple(given.shape)}."
            )
        return given.detach().clone() if size else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.network.flattened(x)
        points = x.reshape(-1, x.shape[-1])
        values, products = self.values_and_functions(points, self.displacement.unsqueeze(0))
        if self.column_weights is not None:
            weights = self.column_weights.to(points).unsqueeze(0)
            products = products + products_of_columns(self._columns, points, values, weights)
        return self.shaped(values + products[0], x)


def draw_functions(
    model: ExactGP | LaplaceGP | ApproximateGP,
    num_functions: int,
    *,
    prior: bool = False,
    generator: torch.Generator | None = None,
) -> LinearizedFunctions:
    r"""Draws functions from a model's posterior, or from its prior, exactly.

    With :math:`w \sim N(0, \Sigma)` and :math:`\varepsilon \sim N(0, D)`, the weights
    :math:`w + \Sigma J^\top (K + D)^{-1} (y - m - J w - \varepsilon)` are a draw from their posterior. Costs one
    solve with `num_functions` columns; memory of num_functions·P. Of a variational model the draws are those of its
    predictive distribution.

    :param model: An :class:`~gpytorch.models.ExactGP`, a :class:`~ntk_gp.LaplaceGP`, or an
        :class:`~gpytorch.models.ApproximateGP` with a VariationalStrategy or UnwhitenedVariationalStrategy, in eval
        mode, whose kernel is an :class:`~ntk_gp.NTKKernel`, scaled or not, without batches but those of
        `output="batch"`; or its sum with a :class:`~ntk_gp.GainKernel` of the same network and GPyTorch's
        ConstantKernel and LinearKernel. Of a LaplaceGP the functions are latent ones, logits, and exact draws from
        Laplace's approximation.
    :param num_functions: How many, k.
    :param prior: Draw from the prior instead.
    :param generator: The source of randomness. (Default: torch's own, on the CPU.)
    :return: A module that maps (*batch, n, d) to (k, *batch, n); (k, *batch, n, C) for a multitask model, and
        (k, *batch, C, n) for a batch of outputs, each of whose functions has weights of its own.
    :raises TypeError: If the kernel is of another kind.
    :raises ValueError: If the model has batches, or its `forward` does more than apply mean and kernel to its inputs.
    """
    tangent = ntk_summand(model)
    posterior = weight_posterior(model, tangent)
    columns = posterior.columns()

    def normals(*shape: int) -> Tensor:
        return _normal(shape, generator, posterior.x.device)

    weights = (posterior.prior if prior else posterior.draws)(num_functions, normals)
    weights = weights.transpose(0, 1) if tangent.kernel.is_by_output else weights[0]
    width = weights.shape[-1] - sum(sizes_of(columns))
    functions = LinearizedFunctions(
        tangent.kernel.network,
        weights[..., :width],
        model.mean_module,
        dims_seen(model, tangent),
        getattr(model, "input_transform", None),
        getattr(model, "outcome_transform", None),
        columns,
        weights[..., width:] if columns else None,
    )
    functions.try_at(posterior.two_points())
    return functions


def adapted_network(model: ExactGP | LaplaceGP | ApproximateGP) -> LinearizedNetwork:
    """The posterior mean of a model as a network of its own, f(x) + J(x) ŵ.

    :param model: An :class:`~gpytorch.models.ExactGP`, a :class:`~ntk_gp.LaplaceGP` (whose mean are logits), or an
        :class:`~gpytorch.models.ApproximateGP` with a VariationalStrategy or UnwhitenedVariationalStrategy, in eval
        mode, with a :class:`~ntk_gp.means.NetworkMean` and an :class:`~ntk_gp.NTKKernel` (scaled or not) of the same
        network, without batches but those of `output="batch"`, in which each output has a ŵ of its own; or with its sum
        with a :class:`~ntk_gp.GainKernel` of that network and GPyTorch's ConstantKernel and LinearKernel, whose
        features are functions of x and f(x) and cost no pass of their own.
    :raises TypeError: If mean or kernel are of another kind.
    :raises ValueError: If they are of different networks, or the model does more than apply them to its inputs.
    """
    tangent, mean = ntk_summand(model), model.mean_module
    if not isinstance(mean, NetworkMean):
        raise TypeError(f"Expected a NetworkMean as the model's mean, got {type(mean).__name__}.")
    if not same_network(tangent.kernel.network, mean.network):
        raise ValueError(
            "Expected mean and kernel of the same network, with the same output and input_shape; they differ. Make "
            "both from one network, or call model(x) instead."
        )
    if dims_seen(model, tangent) is not None or mean.active_dims is not None:
        raise ValueError("A kernel or mean with active_dims sees only some inputs: call model(x) instead.")
    if any(getattr(model, name, None) is not None for name in ("input_transform", "outcome_transform")):
        raise ValueError("A model that transforms inputs or outcomes is more than a network: call model.posterior(x).")
    posterior = weight_posterior(model, tangent)
    points, columns = posterior.two_points(), posterior.columns()
    weights = posterior.mean().to(points.dtype)
    weights = weights if tangent.kernel.is_by_output else weights[0]
    size = weights.shape[-1] - sum(sizes_of(columns))
    own = weights[..., size:] if columns else None
    adapted = LinearizedNetwork(tangent.kernel.network, weights[..., :size], columns=columns, column_weights=own)
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
    if not isinstance(mean, NetworkMean) or not same_network(network, mean.network):
        return False
    if active_dims is None or mean.active_dims is None:
        return active_dims is mean.active_dims
    return torch.equal(active_dims, mean.active_dims)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = torch.device("cpu") if generator is None else generator.device
    return same_on_all_ranks(torch.randn(shape, generator=generator, dtype=torch.float64, device=source)).to(device)
