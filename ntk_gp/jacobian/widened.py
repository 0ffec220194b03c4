r"""The feature matrix with a few known columns beside it, [J, Ψ]: sums of kernels that are still one linear model.

An NTK plus kernels of known features (:mod:`.columns`) has the matrix

.. math:: J \Sigma J^\top + \Psi S \Psi^\top = [J, \Psi] \begin{pmatrix} \Sigma & \\ & S \end{pmatrix} [J, \Psi]^\top :

that of P + q parameters, the last q of which belong to groups of their own. Whatever takes a Jacobian or a
linearization takes these. What was computed for J alone is kept and shared: K of the network is formed once, whatever
stands beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import Shards
from ..network import FrozenNetwork, NetworkFunction, full_precision
from .base import Jacobian
from .columns import Column, features, sizes_of
from .derived import DerivedLinearization
from .linearization import Linearization


class WidenedJacobian(Jacobian):
    """[J(X), Ψ(X)], (B, N, P + q).

    :param base: J(X).
    :param columns: Ψ(X), (B, N, q).
    :param function: What :func:`widened_function` makes of the base's.
    """

    def __init__(self, base: Jacobian, columns: Tensor, function: NetworkFunction):
        super().__init__(function, base.x)
        self.base = base
        self.columns = columns
        self.values = base.values

    def values_and_product(self, tangent: Tensor) -> tuple[Tensor, Tensor] | None:
        first, own = self._split(tangent)
        found = self.base.values_and_product(first)
        return None if found is None else (found[0], found[1] + (self.columns @ own.unsqueeze(-1)).squeeze(-1))

    @property
    def own(self) -> WidenedJacobian:
        own = self.base.own
        if own is self.base:
            return self
        return WidenedJacobian(own, self.shards.own(self.columns, 1), self.function)

    @property
    def shards(self) -> Shards:
        return self.base.shards

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.columns.nbytes

    def _split(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(..., P + q) to (..., P) and (..., q)."""
        size = self.base.function.num_parameters
        return vectors[..., :size], vectors[..., size:]

    def split_variances(self, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the base's groups, (W, G), and one for each column, (W, q)."""
        groups = self.base.function.num_groups
        own = self.function.sizes[len(self.base.function.sizes) :]
        if len(own) == 1:
            return variances[:, :groups], variances[:, groups:].expand(-1, self.columns.shape[-1])
        sizes = torch.tensor(own, device=variances.device)
        return variances[:, :groups], variances[:, groups:].repeat_interleave(sizes, dim=-1)

    def jvp(self, tangents: Tensor) -> Tensor:
        first, own = self._split(tangents)
        return self.base.jvp(first) + own @ self.columns.mT

    def vjp(self, cotangents: Tensor) -> Tensor:
        return torch.cat([self.base.vjp(cotangents), cotangents @ self.columns], dim=-1)

    def rows(self) -> Tensor:
        return torch.cat([self.base.rows(), self.columns], dim=-1)

    def some_columns(self, index: Tensor) -> Tensor:
        size = self.base.function.num_parameters
        if bool((index >= size).all()):  # no pass through the network
            return self.columns[..., index - size]
        return super().some_columns(index)

    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        assert isinstance(other, WidenedJacobian)
        first, own = self.split_variances(variances)
        return plus_product(self.base.gram(other.base, first), self.columns * own.unsqueeze(-2), other.columns)

    def diagonal(self, variances: Tensor) -> Tensor:
        first, own = self.split_variances(variances)
        return self.base.diagonal(first) + (self.columns.square() @ own.unsqueeze(-1)).squeeze(-1)

    def cross_diagonal(self, other: Jacobian, variances: Tensor) -> Tensor:
        assert isinstance(other, WidenedJacobian)
        first, own = self.split_variances(variances)
        products = ((self.columns * other.columns) @ own.unsqueeze(-1)).squeeze(-1)
        return self.base.cross_diagonal(other.base, first) + products

    def kernel_matmul(self, other: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        assert isinstance(other, WidenedJacobian)
        first, _ = self.split_variances(variances)
        return self.base.kernel_matmul(other.base, rhs, first) + self.columns_matmul(other, rhs, variances)

    def columns_matmul(self, other: WidenedJacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        """Ψ S Ψ'ᵀ rhs."""
        _, own = self.split_variances(variances)
        return self.columns @ (own.unsqueeze(-1) * (other.columns.mT @ rhs))

    def gram_cost(self, other: Jacobian) -> float:
        base = other.base if isinstance(other, WidenedJacobian) else other
        pairs = len(self.x) * self.num_rows * other.num_rows
        return self.base.gram_cost(base) + 2.0 * pairs * self.columns.shape[-1]

    def product_cost(self, other: Jacobian) -> float:
        base = other.base if isinstance(other, WidenedJacobian) else other
        rows = len(self.x) * (self.num_rows + other.num_rows)
        return self.base.product_cost(base) + 2.0 * rows * self.columns.shape[-1]

    def report(self) -> list[dict[str, object]]:
        own = {"served_by": "known", "bytes": self.columns.nbytes, "gram_flops": 2.0 * self.columns.shape[-1]}
        return [*self.base.report(), {"parameter": "known features", **own}]

    def __getitem__(self, points: Tensor | slice) -> WidenedJacobian:
        by_point = self.columns.unflatten(1, (self.num_points, self.function.num_outputs))
        return WidenedJacobian(self.base[points], by_point[:, points].flatten(1, 2), self.function)


def widened_function(function: NetworkFunction, columns: Sequence[Column]) -> NetworkFunction:
    """The same function, with the known columns counted as further parameters, in groups of their own.

    For counting only: the weights of these columns are no tensors that it could be called with.
    """
    sizes = sizes_of(columns)
    new = copy.copy(function)
    new.num_groups = function.num_groups + len(sizes)
    new.group_indices = (*function.group_indices, *range(function.num_groups, new.num_groups))
    new.state = (function.state, *(column.key for column in columns))  # type: ignore[assignment]
    vars(new)["sizes"] = (*function.sizes, *sizes)
    vars(new).pop("num_parameters", None)
    return new


def plus_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """matrix + left rightᵀ, for (B, N, M), (B', N, q) and (B', M, q); in the matrix's memory where that is possible."""
    batch = max(len(matrix), len(left), len(right))
    needs_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (matrix, left, right))
    if needs_graph or len(matrix) < batch or matrix.requires_grad:
        return matrix + left @ right.mT
    return matrix.baddbmm_(left.expand(batch, -1, -1), right.expand(batch, -1, -1).mT)


class WidenedLinearization(DerivedLinearization):
    """A linearization with known columns beside its Jacobian.

    :param base: That of the network.
    :param columns: What stands beside J, in this order.
    """

    network: Any

    def __init__(self, base: Linearization, columns: Sequence[Column]):
        self.base = base
        self.columns = tuple(columns)
        self.network = _WidenedNetwork(base.network, self.columns)

    @property
    def of_network(self) -> Linearization:
        return self.base.of_network

    @property
    def autodiff(self) -> Any:  # type: ignore[override]
        return _WidenedAutodiff(self)

    @property
    def label(self) -> str:
        return f"beside {tuple(column.key for column in self.columns)}"

    def jacobian(self, x: Tensor, keep: bool = True) -> WidenedJacobian:
        return self.beside(self.base.jacobian(x, keep), keep)

    def beside(self, base: Jacobian, keep: bool) -> WidenedJacobian:
        """[J, Ψ] from J at some inputs."""
        function = widened_function(base.function, self.columns)
        if torch.is_grad_enabled() and base.x.requires_grad:
            return WidenedJacobian(base, features(self.columns, base.x), function)
        with torch.no_grad():
            if not keep:
                return WidenedJacobian(base, features(self.columns, base.x.detach()), function)
            columns = self.keep("columns", (base.x.detach(),), lambda x: features(self.columns, x))
        return WidenedJacobian(base, columns, function)

    def gram(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor, keep: bool = True) -> Tensor:
        assert isinstance(jacobian1, WidenedJacobian) and isinstance(jacobian2, WidenedJacobian)
        first, own = jacobian1.split_variances(variances)
        gram = self.base.gram(jacobian1.base, jacobian2.base, first, keep)
        with full_precision(jacobian1.x.device.type):
            return plus_product(gram, jacobian1.columns * own.unsqueeze(-2), jacobian2.columns)

    def diagonal(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor) -> Tensor:
        assert isinstance(jacobian1, WidenedJacobian) and isinstance(jacobian2, WidenedJacobian)
        first, own = jacobian1.split_variances(variances)
        diagonal = self.base.diagonal(jacobian1.base, jacobian2.base, first)
        with full_precision(jacobian1.x.device.type):
            products = (jacobian1.columns * jacobian2.columns) @ own.unsqueeze(-1)
        return diagonal + products.squeeze(-1)

    def kernel_matmul(self, jacobian1: Jacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        assert isinstance(jacobian1, WidenedJacobian) and isinstance(jacobian2, WidenedJacobian)
        first, _ = jacobian1.split_variances(variances)
        product = self.base.kernel_matmul(jacobian1.base, jacobian2.base, rhs, first)
        with full_precision(jacobian1.x.device.type):
            return product + jacobian1.columns_matmul(jacobian2, rhs, variances)

    def __deepcopy__(self, memo: dict) -> WidenedLinearization:
        new = WidenedLinearization(copy.deepcopy(self.base, memo), copy.deepcopy(self.columns, memo))
        memo[id(self)] = new
        return new


class _WidenedNetwork:
    """What a linearization's network is asked for, with the columns counted in.

    :param network: The frozen network.
    :param columns: What stands beside its Jacobian.
    """

    def __init__(self, network: FrozenNetwork, columns: tuple[Column, ...]):
        self._network = network
        self._columns = columns

    @property
    def num_groups(self) -> int:
        return self._network.num_groups + len(sizes_of(self._columns))

    def fingerprint(self) -> Hashable:
        """Also of what the columns depend on."""
        return (self._network.fingerprint(), *(column.key for column in self._columns))

    def num_outputs(self, x: Tensor) -> int:
        return self._network.num_outputs(x)


class _WidenedAutodiff:
    """The engine that serves products at inputs seen once."""

    def __init__(self, linearization: WidenedLinearization):
        self._linearization = linearization

    def linearize(self, x: Tensor, function: NetworkFunction | None = None) -> WidenedJacobian:
        base = self._linearization.base.autodiff.linearize(x, function)
        return self._linearization.beside(base, keep=False)
