"""The reference engine: derivatives of the network as it stands, for any network that can be trained.

Plain autograd (:mod:`.plain`) serves whatever can be trained; the transforms of `torch.func` (:mod:`.transforms`) where
they let many rows or vectors go through a small network together, and for callers that are in a transform themselves.
J u is forward-mode differentiation; where an operator of the network has none (weight norm, grid sampling), or one that
disagrees with its reverse mode, it is the transpose of the transpose: Jᵀv is linear in v, and reverse-mode
differentiation of it gives J u. Where an operator can be differentiated just once (distances), it is formed from the
rows of J, some points at a time. :mod:`.modes` finds out what serves.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import memory
from ..network import FrozenNetwork, NetworkFunction, is_finite, normal_tensor, some_rows
from . import plain, transforms
from .base import Jacobian, JacobianEngine
from .forward_mode import value_and_product
from .modes import TRANSFORM_ERRORS, Modes, agree_at_random, is_transformed

logger = logging.getLogger("ntk_gp")

_Result = TypeVar("_Result")

# Points at which the ways to differentiate a network are tried.
_TRIED = 2
# Below this many bytes of activations a pass is bound by call overhead, and several columns go through it together;
# above it one column saturates the cores, and batching columns only pushes them out of cache.
_VMAP_BYTES = 1 << 18
# Points that share a forward pass for their rows' sake, in a small network.
_SHARED = 16


class AutodiffEngine(JacobianEngine):
    """Jacobians by automatic differentiation.

    :param network: The frozen network.
    """

    def __init__(self, network: FrozenNetwork):
        super().__init__(network)
        self._clear()

    def _clear(self) -> None:
        self._modes: dict[tuple, Modes] = {}
        self._lock = threading.RLock()  # held while a network is tried

    def linearize(self, x: Tensor, function: NetworkFunction | None = None) -> AutodiffJacobian:
        return self.linearize_function(self.network.at(x) if function is None else function, x)

    def linearize_function(self, function: NetworkFunction, x: Tensor) -> AutodiffJacobian:
        """The same for a function that was restricted to some of the parameters."""
        key = (x.shape[-1], function.dtype, function.device, *function.parameters)
        if key not in self._modes and x.numel():
            with self._lock:
                if key not in self._modes:
                    flat = normal_tensor(x.detach()).reshape(-1, x.shape[-1])
                    with function.tracing(), torch.no_grad():
                        rows = some_rows(flat, _TRIED, partial(function, function.parameters))[:_TRIED]
                        function(function.parameters, rows)  # what raises is not what others are tried at
                    self._modes[key] = Modes(function, rows)
        modes = self._modes[key] if key in self._modes else Modes()
        if not x.requires_grad:  # inducing points need rows only, and the first forward mode in a process takes a while
            modes.try_products()
        return AutodiffJacobian(function, normal_tensor(x), modes)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_modes": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._clear()

    def __deepcopy__(self, memo: dict) -> AutodiffEngine:
        return AutodiffEngine(copy.deepcopy(self.network, memo))


class AutodiffJacobian(Jacobian):
    """J(X) by automatic differentiation; holds nothing but the inputs.

    :param function: The network as a pure function of its parameters.
    :param x: The inputs, (B, n, d).
    :param modes: What serves this network.
    """

    def __init__(self, function: NetworkFunction, x: Tensor, modes: Modes):
        super().__init__(function, x)
        self.modes = modes

    @property
    def nbytes(self) -> int:
        return 0

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

    def values_and_product(self, tangent: Tensor) -> tuple[Tensor, Tensor] | None:
        modes = self.modes
        if (
            self.x.requires_grad
            or not len(self.x[0])
            or is_transformed()
            or not (modes.forward and modes.formulas_agree)
        ):
            return None
        found = _tried(value_and_product, self.function, self.x.flatten(0, 1), tangent)
        return None if found is None else (found[0].reshape(*self.x.shape[:2], -1), found[1].reshape(len(self.x), -1))

    def _jvp_points(self, x: Tensor, tangents: Tensor) -> Tensor:
        """(m, d) points and (r, P) tangents to (r, m·C)."""
        with self._computation(x, of_products=True):
            pieces = [self._pushed(chunk, tangents) for chunk in x.split(self.function.points_per_pass(), dim=0)]
        return torch.cat(pieces, dim=-1)

    def _pushed(self, x: Tensor, tangents: Tensor) -> Tensor:
        """By forward mode, by the transpose of the transpose, or from rows."""
        modes = self.modes
        if modes.forward:
            products = _tried(self._by_transforms, transforms.pushforward, tangents, x)
            if products is not None and self._is_transpose(x, tangents, products):
                return products
            if products is None or is_finite(products):
                modes.give_up("forward")
        if modes.twice:
            if is_transformed():
                return self._by_transforms(transforms.transposed_pullback, tangents, x)
            products = plain.push(self.function, x, tangents)
            if self._is_transpose(x, tangents, products):
                return products
            if is_finite(products):  # where they are not, only these inputs are to blame
                modes.give_up("twice")
        return self._from_rows(x, tangents)

    def _is_transpose(self, x: Tensor, tangents: Tensor, products: Tensor) -> bool:
        """Whether J u is what Jᵀ v says it is; asked where operators are not known to have derivatives that agree."""
        if self.modes.formulas_agree or is_transformed() or agree_at_random(self.function, x, tangents, products):
            return True
        logger.debug("J u is not the transpose of Jᵀ v at these inputs: it is found another way from now on.")
        return False

    def _from_rows(self, x: Tensor, tangents: Tensor) -> Tensor:
        points = AutodiffJacobian(self.function, x.unsqueeze(0), self.modes)
        return torch.cat([tangents @ rows[0].mT for _, rows in points.row_blocks()], dim=-1)

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
                part = self._pulled(chunk, columns)
                total = part if total is None else total + part
        assert total is not None
        return total

    def _pulled(self, x: Tensor, cotangents: Tensor) -> Tensor:
        if is_transformed() or self._go_together(x, len(cotangents)) > 1:
            products = _tried(self._by_transforms, transforms.pullback, cotangents, x)
            if products is not None:
                return products
        return plain.pull(self.function, x, cotangents)

    def rows(self) -> Tensor:
        batch, _, d = self.x.shape
        shape = (batch, self.num_rows, self.function.num_parameters)
        if self.num_rows == 0:
            return self.x.new_zeros(shape)
        points = self.x.reshape(-1, d)
        with self._computation(self.x):
            return self._rows_at(points, batch * self.points_per_block()).reshape(shape)

    def _rows_at(self, points: Tensor, chunk: int) -> Tensor:
        together = self.modes.together(len(points))
        if together or is_transformed():
            rows = _tried(transforms.rows, self.function, points, together, chunk)
            if rows is not None:
                return rows
        few = max(1, min(_SHARED, _VMAP_BYTES // max(1, self.function.bytes_per_point)))
        rows = plain.rows(self.function, points, few)
        # One point that is not finite makes those that share a pass with it so: zero times infinity.
        return rows if few == 1 or is_finite(rows) else plain.rows(self.function, points)

    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        if not other.shards.is_whole:  # its rows are shared among processes
            return other.gram(self, variances).mT
        batch = max(self.x.shape[0], other.x.shape[0], variances.shape[0])
        out = self.x.new_zeros(batch, self.num_rows, other.num_rows)
        outputs = self.function.num_outputs
        size = self.points_per_block()
        width = size if other is self else other.points_per_block()
        for points, rows in self.row_blocks():
            i = points.start
            scaled = rows * self.function.expand_variances(variances).unsqueeze(-2) if variances.shape[0] == 1 else rows
            for j in range(0, min(other.num_points, i + size) if other is self else other.num_points, width):
                columns = rows if other is self and j == i else other[slice(j, j + width)].rows()
                block = (
                    scaled @ columns.mT if variances.shape[0] == 1 else self._weighted_block(rows, columns, variances)
                )
                here = slice(i * outputs, i * outputs + block.shape[-2])
                there = slice(j * outputs, j * outputs + block.shape[-1])
                out[:, here, there] = block
                if other is self and j != i:
                    out[:, there, here] = block.mT
        return out

    def _weighted_block(self, rows: Tensor, columns: Tensor, variances: Tensor) -> Tensor:
        """One Gram block for several weightings, parameter by parameter."""
        sizes = self.function.sizes
        block: Tensor | None = None
        for left, right, group in zip(
            rows.split(sizes, dim=-1), columns.split(sizes, dim=-1), self.function.group_indices, strict=True
        ):
            part = variances[:, group, None, None] * (left @ right.mT)
            block = part if block is None else block + part
        assert block is not None
        return block

    def kernel_matmul(self, other: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        """A block of the matrix is formed for many columns, if it has room: that takes fewer passes."""
        graph = torch.is_grad_enabled() and any(t.requires_grad for t in (rhs, variances, self.x, other.x))
        if graph or not isinstance(other, AutodiffJacobian) or not self._pays_to_form(other, rhs.shape[-1]):
            return super().kernel_matmul(other, rhs, variances)
        return self.gram(other, variances) @ rhs

    def _pays_to_form(self, other: AutodiffJacobian, columns: int) -> bool:
        """Whether :meth:`gram` costs less than so many columns; each of its blocks of rows meets all other rows."""
        points = self.num_points * (1 if other is self else 1 + other.num_points / max(1, self.points_per_block()))
        passes = 5.0 * len(self.x) * points * self.function.num_outputs * self.function.num_parameters
        fits = self._results(other) * self.num_rows * other.num_rows * self.x.element_size()
        is_cheaper = passes + self.gram_cost(other) < columns * self.product_cost(other)
        return is_cheaper and fits <= memory.BLOCK.bytes(self.x.device)

    def diagonal(self, variances: Tensor) -> Tensor:
        batch = max(self.x.shape[0], variances.shape[0])
        if self.num_rows == 0:
            return self.x.new_zeros(batch, 0)
        expanded = self.function.expand_variances(variances).unsqueeze(-2)
        return torch.cat([(rows.square() * expanded).sum(-1) for _, rows in self.row_blocks()], dim=-1)

    def _by_transforms(self, way: Callable[..., Callable[[Tensor], Tensor]], vectors: Tensor, x: Tensor) -> Tensor:
        """A product with each of r vectors: together where they are small, one by one where not."""
        return transforms.each(way(self.function, x), vectors, self._go_together(x, len(vectors)))

    def _go_together(self, x: Tensor, count: int) -> int:
        """How many of so many vectors go through a pass at the points x together."""
        together = _VMAP_BYTES // max(1, x.shape[0] * self.function.bytes_per_point)
        return together if together > 1 and count > 1 and self.modes.together(count) else 1

    @contextmanager
    def _computation(self, x: Tensor, of_products: bool = False) -> Iterator[None]:
        """Records a graph only where there is something to differentiate with respect to: the inputs."""
        input_gradients = torch.is_grad_enabled() and x.requires_grad
        if input_gradients:
            self.modes.try_input_gradients(self.function, x, of_products)
        with self.function.tracing(input_gradients), torch.set_grad_enabled(input_gradients):
            yield


def _tried(compute: Callable[..., _Result], *arguments: Any) -> _Result | None:
    """By transforms, or None where they raise: a network may do something else here than where it was tried."""
    try:
        return compute(*arguments)
    except TRANSFORM_ERRORS as error:
        logger.debug("torch.func failed (%s: %s): plain autograd.", type(error).__name__, error)
        return None
