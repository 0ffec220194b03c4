"""Jacobians as sums of terms, whose factors are held in memory."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from ...network import NetworkFunction
from ..base import Jacobian
from ..terms import FeatureTerm, Term
from .blocks import add_products, blocks, points_formed, rows_of_blocks
from .gram import Gram, is_tiled


class StructuredJacobian(Jacobian):
    """J(X) = the terms' columns, and those of the parameters that no rule serves.

    :param function: The network function.
    :param x: The inputs, (B, n, d).
    :param terms: Blocks without cross terms between them.
    :param rest: The Jacobian of the other parameters, with these as its function's only parameters.
    :param labels: For each served parameter, by which rules.
    :param values: f at the inputs, (B, n, C), where the pass that recorded the network gave them.
    """

    def __init__(
        self,
        function: NetworkFunction,
        x: Tensor,
        terms: list[Term],
        rest: Jacobian | None,
        labels: Mapping[str, str],
        values: Tensor | None = None,
    ):
        super().__init__(function, x)
        self.values = values
        self.terms = terms
        self.rest = rest
        self.labels = labels

    @property
    def nbytes(self) -> int:
        others = (0 if part is None else part.nbytes for part in (self.rest, self.values))
        return sum(term.nbytes + term.shared_nbytes for term in self.terms) + sum(others)

    def __getitem__(self, points: Tensor | slice) -> StructuredJacobian:
        terms = [term.map(lambda t: t[:, points]) for term in self.terms]
        rest = None if self.rest is None else self.rest[points]
        values = None if self.values is None else self.values[:, points]
        return StructuredJacobian(self.function, self.x[:, points], terms, rest, self.labels, values)

    def jvp(self, tangents: Tensor) -> Tensor:
        if len(self.x) == 1 and len(tangents) > 1:  # one batch of points: all vectors go through one product
            return self.jvp(tangents.flatten(0, 1).unsqueeze(0))[0].unflatten(0, tangents.shape[:2])
        batch = max(self.x.shape[0], tangents.shape[0])
        shape = (batch, tangents.shape[1], self.num_points, self.function.num_outputs)
        out = _sum(term.jvp(tangents) for term in self.terms) if tangents.shape[1] else None
        out = tangents.new_zeros(shape) if out is None else out
        out = out.reshape(*shape[:2], self.num_rows)
        return out if self.rest is None else out + self.rest.jvp(self._take_rest(tangents))

    def vjp(self, cotangents: Tensor) -> Tensor:
        if len(self.x) == 1 and len(cotangents) > 1:
            return self.vjp(cotangents.flatten(0, 1).unsqueeze(0))[0].unflatten(0, cotangents.shape[:2])
        batch = max(self.x.shape[0], cotangents.shape[0])
        out = cotangents.new_zeros(batch, cotangents.shape[1], self.function.num_parameters)
        if self.num_rows and cotangents.shape[1]:
            split = cotangents.expand(batch, -1, -1).unflatten(-1, (self.num_points, self.function.num_outputs))
            for term in self.terms:
                term.vjp(split, out)
        if self.rest is not None:
            self._put_rest(out, self.rest.vjp(cotangents))
        return out

    def rows(self) -> Tensor:
        outputs = self.function.num_outputs
        only = self.terms[0] if len(self.terms) == 1 and self.rest is None else None
        if isinstance(only, FeatureTerm) and only.is_whole(self.function.num_parameters):
            return only.features.flatten(1, 2)
        out = self.x.new_zeros(self.x.shape[0], self.num_points, outputs, self.function.num_parameters)
        if self.num_rows:
            for term in self.terms:
                term.add_rows(out)
        out = out.flatten(1, 2)
        if self.rest is not None:
            self._put_rest(out, self.rest.rows())
        return out

    @torch.no_grad()
    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        if not isinstance(other, StructuredJacobian):
            return other.gram(self, variances).mT
        if not self._matches(other):
            return self._gram_by_rows(other, variances)
        shape = self._gram_shape(other)
        if min(shape[:3]) == 0 or not self.terms:
            out = variances.new_zeros(max(shape[0], len(variances)), self.num_rows, other.num_rows)
        else:
            out = self._gram(other, variances).dense()
        if self.rest is not None and out.numel():
            assert other.rest is not None
            out += self.rest.gram(self.rest if other is self else other.rest, variances)
        return out

    def _gram(self, other: StructuredJacobian, variances: Tensor) -> Gram:
        batch = self._gram_shape(other)[0]
        left, right = self._expanded(batch), other._expanded(batch)
        return Gram(left, left if other is self else right, variances, self._gram_shape(other))

    def _expanded(self, batch: int) -> list[Term]:
        if self.x.shape[0] == batch:
            return self.terms
        return [term.map(lambda t: t.expand(batch, *t.shape[1:])) for term in self.terms]

    def _gram_shape(self, other: Jacobian) -> tuple[int, int, int, int]:
        batch = max(self.x.shape[0], other.x.shape[0])
        return batch, self.num_points, other.num_points, self.function.num_outputs

    def _matches(self, other: StructuredJacobian) -> bool:
        """Whether the two consist of the same terms."""
        if (self.rest is None) != (other.rest is None):
            return False
        if self.rest is not None and other.rest is not None:  # noqa: SIM102
            if list(self.rest.function.parameters) != list(other.rest.function.parameters):
                return False
        return self._keys == other._keys

    @cached_property
    def _keys(self) -> list[Hashable]:
        return [term.key() for term in self.terms]

    def _gram_by_rows(self, other: Jacobian, variances: Tensor) -> Tensor:
        """For Jacobians of a network that does different things at the two sets of inputs."""
        size = other.points_per_block()
        expanded = self.function.expand_variances(variances)
        blocks = []
        for start in range(0, other.num_points, size):
            rows = other[slice(start, start + size)].rows()
            if len(variances) in (1, max(len(rows), self.x.shape[0])):
                blocks.append(self.jvp(rows * expanded.unsqueeze(-2)).mT)
            else:
                blocks.append(torch.cat([self.jvp(rows * weight).mT for weight in expanded]))
        batch = max(self.x.shape[0], other.x.shape[0], len(variances))
        return torch.cat(blocks, dim=-1) if blocks else variances.new_zeros(batch, self.num_rows, 0)

    def diagonal(self, variances: Tensor) -> Tensor:
        out = self._cross_diagonal(self, variances)
        return out if self.rest is None else out + self.rest.diagonal(variances)

    def cross_diagonal(self, other: Jacobian, variances: Tensor) -> Tensor:
        if not (isinstance(other, StructuredJacobian) and self._matches(other)):
            return super().cross_diagonal(other, variances)
        out = self._cross_diagonal(other, variances)
        if self.rest is None:
            return out
        assert other.rest is not None
        return out + self.rest.cross_diagonal(other.rest, variances)

    @torch.no_grad()
    def _cross_diagonal(self, other: StructuredJacobian, variances: Tensor) -> Tensor:
        batch = self._gram_shape(other)[0]
        results = max(batch, len(variances))
        if not self.num_rows or not self.terms:
            return variances.new_zeros(results, self.num_rows)
        if len(variances) in (1, batch):
            left, right = self._expanded(batch), other._expanded(batch)
            right = left if other is self else right
            total = _sum(a.cross_diagonal(b, variances) for a, b in zip(left, right, strict=True))
            assert total is not None
            return total.reshape(results, self.num_rows)
        eye = torch.eye(variances.shape[1], dtype=variances.dtype, device=variances.device)
        parts = torch.cat([self._cross_diagonal(other, row[None]) for row in eye])
        return variances @ parts

    def kernel_matmul(self, other: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        needs_gradient = torch.is_grad_enabled() and (rhs.requires_grad or variances.requires_grad)
        if needs_gradient or not isinstance(other, StructuredJacobian) or not self._matches(other):
            return super().kernel_matmul(other, rhs, variances)
        formed = self._formed(other, rhs.shape[-1])
        with torch.no_grad():
            parts = [self._formed_matmul(other, rhs, variances, formed)] if formed else []
            if self.rest is not None:
                rest = self.rest if other is self else other.rest
                assert rest is not None
                parts.append(self.rest.kernel_matmul(rest, rhs, variances))
            if len(formed) < len(self.terms) or not parts:
                others = [i for i in range(len(self.terms)) if i not in set(formed)]
                left, right = self._only(others), other._only(others)
                parts.append(super(StructuredJacobian, left).kernel_matmul(right, rhs, variances))
        first, *more = parts
        return sum(more, start=first)

    def _formed(self, other: Jacobian, columns: int) -> list[int]:
        """The terms whose part of the Gram matrix is cheaper to form than so many columns are to multiply."""
        by_columns = columns * len(self.x) * (self.num_points + other.num_points)
        forming = self._forming_costs(other)
        return [i for i, term in enumerate(self.terms) if forming[i] < by_columns * term.product_cost()]

    def _forming_costs(self, other: Jacobian) -> list[float]:
        """About how many flops each term's part of the Gram matrix takes, in blocks that there is memory for."""
        batch, n, m, _ = self._gram_shape(other)
        pairs = batch * n * m * (0.5 if other is self else 1.0)
        formed = batch * points_formed(self, other, rows_of_blocks(self, other, batch)) if n else 0.0
        return [
            pairs * term.gram_cost() + (0.0 if is_tiled(term) else formed * term.gradient_cost()) for term in self.terms
        ]

    def _formed_matmul(self, other: StructuredJacobian, rhs: Tensor, variances: Tensor, terms: list[int]) -> Tensor:
        left = self._only(terms)
        right = left if other is self else other._only(terms)
        if all(is_tiled(term) for term in left.terms):
            return left._gram(right, variances).matmul(rhs)
        results = self._results(other, rhs, variances)
        height = rows_of_blocks(left, right, results)
        out = rhs.new_zeros(results, self.num_rows, rhs.shape[-1])
        return add_products(out, blocks(left, right, variances, height), rhs, symmetric=left is right)

    def _only(self, terms: list[int]) -> StructuredJacobian:
        """Some terms, without the rest."""
        return StructuredJacobian(self.function, self.x, [self.terms[i] for i in terms], None, self.labels)

    def gram_cost(self, other: Jacobian) -> float:
        own = sum(self._forming_costs(other))
        rest = 0.0
        if self.rest is not None:
            rest = self.rest.gram_cost(self.rest if other is self else getattr(other, "rest", None) or other)
        return own + rest

    def product_cost(self, other: Jacobian) -> float:
        points = self.x.shape[0] * (self.num_points + other.num_points)
        rest = 0.0 if self.rest is None else self.rest.product_cost(getattr(other, "rest", None) or other)
        costs = zip(self._forming_costs(other), self.terms, strict=True)
        return rest + sum(min(forming, points * term.product_cost()) for forming, term in costs)

    def report(self) -> list[dict]:
        """For each parameter: how it is served, the bytes of its factors, and flops per entry of a Gram matrix."""
        entries: dict[str, dict] = {
            name: {"parameter": name, "served_by": self.labels.get(name, "unused"), "bytes": 0, "gram_flops": 0.0}
            for name in self.function.parameters
        }
        squared = self.function.num_outputs**2
        for term in self.terms:
            total = sum(view.numel() for view in term.views)
            for view in term.views:
                share = view.numel() / total
                entries[view.name]["bytes"] += int(share * term.nbytes)
                entries[view.name]["gram_flops"] += share * term.gram_cost() / squared
        if self.rest is not None:
            for name, tensor in self.rest.function.parameters.items():
                entries[name] |= {"served_by": "autodiff", "gram_flops": 2.0 * tensor.numel()}
        return list(entries.values())

    def _rest_slices(self) -> Iterator[tuple[slice, slice]]:
        """Where each of the other parameters is in the whole vector, and in the vector of the others."""
        assert self.rest is not None
        start = rest_start = 0
        for name, size in zip(self.function.parameters, self.function.sizes, strict=True):
            if name in self.rest.function.parameters:
                yield slice(start, start + size), slice(rest_start, rest_start + size)
                rest_start += size
            start += size

    def _take_rest(self, vectors: Tensor) -> Tensor:
        return torch.cat([vectors[..., whole] for whole, _ in self._rest_slices()], dim=-1)

    def _put_rest(self, out: Tensor, vectors: Tensor) -> None:
        for whole, part in self._rest_slices():
            out[..., whole] = vectors[..., part]


def _sum(tensors: Iterator[Tensor]) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return total
