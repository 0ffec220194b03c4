r"""Gram matrices at inputs that require gradients: computed by either engine, differentiated by autodiff.

The derivative of :math:`\langle V, J(X) \Sigma J(X')^\top \rangle` by the input :math:`x_i` is that of
:math:`\sum_c J_c(x_i)\, u_{ic}` with the constant vectors :math:`u_{ic} = \Sigma J(X')^\top v_{ic}`: so forward no
graph is recorded and the engine's structure serves, and backward takes one directional derivative for each row,
which is differentiated itself. Rows of J are held with a graph only where the network has no forward mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import vmap

from .. import memory
from ..network import NetworkFunction, are_one_origin, normal_tensor, origin
from . import transforms
from .autodiff import AutodiffJacobian
from .base import Jacobian
from .forward_mode import value_and_tangent
from .modes import TRANSFORM_ERRORS, Modes, is_transformed
from .products import variances_derivative

# What is kept of a directional derivative to differentiate it, in passes through the network: values and tangents.
_PASSES = 3

# Vectors for each row that are held where derivatives of several matrices meet: two of them and their sum.
_HELD = 3

Blocks = Iterator[tuple[slice, Tensor]]
Capture = Callable[[Tensor], Jacobian]
Derivatives = tuple[Tensor | None, ...]


class At:
    """Some inputs as the two engines have them.

    :param recorded: The Jacobian there by autodiff, where they require gradients; None where they do not.
    :param captured: The Jacobian there without a graph.
    """

    def __init__(self, recorded: AutodiffJacobian | None, captured: Jacobian):
        self.recorded = recorded
        self.captured = captured
        self.x = captured.x if recorded is None else recorded.x
        self.tap: Tensor | None = None
        if recorded is None:
            return
        # Whatever cannot be differentiated is refused here, not in the backward pass.
        function, modes = recorded.function, recorded.modes
        with function.tracing(input_gradients=True):
            modes.try_input_gradients(function, recorded.x, of_products=modes.forward)
        self.origin = origin(recorded.x)
        if _HELD * self._vectors_per_point() * captured.num_points <= memory.BLOCK.bytes(self.x.device):
            self.tap = _Tap.apply(recorded.x, recorded)

    def is_at(self, jacobian: Jacobian) -> bool:
        """Whether these are the inputs, with the graph and the numbers that they have, of the network as it is."""
        x, own = jacobian.x, self.captured
        return (
            jacobian.function.state == own.function.state
            and are_one_origin(self.origin, origin(x))
            and x.dtype == own.x.dtype
            and torch.equal(x, own.x)
        )

    def with_graph(self, x: Tensor) -> Jacobian:
        """The Jacobian at x, these inputs, differentiable as often as asked."""
        if self.recorded is None:
            return self.captured
        return AutodiffJacobian(self.recorded.function, x, self.recorded.modes)

    def derivatives(self, blocks: Callable[[At], Blocks]) -> tuple[Tensor | None, Tensor | None]:
        """Those by the inputs and by the tap, of which one is None, of Σ_ic J_c(x_i) u_ic.

        :param blocks: Points, and their vectors u, (B or more, m·C, P); summed over batches that x has not.
        """
        if self.recorded is None:
            return None, None
        pieces = []
        for points, vectors in blocks(self):
            summed = vectors.sum_to_size(len(self.x), *vectors.shape[1:])
            pieces.append(summed if self.tap is not None else _derivative(self.recorded[points], summed))
        if self.tap is not None:
            return None, pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
        return torch.cat(pieces, dim=1), None

    def blocks(self) -> Iterator[slice]:
        """The points, as many at a time as may be differentiated at once."""
        size = max(1, memory.BLOCK.bytes(self.x.device) // max(1, self._vectors_per_point() + self._passes_per_point()))
        for start in range(0, self.captured.num_points, size):
            yield slice(start, min(start + size, self.captured.num_points))

    def rows_of(self, points: slice) -> slice:
        outputs = self.captured.function.num_outputs
        return slice(points.start * outputs, points.stop * outputs)

    def _vectors_per_point(self) -> int:
        """Bytes of a point's vectors of parameters, one for each output."""
        function = self.captured.function
        return len(self.x) * function.num_outputs * function.num_parameters * self.x.element_size()

    def _passes_per_point(self) -> int:
        """Bytes that are kept of a directional derivative to differentiate it: of values and of tangents."""
        function = self.captured.function
        return _PASSES * len(self.x) * function.num_outputs * function.bytes_per_point


class _Tap(torch.autograd.Function):
    """J(X) as far as autograd has to know it, (B, N, P) without memory of its own.

    The derivatives by J of all matrices that are made of it meet here, to be taken to the inputs at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, recorded: AutodiffJacobian) -> Tensor:
        ctx.recorded = recorded
        return x.new_zeros(()).expand(len(x), recorded.num_rows, recorded.function.num_parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vectors: Tensor) -> tuple[Tensor, None]:
        return _derivative(ctx.recorded, vectors), None


class AtInputs:
    """Gram matrices at inputs that require gradients; the ones seen last are known as long as a graph has them."""

    def __init__(self) -> None:
        self._last: weakref.ref[At] | None = None

    def gram(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor, capture: Capture) -> Tensor:
        """J Σ_w J'ᵀ, (B or W, N, N'), differentiable with respect to inputs and variances (W, G), as often as asked.

        :param capture: Gives the Jacobian at inputs without a graph.
        """
        if is_transformed():  # transforms see to derivatives themselves
            return _recorded_gram(jacobian1, jacobian2, variances)
        one, other = self._both(jacobian1, jacobian2, capture)
        return _Gram.apply(one.x, other.x, one.tap, other.tap, variances, one, other)

    def diagonal(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor, capture: Capture) -> Tensor:
        """Its diagonal, for equally many inputs: (B or W, N)."""
        if is_transformed():
            return _recorded_diagonal(jacobian1, jacobian2, variances)
        one, other = self._both(jacobian1, jacobian2, capture)
        return _Diagonal.apply(one.x, other.x, one.tap, other.tap, variances, one, other)

    def _both(self, jacobian1: Jacobian, jacobian2: Jacobian, capture: Capture) -> tuple[At, At]:
        one = self._at(jacobian1, capture)
        return one, one if jacobian2 is jacobian1 else self._at(jacobian2, capture)

    def _at(self, jacobian: Jacobian, capture: Capture) -> At:
        if not jacobian.x.requires_grad:
            return At(None, jacobian)
        assert isinstance(jacobian, AutodiffJacobian)
        last = None if self._last is None else self._last()
        if last is not None and last.is_at(jacobian):
            return last
        with torch.no_grad():
            captured = capture(jacobian.x.detach())
        made = At(jacobian, captured)
        self._last = weakref.ref(made)
        return made


class _AtInputs(torch.autograd.Function):
    """What both have in common. Derivatives go to the taps; derivatives of derivatives are taken from autodiff's rows
    of J, and go to the inputs."""

    @staticmethod
    def kept(ctx: Any, x1: Tensor, x2: Tensor, variances: Tensor, one: At, other: At) -> None:
        ctx.save_for_backward(x1, x2, variances)
        ctx.at = one, other

    @staticmethod
    def again(ctx: Any, grad: Tensor, compute: Callable[..., Tensor]) -> Derivatives:
        """The derivatives with a graph of their own."""
        x1, x2, variances = ctx.saved_tensors
        one, other = ctx.at
        jacobian1 = one.with_graph(x1)
        jacobian2 = jacobian1 if one is other else other.with_graph(x2)
        inputs = (x1, variances) if one is other else (x1, x2, variances)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        value = compute(jacobian1, jacobian2, variances)
        found = iter(torch.autograd.grad(value, wanted, grad, create_graph=True, allow_unused=True))
        first, *second, last = (next(found) if tensor.requires_grad else None for tensor in inputs)
        return first, second[0] if second else None, None, None, last, None, None

    @staticmethod
    def once(
        ctx: Any, of_one: Callable[[At], Blocks], of_other: Callable[[At], Blocks], of_variances: Callable[[], Tensor]
    ) -> Derivatives:
        one, other = ctx.at
        x1, tap1 = one.derivatives(of_one)
        x2, tap2 = (None, None) if one is other else other.derivatives(of_other)
        return x1, x2, tap1, tap2, of_variances() if ctx.needs_input_grad[4] else None, None, None


class _Gram(_AtInputs):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, tap1: Any, tap2: Any, variances: Tensor, one: At, other: At
    ) -> Tensor:
        _AtInputs.kept(ctx, x1, x2, variances, one, other)
        return one.captured.gram(other.captured, variances)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Derivatives:
        if torch.is_grad_enabled():
            return _AtInputs.again(ctx, grad, _recorded_gram)
        one, other = ctx.at
        variances = ctx.saved_tensors[2]
        by_rows = grad + grad.mT if one is other else grad
        return _AtInputs.once(
            ctx,
            partial(_pulled, by_rows, other, variances),
            partial(_pulled, grad.mT, one, variances),
            partial(variances_derivative, grad, variances, partial(one.captured.gram, other.captured)),
        )


class _Diagonal(_AtInputs):
    @staticmethod
    def forward(
        ctx: Any, x1: Tensor, x2: Tensor, tap1: Any, tap2: Any, variances: Tensor, one: At, other: At
    ) -> Tensor:
        _AtInputs.kept(ctx, x1, x2, variances, one, other)
        if one is other:
            return one.captured.diagonal(variances)
        return one.captured.cross_diagonal(other.captured, variances)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Derivatives:
        if torch.is_grad_enabled():
            return _AtInputs.again(ctx, grad, _recorded_diagonal)
        one, other = ctx.at
        variances = ctx.saved_tensors[2]
        return _AtInputs.once(
            ctx,
            partial(_weighted_rows, 2 * grad if one is other else grad, other, variances),
            partial(_weighted_rows, grad, one, variances),
            partial(variances_derivative, grad, variances, partial(one.captured.cross_diagonal, other.captured)),
        )


def _recorded_gram(one: Jacobian, other: Jacobian, variances: Tensor) -> Tensor:
    if isinstance(one, AutodiffJacobian):
        return one.gram(other, variances)
    return other.gram(one, variances).mT


def _recorded_diagonal(one: Jacobian, other: Jacobian, variances: Tensor) -> Tensor:
    return one.diagonal(variances) if one is other else one.cross_diagonal(other, variances)


def _pulled(cotangents: Tensor, other: At, variances: Tensor, one: At) -> Blocks:
    """Blocks of one's points, and Σ J'ᵀ v for the rows v of theirs, (B, m·C, P)."""
    function = one.captured.function
    weights = function.expand_variances(variances.detach()).unsqueeze(-2)
    for points in one.blocks():
        with function.tracing(), torch.no_grad():
            yield points, other.captured.vjp(cotangents[:, one.rows_of(points)]) * weights


def _weighted_rows(weights: Tensor, other: At, variances: Tensor, one: At) -> Blocks:
    """Blocks of one's points, and Σ J'_i v_i for theirs, (B, m·C, P)."""
    function = one.captured.function
    expanded = function.expand_variances(variances.detach()).unsqueeze(-2)
    for points in one.blocks():
        with function.tracing(), torch.no_grad():
            yield points, other.captured[points].rows() * weights[:, one.rows_of(points)].unsqueeze(-1) * expanded


def _derivative(jacobian: AutodiffJacobian, vectors: Tensor) -> Tensor:
    """The derivative of Σ_ic J_c(x_i) u_ic by the inputs, (B, n, d), for u (B, n·C, P)."""
    x, function = normal_tensor(jacobian.x.detach()), jacobian.function
    tangents = vectors.unflatten(1, (-1, function.num_outputs)).flatten(0, 1)
    return directional_derivatives(function, jacobian.modes, x.flatten(0, 1), tangents).reshape(x.shape)


def directional_derivatives(function: NetworkFunction, modes: Modes, x: Tensor, tangents: Tensor) -> Tensor:
    """The derivatives of Σ_c J_c(x_i) u_ic by x_i, one pass forward and one back for each i and c: (m, d).

    :param x: (m, d), without a graph.
    :param tangents: u, (m, C, P).
    """
    points = x.clone().requires_grad_()
    with function.tracing(input_gradients=True), torch.enable_grad():
        total = None
        if modes.forward and modes.formulas_agree and modes.together(len(x)):
            total = _pushed_together(function, points, tangents)
        if total is None:
            rows = AutodiffJacobian(function, points.unsqueeze(0), modes).rows()
            total = torch.linalg.vecdot(rows.reshape(tangents.shape), tangents).sum()
        if not total.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(total, points, allow_unused=True, materialize_grads=True)
        return found


def _pushed_together(function: NetworkFunction, x: Tensor, tangents: Tensor) -> Tensor | None:
    """Σ_ic J_c(x_i) u_ic by forward mode, every point with a vector of its own; None where transforms raise."""
    outputs = function.num_outputs
    choice = torch.eye(outputs, dtype=x.dtype, device=x.device)

    def product(point: Tensor, tangent: Tensor, chosen: Tensor) -> Tensor:
        def at(parameters: dict[str, Tensor], mode: Any = None) -> Tensor:
            return function(parameters, point.unsqueeze(0)).reshape(-1)

        return value_and_tangent(at, function.parameters, function.split(tangent))[1] @ chosen

    try:
        with transforms.quiet_batching_rules():
            points = x.repeat_interleave(outputs, dim=0)
            return vmap(product)(points, tangents.flatten(0, 1), choice.repeat(len(x), 1)).sum()
    except TRANSFORM_ERRORS:  # a network may do something else here than where it was tried
        return None
