"""Linearised networks as modules to hand out: they own what they compute with, and can be traced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._compat import BUFFERS, buffers_in, dual_level_number, innermost_transform
from .jacobian.autodiff import AutodiffEngine
from .jacobian.forward_mode import dual_level, value_and_product
from .jacobian.modes import Modes
from .network import FrozenNetwork, NetworkFunction, check_finite, normal_tensor
from .network.returned import tensor_of
from .network.snapshot import convert_skeleton
from .replacements.elementary import ElementaryOperations
from .tracing import linearize_by_autograd, traced_through

Parameters = dict[str, Tensor]


class LinearizedModule(nn.Module):
    """What the modules handed out have in common: f(x) and J(x) w for some w, by one pass through the network.

    The tensors are this module's alone, whatever the network was made of: no change of them, in place or not, has an
    effect elsewhere, or the other way round. It may be called from several threads at once.

    There are two ways. Ordinary calls check their inputs, are cut to the memory budget and run at the full rate.
    Calls inside `torch.compile`, `torch.export` and the transforms of `torch.func` are a pure function of the inputs:
    no checks, no caches, no locks.

    :param network: The frozen network; copied.
    """

    def __init__(self, network: FrozenNetwork):
        super().__init__()
        self.network = owned(network)
        # Whether forward-mode differentiation serves this network, and rightly; known once it has been tried.
        self._has_forward_mode: bool | None = None
        self._prepare()

    def _prepare(self) -> None:
        self._engine = AutodiffEngine(self.network)
        self._last: tuple[tuple, NetworkFunction] | None = None
        self._make_skeleton()

    def _make_skeleton(self) -> None:
        """The module that is traced; others are lent out by the network, a call at a time."""
        network = self.network
        # In a list, so that it is none of this module's submodules.
        skeleton = convert_skeleton(network._skeleton[0], network.dtype, network.device)
        self._traced = [copy.deepcopy(skeleton)]
        fast = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        self._has_fastpath = any(isinstance(module, fast) for module in skeleton.modules())

    def values_and_products(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """f(x), (m, C), and J(x) w, (k, m, C), at inputs (m, d) for w (k, P).

        Costs about two passes through the network for the first w and one for each other.
        """
        if torch.compiler.is_compiling():
            return self._traced_values(x, directions)
        if innermost_transform() is not None or _is_dual(x):
            return self._transformed_values(x, directions)
        check_finite(x)
        return self._checked_values(x, directions)

    def values_and_functions(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """f(x), (m, C), and J(x) w, (k, m, C), for w (k, P); or for w (k, C, P), of each output its own."""
        if weights.dim() == 2:
            return self.values_and_products(x, weights)
        values, products = self.values_and_products(x, weights.flatten(0, 1))
        return values, products.unflatten(0, weights.shape[:2]).diagonal(dim1=1, dim2=-1)

    def try_at(self, x: Tensor) -> None:
        """Finds out what the network supports, at one input or more (m, d), so that it is known when it is traced."""
        self._has_forward_mode = _is_sure_of_forward_mode(self._engine.linearize(x.unsqueeze(0)).modes)

    def _checked_values(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        state = self.network.fingerprint(thorough=True)
        # Inputs like the last ones were, of a network that is what it was, need not be looked at again.
        key = (state, x.dtype, x.device, x.shape[-1], min(len(x), 16).bit_length())
        last, alone = self._last, len(directions) == 1 and not (torch.is_grad_enabled() and x.requires_grad)
        if alone and last is not None and last[0] == key:
            return _in_one_pass(last[1], x, directions.to(x))
        jacobian = self._engine.linearize(x.unsqueeze(0))
        function, directions = jacobian.function, directions.to(x)
        if len(x):
            self._has_forward_mode = _is_sure_of_forward_mode(jacobian.modes)
        if len(x) and alone and self._has_forward_mode:
            self._last = (key, function)
            return _in_one_pass(function, x, directions)
        values = self.network.values(x, state)
        return values, jacobian.jvp(directions.unsqueeze(0)).reshape(len(directions), *values.shape)

    def _transformed_values(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        function = self.network.function(x.dtype, x.device)
        tangents = function.split(directions.to(x))
        forward = self._has_forward_mode and not _is_dual(x)  # dual numbers cannot be nested
        with function.tracing(input_gradients=True), dual_level.alone():
            return _linearize_at(lambda parameters: function(parameters, x), function.parameters, tangents, forward)

    def _traced_values(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        tensors = {
            name: tensor.to(x.device, x.dtype if tensor.is_floating_point() else None)
            for name, tensor in self.network.tensors.named_buffers()
        }
        directions = directions.to(x)
        if torch.compiler.is_dynamo_compiling():
            if not self._has_fastpath:
                return self._pure(_linearize_at, x, directions, tensors)
            enabled = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)  # it has no derivatives; this breaks the graph in two
            out = self._pure(_linearize_at, x, directions, tensors)
            torch.backends.mha.set_fastpath_enabled(enabled)
            return out
        names = list(tensors)

        def flat(x: Tensor, directions: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return self._pure(linearize_by_autograd, x, directions, dict(zip(names, tensors, strict=True)))

        values, products = traced_through(flat, x, directions, *tensors.values())
        return values, products

    def _pure(
        self, linearize: Callable[..., tuple[Tensor, Tensor]], x: Tensor, directions: Tensor, tensors: Parameters
    ) -> tuple[Tensor, Tensor]:
        network = self.network
        args, kwargs = network.inputs.arguments(x.clone())  # the network may write to it

        def at(parameters: Parameters) -> Tensor:
            both = {**tensors, **parameters}
            named = {name: both[owner] for name, owner in network._aliases.items()}
            returned = functional_call(self._traced[0], named, args, kwargs, tie_weights=False)
            return network.outputs.pick(tensor_of(returned, network.specification.steps).reshape(x.shape[0], -1))

        parameters = {name: tensors[name] for name in network.parameter_names}
        sizes = [tensor.numel() for tensor in parameters.values()]
        tangents = {
            name: piece.reshape(directions.shape[0], *parameters[name].shape)
            for name, piece in zip(parameters, directions.split(sizes, dim=-1), strict=True)
        }
        # That a mode is active also keeps encoder layers from their fast path, which has no derivatives.
        with ElementaryOperations(), sdpa_kernel(SDPBackend.MATH):
            return linearize(at, parameters, tangents, self._has_forward_mode)

    def shaped(self, values: Tensor, x: Tensor) -> Tensor:
        """Values (..., m, C) at inputs (*batch, d) as (..., *batch), or (..., *batch, C) for several outputs; as a
        batch of outputs, (..., *batch, C, n) at inputs (*batch, n, d)."""
        return self.network.outputs.shaped(values, x.shape[:-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearizedModule:
        super()._apply(fn, recurse)
        self._make_skeleton()
        return self

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_engine", "_last", "_traced")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.network = owned(self.network)  # copies of frozen networks share their tensors
        self._prepare()


def owned(network: FrozenNetwork) -> FrozenNetwork:
    """A copy with tensors of its own, and nothing computed yet."""
    new = copy.deepcopy(network)
    with torch.inference_mode(False), torch.no_grad():
        for node in new.tensors.modules():
            buffers = {name: t if t is None else normal_tensor(t).clone() for name, t in buffers_in(node).items()}
            vars(node)[BUFFERS] = buffers
    new._functions, new._checked = {}, set()
    return new


def _is_sure_of_forward_mode(modes: Modes) -> bool:
    return modes.forward and modes.formulas_agree


def _is_dual(x: Tensor) -> bool:
    return dual_level_number() >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _in_one_pass(function: NetworkFunction, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """f and J w of a network that has forward mode, for one w (1, P)."""
    values, product = value_and_product(function, x, directions[0])
    return values, product.unsqueeze(0)


def _linearize_at(
    at: Callable[[Parameters], Tensor], parameters: Parameters, tangents: Parameters, has_forward_mode: bool | None
) -> tuple[Tensor, Tensor]:
    """f and J w for tangents {name: (k, *shape)}; without forward mode by the transpose of the transpose.

    That is also what is done where nobody has tried yet: it is right wherever it can be done at all.
    """
    number = next(iter(tangents.values())).shape[0]
    first = {name: tangent[0] for name, tangent in tangents.items()}
    if has_forward_mode:
        if number == 1:
            values, product = jvp(at, (parameters,), (first,))  # type: ignore[misc]
            return values, product.unsqueeze(0)
        values = at(parameters)
        return values, vmap(lambda tangent: jvp(at, (parameters,), (tangent,))[1])(tangents)
    values, pull = vjp(at, parameters)  # type: ignore[misc]
    _, transpose = vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(values))  # type: ignore[misc]
    if number == 1:
        return values, transpose(first)[0].unsqueeze(0)
    return values, vmap(lambda tangent: transpose(tangent)[0])(tangents)
