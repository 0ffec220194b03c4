r"""A matrix of parameters that multiplies an input at each position: :math:`z_{t} = W a_{t} + b`."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ...replacements.onednn import matmul
from .base import Term, cached_elements, inner, once, split_points
from .features import FeatureTerm
from .view import ParameterView

Self = TypeVar("Self", bound="MatrixTerm")

# Columns of a product that is efficient.
_MIN_WIDTH = 128
# A matrix whose per-point gradients are hardly wider than its two factors is kept as them: one product in place of two.
_DENSE_MARGIN = 16


class MatrixTerm(Term):
    r"""Row (i, c) of the Jacobian is :math:`\sum_t g_{ict} \otimes a_{it}`, in each of H independent blocks.

    A bias that was used together with the matrix is its last column, and the inputs' last entry then is 1.

    :param weight: The matrix, (H, d_out, d_in), or None where only the bias is selected.
    :param bias: The bias, (H, d_out), or None.
    :param inputs: a, (B, n, T, H, d_in) without the 1.
    :param gradients: g, (B, n, C, T, H, d_out).
    """

    tensors: tuple[str, ...] = ("inputs", "gradients")
    of_each_output = ("gradients",)

    def __init__(self, weight: ParameterView, bias: ParameterView | None, inputs: Tensor, gradients: Tensor):
        self.weight = weight
        self.bias = bias
        self.inputs = inputs if bias is None else torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        self.gradients = gradients

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def check(self, n: int, outputs: int) -> None:
        heads, d_out, _ = self.weight.shape
        positions = self.num_positions
        self._expect(
            inputs=(self.inputs.shape[1:], (n, positions, heads, self.num_columns)),
            gradients=(self.gradients.shape[1:], (n, outputs, positions, heads, d_out)),
            biases=((heads, d_out) if self.bias is None else self.bias.shape, (heads, d_out)),
        )

    @property
    def num_columns(self) -> int:
        """d_in, and 1 for the bias."""
        return self.weight.shape[-1] + (self.bias is not None)

    @property
    def num_positions(self) -> int:
        return self.gradients.shape[3]

    def inputs_at(self, points: slice) -> Tensor:
        """a with the bias' 1: (B, m, T, H, columns)."""
        return self.inputs[:, points]

    def read(self, tangents: Tensor) -> Tensor:
        """The matrix's part of parameter vectors, bias included: (B or 1, r, H, d_out, columns)."""
        matrix = self.weight.read(tangents)
        return matrix if self.bias is None else torch.cat([matrix, self.bias.read(tangents).unsqueeze(-1)], dim=-1)

    def add_to(self, flat: Tensor, matrix: Tensor) -> None:
        """Adds (..., H, d_out, columns) to parameter vectors (..., P)."""
        if self.bias is None:
            self.weight.add_to(flat, matrix)
        else:
            self.weight.add_to(flat, matrix[..., :-1])
            self.bias.add_to(flat, matrix[..., -1])

    def column_variances(self, variances: Tensor) -> Tensor:
        """(L, G) to one variance per column, (L, columns)."""
        matrix = variances[:, self.weight.group, None].expand(-1, self.weight.shape[-1])
        return matrix if self.bias is None else torch.cat([matrix, variances[:, self.bias.group, None]], dim=-1)

    def jvp(self, tangents: Tensor) -> Tensor:
        matrix = self.read(tangents)
        blocks = []
        for vectors, slices in self._blocks(matrix.shape[1], tangents.device):
            pieces = [self._jvp_at(points, matrix[:, vectors]) for points in slices]
            blocks.append(join(pieces, dim=2))
        return join(blocks, dim=1)

    def _jvp_at(self, points: slice, matrix: Tensor) -> Tensor:
        """⟨g ⊗ a, W⟩ at some points for W (B or 1, r, H, d_out, columns): (B, r, m, C)."""
        a, g = self.inputs_at(points), self.gradients[:, points]
        if self._is_wide:
            z = matmul(g[:, :, 0].flatten(1, 3), matrix[:, :, 0].transpose(1, 2).flatten(2))  # (B, m·T, r·columns)
            z = z.unflatten(-1, (-1, a.shape[-1])).unflatten(1, a.shape[1:3])
            return z.mul_(a).sum((2, 4)).transpose(1, 2).unsqueeze(-1)
        left = a.permute(0, 3, 1, 2, 4)  # (B, H, m, T, columns)
        right = matrix.permute(0, 2, 4, 1, 3).flatten(-2)  # (B or 1, H, columns, r·d_out)
        z = matmul(left.flatten(2, 3), right).unflatten(2, left.shape[2:4])
        return _contract_outputs(z.unflatten(-1, (-1, g.shape[-1])), g)

    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        for vectors, slices in self._blocks(cotangents.shape[1], cotangents.device):
            total: Tensor | None = None
            for points in slices:
                part = self._vjp_at(points, cotangents[:, vectors, points])
                total = part if total is None else total.add_(part)
            assert total is not None
            self.add_to(out[:, vectors], total)

    def _vjp_at(self, points: slice, cotangents: Tensor) -> Tensor:
        """Σ v g ⊗ a over some points for v (B, r, m, C): (B, r, H, d_out, columns)."""
        a, g = self.inputs_at(points), self.gradients[:, points]
        r = cotangents.shape[1]
        if self._is_wide:
            left = a[:, None, :, :, 0] * cotangents.unsqueeze(-1)  # (B, r, m, T, columns)
            left = left.flatten(2, 3).mT.flatten(1, 2)
            return matmul(left, g[:, :, 0].flatten(1, 3)).unflatten(1, (r, -1)).mT.unsqueeze(2)
        left = self._weighed(cotangents, g)
        return matmul(left, a.permute(0, 3, 1, 2, 4).flatten(2, 3)).unflatten(2, (r, -1)).transpose(1, 2)

    @property
    def _is_wide(self) -> bool:
        """Whether the gradients, for one output and one block, are wider than the inputs: it is them to multiply by W
        then, and what has to be multiplied element by element is small."""
        _, _, outputs, _, heads, d_out = self.gradients.shape
        return outputs == heads == 1 and self.num_columns < d_out

    def _blocks(self, r: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
        """Slices of vectors, and for each those of points, whose products stay in cache.

        As few vectors as make a product wide enough to be efficient: that leaves long slices of points.
        """
        batch, n, _, positions, heads, d_out = self.gradients.shape
        per_point = batch * positions * heads * d_out
        at_once = max(1, _MIN_WIDTH // d_out, cached_elements(device) // max(1, n * per_point))
        for start in range(0, r, at_once):
            count = min(at_once, r - start)
            yield slice(start, start + count), list(split_points(n, count * per_point, device))

    @staticmethod
    def _weighed(cotangents: Tensor, gradients: Tensor) -> Tensor:
        """Σ_c v_c g_c for cotangents (B, r, m, C): (B, H, r·d_out, m·T), for a product without a copy if C = H = 1."""
        batch, m, outputs, _, heads, _ = gradients.shape
        if outputs == 1 and heads == 1:
            v = cotangents.transpose(1, 2).reshape(batch, m, 1, -1, 1)
            return (v * gradients[:, :, 0]).flatten(3).flatten(1, 2).mT.unsqueeze(1)
        left = weigh_outputs(cotangents, gradients)  # (B, r, m, T, H, d_out)
        return left.permute(0, 4, 1, 5, 2, 3).flatten(4, 5).flatten(2, 3)

    @property
    def _gradient_elements(self) -> int:
        """Elements of what is put together for the gradients of one point."""
        _, _, outputs, _, heads, d_out = self.gradients.shape
        return outputs * heads * d_out * self.num_columns

    def gradient_rows(self, points: slice, heads: slice = slice(None), outputs: slice = slice(None)) -> Tensor:
        """Per-point gradients: (B, m, C, H, d_out, columns), for some of the heads and rows of the matrix."""
        g = self.gradients[:, points, :, :, heads, outputs]
        a = self.inputs_at(points)[:, :, :, heads]
        if self.num_positions == 1:
            return g[:, :, :, 0].unsqueeze(-1) * a[:, :, 0].unsqueeze(2).unsqueeze(-2)
        batch, m, count, positions, h, d_out = g.shape
        left = g.permute(0, 1, 4, 2, 5, 3).reshape(batch * m * h, count * d_out, positions)
        right = a.permute(0, 1, 3, 2, 4).reshape(batch * m * h, positions, a.shape[-1])
        rows = torch.bmm(left, right).reshape(batch, m, h, count, d_out, a.shape[-1])
        return rows.transpose(2, 3)

    def add_rows(self, out: Tensor) -> None:
        self.add_to(out, self.gradient_rows(slice(None)))

    def cross_diagonal(self, other: Term, variances: Tensor) -> Tensor:
        assert isinstance(other, MatrixTerm)
        if self.bias is None or self.bias.group == self.weight.group:
            return self._cross_diagonal(other, None) * variances[:, self.weight.group, None, None]
        return self._cross_diagonal(other, self.column_variances(variances))

    def _cross_diagonal(self, other: MatrixTerm, scale: Tensor | None) -> Tensor:
        """The inner products of rows, with variances of the matrix's columns, (L, columns), or without."""
        batch, n, outputs, positions, heads, d_out = self.gradients.shape
        if positions == 1 or positions * (self.num_columns + d_out) <= d_out * self.num_columns:
            by, per_point = self._cross_diagonal_by_positions, outputs * heads * positions**2
        else:
            by, per_point = self._cross_diagonal_by_rows, self._gradient_elements
        slices = split_points(n, batch * per_point, self.gradients.device)
        return torch.cat([by(other, points, scale) for points in slices], dim=1)

    def _cross_diagonal_by_positions(self, other: MatrixTerm, points: slice, scale: Tensor | None) -> Tensor:
        a, g = once(self.inputs_at(points)), self.gradients[:, points]
        other_a, other_g = (a, g) if other is self else (once(other.inputs_at(points)), other.gradients[:, points])
        a = a if scale is None else a * scale[:, None, None, None]
        if self.num_positions == 1:
            return (inner(a, other_a).unsqueeze(2) * inner(g, other_g)).sum((-1, -2))
        a = torch.einsum("bnthi,bnshi->bnhts", a, other_a)
        g = torch.einsum("bnctho,bncsho->bnchts", g, other_g)
        return (a.unsqueeze(2) * g).sum((-1, -2, -3))

    def _cross_diagonal_by_rows(self, other: MatrixTerm, points: slice, scale: Tensor | None) -> Tensor:
        rows = self.gradient_rows(points)
        other_rows = rows if other is self else other.gradient_rows(points)
        rows = rows if scale is None else rows * scale[:, None, None, None, None]
        return inner(rows, other_rows).sum((-1, -2))

    @property
    def is_factored(self) -> bool:
        """Whether pairs of positions, whose inputs all outputs share, cost less than per-point gradients."""
        return self.num_positions == 1 or self._cost_of_positions() <= self._cost_of_gradients()

    @property
    def num_products(self) -> int:
        return self.num_positions * self.gradients.shape[4] if self.is_factored else 0

    def pairs(self) -> Iterator[tuple[int, int]]:
        heads = self.gradients.shape[4]
        for k in range(self.num_products):
            for t in range(self.num_positions):
                yield k, t * heads + k % heads

    def factors(self, points: slice, variances: Tensor | None = None) -> list[tuple[Tensor | None, Tensor]]:
        a, g = once(self.inputs_at(points)), self.gradients[:, points]
        scale = None if variances is None else self.column_variances(variances).unsqueeze(-2)
        factors: list[tuple[Tensor | None, Tensor]] = []
        for k in range(self.num_products):
            position, head = divmod(k, g.shape[4])
            factor = a[:, :, position, head]
            output_factor = g[:, :, :, position, head].transpose(1, 2).flatten(1, 2)
            factors.append((factor if scale is None else factor * scale, output_factor))
        return factors

    def compact(self) -> Term:
        heads, d_out, _ = self.weight.shape
        columns = self.num_columns
        if self.num_positions > 1 or heads * d_out * columns > heads * (d_out + columns) + _DENSE_MARGIN:
            return self
        rows = self._all_rows()  # (B, n, C, H, d_out, columns)
        if self.bias is None or heads * d_out == 1:  # the columns are in the parameters' order
            return FeatureTerm(self.views, rows.flatten(3))
        parts = [rows[..., :-1].flatten(3), rows[..., -1].flatten(3)]
        return FeatureTerm([self.weight, self.bias], torch.cat(parts, dim=-1))

    def _all_rows(self) -> Tensor:
        """The per-point gradients of all points; where every g is the number one, they are the inputs themselves."""
        if self.gradients.shape[2:] == (1, 1, 1, 1) and bool((self.gradients == 1).all()):
            return self.inputs.unsqueeze(3)
        return self.gradient_rows(slice(None))

    # For matrices that are computed from parameters

    def moved(self: Self, weight: ParameterView) -> Self:
        """The same for a matrix at another place."""
        new = copy.copy(self)
        new.weight = weight
        return new

    def with_bias(self: Self, bias: ParameterView | None) -> Self:
        """The matrix together with another bias, or with none."""
        new = copy.copy(self)
        new.inputs = self.inputs if self.bias is None else self.inputs[..., :-1]
        if bias is not None:
            new.inputs = torch.cat([new.inputs, torch.ones_like(new.inputs[..., :1])], dim=-1)
        new.bias = bias
        return new

    def bias_term(self) -> FeatureTerm:
        """The bias without the matrix."""
        assert self.bias is not None
        return FeatureTerm([self.bias], self.gradients.sum(3).flatten(3))

    def scaled(self: Self, number: Tensor | float) -> Self:
        """Of a matrix that is multiplied by a number before it is used; without a bias."""
        new = copy.copy(self)
        new.inputs = self.inputs * number
        return new

    def scaled_rows(self: Self, factors: Tensor) -> Self:
        """The same where each row, of H·d_out, has its own number."""
        new = copy.copy(self)
        new.gradients = self.gradients * factors.reshape(self.weight.shape[:2])
        return new

    def scaled_columns(self: Self, factors: Tensor) -> Self | None:
        """The same where each column, (H, d_in), has its own number; None where inputs do not follow the columns."""
        new = copy.copy(self)
        new.inputs = self.inputs * factors
        return new

    def row_products(self, matrix: Tensor) -> Tensor:
        """The inner products of each row of the per-point gradients with the same row of a matrix, (H·d_out, d_in):
        (B, n, C, H·d_out)."""
        matrix = matrix.reshape(self.weight.shape)
        pieces = []
        for points in split_points(len(self.gradients[0]), self.gradients[:, 0].numel(), matrix.device):
            g = self.gradients[:, points]
            a = self.inputs_at(points)[..., : matrix.shape[-1]]
            left = a.permute(3, 0, 1, 2, 4)  # (H, B, m, T, d_in)
            z = matmul(left.flatten(1, 3), matrix.mT).unflatten(1, left.shape[1:4]).movedim(0, 3)
            pieces.append((z.unsqueeze(2) * g).sum(3).flatten(3))
        return torch.cat(pieces, dim=1)

    def factors_of_product(self, left: Tensor, right: Tensor) -> tuple[MatrixTerm, MatrixTerm]:
        """Where the matrix is a product, (d_out, r) and (r, d_in), of two: what multiplies each of these.

        Their views are this matrix', for :meth:`moved`; of one block, without a bias.
        """
        first, second = copy.copy(self), copy.copy(self)
        first.inputs = matmul(self.inputs, right.mT)
        second.gradients = matmul(self.gradients, left)
        return first, second

    def columns(self, max_columns: int, variances: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        _, _, _, _, heads, d_out = self.gradients.shape
        per_head = max(1, max_columns // (d_out * self.num_columns))
        per_row = d_out if per_head > 1 or heads > 1 else max(1, max_columns // self.num_columns)
        scale = self.column_variances(variances)
        for h in range(0, heads, per_head):
            for o in range(0, d_out, per_row):
                rows = self.gradient_rows(slice(None), slice(h, h + per_head), slice(o, o + per_row))
                yield rows.flatten(3).flatten(1, 2), scale.repeat(1, rows.shape[3] * rows.shape[4])

    def gram_cost(self) -> float:
        return self._cost_of_positions() if self.is_factored else self._cost_of_gradients()

    def _cost_of_positions(self) -> float:
        """Of one pair of points, each pair of positions by itself: products of inputs and of gradients, and of both."""
        outputs, (heads, d_out, _) = self._num_outputs, self.weight.shape
        return 2.0 * self.num_positions**2 * heads * (self.num_columns + outputs**2 * (d_out + 8))

    def _cost_of_gradients(self) -> float:
        """Of one pair of points, from their gradients."""
        heads, d_out, _ = self.weight.shape
        return 2.0 * self._num_outputs**2 * heads * d_out * self.num_columns

    @property
    def _num_outputs(self) -> int:
        """C."""
        return self.gradients.shape[2]

    def gradient_cost(self) -> float:
        outputs, positions, heads, d_out = self.gradients.shape[2:]
        return 2.0 * outputs * positions * heads * d_out * self.num_columns

    def product_cost(self) -> float:
        outputs, positions, heads, d_out = self.gradients.shape[2:]
        return 2.0 * positions * heads * d_out * (self.num_columns + 2 * outputs)

    def merge(self, others: Sequence[Term]) -> MatrixTerm:
        """Other uses of the same matrix are more positions."""
        new = copy.copy(self)
        for name, dim in (("inputs", 2), ("gradients", 3)):
            setattr(new, name, torch.cat([getattr(term, name) for term in (self, *others)], dim=dim))
        return new

    def key(self) -> Hashable:
        return ("matrix", self.views)


def join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _contract_outputs(z: Tensor, gradients: Tensor) -> Tensor:
    """⟨g, z⟩ over positions, heads and outputs: (B, H, m, T, r, d_out) with (B, m, C, T, H, d_out) to (B, r, m, C)."""
    if gradients.shape[2] == 1:
        g = gradients[:, :, 0].permute(0, 3, 1, 2, 4).unsqueeze(4)
        return z.mul_(g).sum((1, 3, 5)).transpose(1, 2).unsqueeze(-1)
    left = z.permute(0, 2, 4, 3, 1, 5).flatten(3)  # (B, m, r, T·H·d_out)
    return (left @ gradients.flatten(3).mT).transpose(1, 2)


def weigh_outputs(cotangents: Tensor, gradients: Tensor) -> Tensor:
    """Σ_c v_c g_c: (B, r, m, C) with (B, m, C, …) to (B, r, m, …)."""
    if gradients.shape[2] == 1:
        return cotangents.reshape(*cotangents.shape[:3], *[1] * (gradients.dim() - 3)) * gradients[:, None, :, 0]
    weighed = cotangents.transpose(1, 2) @ gradients.flatten(3)
    return weighed.transpose(1, 2).unflatten(-1, gradients.shape[3:])
