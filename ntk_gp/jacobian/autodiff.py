"""The reference engine: `torch.func` derivatives of the network as it stands, for any network.

J u is forward-mode differentiation; where an operator of the network has none (weight norm, grid sampling), it is the
transpose of the transpose: Jᵀv is linear in v, and reverse-mode differentiation of it gives J u. Where an operator
can be differentiated just once (distances, embedding bags), it is formed from the rows of J, some points at a time.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap

from ..network import FrozenNetwork, NetworkFunction, normal_tensor
from .base import Jacobian, JacobianEngine
from .layers import FullRateLayers

# Below this many bytes of activations a pass is bound by call overhead, and several columns go through it together;
# above it one column saturates the cores, and batching columns only pushes them out of cache.
_VMAP_BYTES = 1 << 18

# PyTorch has one level of dual numbers, which all threads share: one of them at a time.
dual_numbers = threading.RLock()


class AutodiffEngine(JacobianEngine):
    """Jacobians by `torch.func`.

    :param network: The frozen network.
    """

    def __init__(self, network: FrozenNetwork):
        super().__init__(network)
        self._modes: dict[tuple, _Modes] = {}

    def linearize(self, x: Tensor) -> AutodiffJacobian:
        self.network.check(x)
        function = self.network.function(x.dtype, x.device)
        return self.linearize_function(function, x)

    def linearize_function(self, function: NetworkFunction, x: Tensor) -> AutodiffJacobian:
        """The same for a function that was restricted to some of the parameters."""
        key = (x.shape[-1], function.dtype, function.device, *function.parameters)
        if key not in self._modes and x.numel():
            self._modes[key] = _Modes.probe(function, normal_tensor(x.detach()).reshape(-1, x.shape[-1])[:2])
        return AutodiffJacobian(function, normal_tensor(x), self._modes.get(key, _Modes()))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_modes": {}}


class AutodiffJacobian(Jacobian):
    """J(X) by `torch.func`; holds nothing but the inputs.

    :param function: The network as a pure function of its parameters.
    :param x: The inputs, (B, n, d).
    :param modes: Which transforms this network supports.
    """

    def __init__(self, function: NetworkFunction, x: Tensor, modes: _Modes):
        super().__init__(function, x)
        self.modes = modes

    def __getitem__(self, points: Tensor | slice) -> AutodiffJacobian:
        return AutodiffJacobian(self.function, self.x[:, points], self.modes)

    def jvp(self, tangents: Tensor) -> Tensor:
        function = self.function
        if self.num_rows == 0 or tangents.shape[-2] == 0:
            return tangents.new_zeros(self.x.shape[0], tangents.shape[-2], self.num_rows)
        if tangents.shape[0] == 1:  # every batch has the same tangents: its points are as good as more points
            columns = self._jvp_points(self.x.reshape(-1, self.x.shape[-1]), tangents[0])
            return columns.reshape(-1, self.x.shape[0], self.num_rows).transpose(0, 1)
        points = self.x.expand(tangents.shape[0], -1, -1)
        return torch.stack([self._jvp_points(x, u) for x, u in zip(points, tangents, strict=True)]).reshape(
            tangents.shape[0], -1, self.x.shape[1] * function.num_outputs
        )

    def _jvp_points(self, x: Tensor, tangents: Tensor) -> Tensor:
        """(m, d) points and (r, P) tangents to (r, m·C)."""
        if not (self.modes.forward or self.modes.twice):
            points = AutodiffJacobian(self.function, x.unsqueeze(0), self.modes)
            blocks = _row_blocks(points, points.points_per_block())
            return torch.cat([tangents @ rows[0].mT for _, rows in blocks], dim=-1)
        pieces = []
        with self._computation(x):
            for chunk in x.split(self.function.points_per_pass(), dim=0):
                push = _pushforward(self.function, chunk, forward_mode=self.modes.forward)
                pieces.append(self._map_columns(push, tangents, chunk))
        return torch.cat(pieces, dim=-1)

    def vjp(self, cotangents: Tensor) -> Tensor:
        batch = max(self.x.shape[0], cotangents.shape[0])
        if self.num_rows == 0 or cotangents.shape[-2] == 0:
            return cotangents.new_zeros(batch, cotangents.shape[-2], self.function.num_parameters)
        points = self.x.expand(batch, -1, -1)
        cotangents = cotangents.expand(batch, -1, -1)
        return torch.stack([self._vjp_points(x, v) for x, v in zip(points, cotangents, strict=True)])

    def _vjp_points(self, x: Tensor, cotangents: Tensor) -> Tensor:
        """(m, d) points and (r, m·C) cotangents to (r, P)."""
        size = self.function.points_per_pass()
        total: Tensor | None = None
        with self._computation(x):
            for chunk, columns in zip(
                x.split(size, dim=0), cotangents.split(size * self.function.num_outputs, dim=-1), strict=True
            ):
                pull = _pullback(self.function, chunk)
                part = self._map_columns(pull, columns, chunk)
                total = part if total is None else total + part
        assert total is not None
        return total

    def rows(self) -> Tensor:
        batch, _, d = self.x.shape
        shape = (batch, self.num_rows, self.function.num_parameters)
        if self.num_rows == 0:
            return self.x.new_zeros(shape)
        with self._computation(self.x):
            points = self.x.reshape(-1, 1, d)
            chunk = max(1, batch * self.points_per_block())
            one = _rows_at_one_point(self.function, loop=not self.modes.vmap)
            if self.modes.vmap:
                with _quiet_batching_rules():
                    pieces = [vmap(one)(part) for part in points.split(chunk)]
            else:
                pieces = [torch.stack([one(point) for point in points])]
            return torch.cat(pieces).reshape(shape)

    def gram(self, other: Jacobian, weights: Tensor) -> Tensor:
        batch = max(self.x.shape[0], other.x.shape[0], weights.shape[0])
        out = self.x.new_zeros(batch, self.num_rows, other.num_rows)
        outputs = self.function.num_outputs
        size = self.points_per_block()
        for i, rows in _row_blocks(self, size):
            scaled = rows * self.function.expand_weights(weights).unsqueeze(-2) if weights.shape[0] == 1 else rows
            for j in range(0, i + size if other is self else other.num_points, size):
                if other is self and j == i:
                    columns = rows
                elif j >= other.num_points:
                    break
                else:
                    columns = other[slice(j, j + size)].rows()
                block = scaled @ columns.mT if weights.shape[0] == 1 else self._weighted_block(rows, columns, weights)
                here = slice(i * outputs, i * outputs + block.shape[-2])
                there = slice(j * outputs, j * outputs + block.shape[-1])
                out[:, here, there] = block
                if other is self and j != i:
                    out[:, there, here] = block.mT
        return out

    def _weighted_block(self, rows: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        """One Gram block for several weightings, parameter by parameter."""
        sizes = self.function.sizes
        block: Tensor | None = None
        for left, right, group in zip(
            rows.split(sizes, dim=-1), columns.split(sizes, dim=-1), self.function.group_indices, strict=True
        ):
            part = weights[:, group, None, None] * (left @ right.mT)
            block = part if block is None else block + part
        assert block is not None
        return block

    def diagonal(self, weights: Tensor) -> Tensor:
        batch = max(self.x.shape[0], weights.shape[0])
        if self.num_rows == 0:
            return self.x.new_zeros(batch, 0)
        expanded = self.function.expand_weights(weights).unsqueeze(-2)
        blocks = _row_blocks(self, self.points_per_block())
        return torch.cat([(rows.square() * expanded).sum(-1) for _, rows in blocks], dim=-1)

    def _map_columns(self, apply: Callable[[Tensor], Tensor], columns: Tensor, chunk: Tensor) -> Tensor:
        """`apply` to each of the r columns: together where they are small, one by one where not."""
        together = _VMAP_BYTES // max(1, chunk.shape[0] * self.function.bytes_per_point)
        return _each(apply, columns, together if self.modes.vmap else 1)

    @contextmanager
    def _computation(self, x: Tensor) -> Iterator[None]:
        """Records a graph only where there is something to differentiate with respect to: the inputs."""
        input_gradients = torch.is_grad_enabled() and x.requires_grad
        with self.function.tracing(input_gradients), torch.set_grad_enabled(input_gradients):
            yield


class _Modes:
    """What the transforms of `torch.func` can do with a network.

    :param forward: Whether forward-mode differentiation works, and agrees with reverse mode.
    :param twice: Whether reverse-mode differentiation can be differentiated itself, and agrees.
    :param vmap: Whether the per-point rows can be computed for many points at once, and are the same.
    """

    def __init__(self, forward: bool = True, twice: bool = True, vmap: bool = True):
        self.forward = forward
        self.twice = twice
        self.vmap = vmap

    @classmethod
    def probe(cls, function: NetworkFunction, x: Tensor) -> _Modes:
        """Tries them on a point or two against the slow and sure way."""
        with function.tracing(), torch.no_grad(), _quiet_batching_rules():
            one = _rows_at_one_point(function, loop=True)
            reference = torch.stack([one(point) for point in x.unsqueeze(-2)])
            rows = reference.reshape(-1, function.num_parameters)
            tangents, cotangents = (_two_vectors(size, x) for size in reversed(rows.shape))

            def pushes(forward_mode: bool, together: int) -> bool:
                return _agrees(
                    lambda: _each(_pushforward(function, x, forward_mode), tangents, together), tangents @ rows.mT
                )

            forward = pushes(forward_mode=True, together=1)
            with torch.enable_grad():  # and as it is done for inputs that require gradients
                forward = forward and pushes(forward_mode=True, together=1)
            twice = forward or pushes(forward_mode=False, together=1)
            batched = (
                _agrees(lambda: vmap(_rows_at_one_point(function, loop=False))(x.unsqueeze(-2)), reference)
                and _agrees(lambda: _each(_pullback(function, x), cotangents, together=2), cotangents @ rows)
                and (not twice or pushes(forward, together=2))
            )
        return cls(forward, twice, batched)


def _two_vectors(size: int, like: Tensor) -> Tensor:
    """Two vectors, (2, size), that are no multiples of each other."""
    ramp = torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
    return torch.stack([ramp, (3 * ramp).cos()])


def _agrees(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    try:
        actual = compute()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):
        return False  # the transform says that it cannot: the other way is taken
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    scale = float(expected.abs().max()) * math.sqrt(expected.shape[-1])
    return bool((actual - expected).abs().max() <= tolerance * scale)


def _pushforward(function: NetworkFunction, x: Tensor, forward_mode: bool) -> Callable[[Tensor], Tensor]:
    """u (P,) to J u (m·C,) at the points x (m, d)."""

    def at(parameters: dict[str, Tensor]) -> Tensor:
        return function(parameters, x).reshape(-1)

    if forward_mode:
        return lambda tangent: value_and_tangent(at, function.parameters, function.split(tangent))[1]
    out, pull = vjp(at, function.parameters)  # type: ignore[misc]
    _, transpose = vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(out))  # type: ignore[misc]
    return lambda tangent: transpose(function.split(tangent))[0]


def value_and_tangent(
    at: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], tangents: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """What `torch.func.jvp` gives: by itself where other derivatives are taken as well, and otherwise from dual numbers
    without its bookkeeping, and with faster linear layers."""
    with dual_numbers:
        transformed = forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or torch.is_grad_enabled():
            return jvp(at, (parameters,), (tangents,))  # type: ignore[return-value]
        with forward_ad.dual_level(), FullRateLayers():
            out = at({name: forward_ad.make_dual(tensor, tangents[name]) for name, tensor in parameters.items()})
            value, tangent = forward_ad.unpack_dual(out)
        return value, torch.zeros_like(value) if tangent is None else tangent


def _pullback(function: NetworkFunction, x: Tensor) -> Callable[[Tensor], Tensor]:
    """v (m·C,) to Jᵀ v (P,) at the points x (m, d)."""
    _, pull = vjp(lambda parameters: function(parameters, x).reshape(-1), function.parameters)  # type: ignore[misc]
    return lambda cotangent: function.flatten(pull(cotangent)[0])


def _rows_at_one_point(function: NetworkFunction, loop: bool) -> Callable[[Tensor], Tensor]:
    """x (1, d) to the C rows of J there, (C, P)."""

    def rows(point: Tensor) -> Tensor:
        pull = _pullback(function, point)
        outputs = torch.eye(function.num_outputs, dtype=point.dtype, device=point.device)
        return torch.stack([pull(output) for output in outputs]) if loop else vmap(pull)(outputs)

    return rows


def _row_blocks(jacobian: Jacobian, size: int) -> Iterator[tuple[int, Tensor]]:
    """The rows of J at `size` points at a time, with the number of the first point."""
    for start in range(0, jacobian.num_points, size):
        yield start, jacobian[slice(start, start + size)].rows()


def _each(apply: Callable[[Tensor], Tensor], vectors: Tensor, together: int) -> Tensor:
    """`apply` to each row of `vectors`, so many at a time."""
    if together > 1 and vectors.shape[0] > 1:
        with _quiet_batching_rules():
            return vmap(apply, chunk_size=together)(vectors)
    return torch.stack([apply(vector) for vector in vectors])


@contextmanager
def _quiet_batching_rules() -> Iterator[None]:
    """vmap warns once for every operator that it has to loop over; the answer is the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield
