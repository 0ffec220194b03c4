"""What a matrix is put together from, so that it can be formed, and differentiated, a few rows at a time.

==============  ======================================================================================
part            matrix
==============  ======================================================================================
`Numbers`       given, (*batch, N, N), with a graph of its own
`GramMatrices`  Σ_g s_g K_g: each K_g is kept from step to step, the variances s_g have the graph
`Diagonal`      diag(d)
`Multiple`      c A
`Sum`           A + B + …
`Product`       A ∘ B, entry by entry
==============  ======================================================================================

A part knows its arguments by their numbers in a list of tensors, which is what a function of autograd's is given. Every
part says how to add its rows to others, and how to pass on the cotangent of its rows: what is added up in either
direction stays in cache, and no intermediate result is as large as the matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import singledispatch

import torch
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from .._compat import constant_in
from ..jacobian.memory import empty

# Bytes of the rows that are added up at once: they stay in cache.
_BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 27}

Values = Sequence[Tensor]


def blocks_of_rows(matrix: Tensor) -> Iterator[slice]:
    """The rows of (*batch, N, N) in blocks."""
    row = max(1, matrix.element_size() * matrix.shape[:-2].numel() * matrix.shape[-1])
    step = max(1, _BLOCK_BYTES.get(matrix.device.type, 1 << 27) // row)
    return (slice(i, min(i + step, matrix.shape[-2])) for i in range(0, matrix.shape[-2], step))


class Gradients:
    """The derivatives by all arguments, added up block of rows by block.

    :param values: The arguments.
    :param wanted: By which of them derivatives are asked for.
    :param spare: Memory of the size of the matrix, whose rows may be overwritten once they were passed on.
    """

    def __init__(self, values: Values, wanted: Sequence[bool], spare: Tensor):
        self.values = values
        self.wanted = wanted
        self._spare: Tensor | None = spare
        self.found: list[Tensor | None] = [None] * len(values)

    def of(self, index: int) -> Tensor:
        """Where those by one argument are added up; zero at first."""
        found = self.found[index]
        if found is None:
            self.found[index] = found = torch.zeros_like(self.values[index], dtype=torch.float64)
        return found

    def rows_of(self, index: int) -> Tensor:
        """Where those by the entries of a matrix are put; its contents are any."""
        found = self.found[index]
        if found is None:
            value = self.values[index]
            fits = self._spare is not None and (value.dtype, value.shape) == (self._spare.dtype, self._spare.shape)
            found = self._spare if fits else empty(value.shape, like=value)
            assert found is not None
            self._spare = None if fits else self._spare
            self.found[index] = found
        return found

    def result(self) -> tuple[Tensor | None, ...]:
        """In the dtypes of the arguments; None for those that were not asked for."""
        return tuple(
            None if found is None else found.to(value.dtype)
            for found, value in zip(self.found, self.values, strict=True)
        )


class Part(ABC):
    """A matrix, (*batch, N, N), as a function of tensors."""

    @abstractmethod
    def rows(self, values: Values, rows: slice) -> Tensor:
        """Some rows, in float64, not to be written to; differentiable."""

    def add_rows(self, out: Tensor, values: Values, rows: slice, factor: Tensor | None = None) -> None:
        """Adds the same to `out`, multiplied by a factor, (*batch, 1, 1)."""
        add_multiple(out, self.rows(values, rows), factor)

    @abstractmethod
    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        """Adds to the derivatives what these rows contribute to them.

        :param cotangent: The derivative by the rows, (*batch, k, N), not to be written to.
        """

    @abstractmethod
    def arguments(self) -> tuple[int, ...]:
        """The numbers of all arguments."""

    def is_wanted(self, gradients: Gradients) -> bool:
        """Whether derivatives by any argument are asked for."""
        return any(gradients.wanted[index] for index in self.arguments())


class Numbers(Part):
    """A matrix given by its entries, in any dtype."""

    def __init__(self, index: int):
        self.index = index

    def arguments(self) -> tuple[int, ...]:
        return (self.index,)

    def rows(self, values: Values, rows: slice) -> Tensor:
        return values[self.index][..., rows, :].double()

    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        target = gradients.rows_of(self.index)[..., rows, :]
        target.copy_(cotangent.sum_to_size(target.shape))


class GramMatrices(Part):
    """A neural tangent kernel matrix.

    :param index: Of the variances, (*batch, 1, G).
    :param grams: Those of all groups with variance one, (G, N, N), or (*batch, N, N) where there is one group.
    """

    def __init__(self, index: int, grams: Tensor):
        self.index = index
        self.grams = grams

    def arguments(self) -> tuple[int, ...]:
        return (self.index,)

    def _groups(self, values: Values, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """The variance of each group, (*batch, 1, 1), and the rows of its matrix."""
        variances = values[self.index].double()
        groups = variances.shape[-1]
        for group in range(groups):
            gram = self.grams[..., rows, :] if groups == 1 else self.grams[group, rows]
            yield variances[..., group : group + 1], gram

    def rows(self, values: Values, rows: slice) -> Tensor:
        total: Tensor | None = None
        for variance, gram in self._groups(values, rows):
            total = variance * gram if total is None else torch.addcmul(total, variance, gram)
        assert total is not None
        return total

    def add_rows(self, out: Tensor, values: Values, rows: slice, factor: Tensor | None = None) -> None:
        for variance, gram in self._groups(values, rows):
            add_multiple(out, gram, variance if factor is None else variance * factor)

    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        total = gradients.of(self.index)
        for group, (_, gram) in enumerate(self._groups(gradients.values, rows)):
            product = inner_product(cotangent, gram)[..., None]
            total[..., group] += product.sum_to_size(total.shape[:-1])


class Diagonal(Part):
    """A diagonal matrix.

    :param index: Of the diagonal, (*batch, N).
    """

    def __init__(self, index: int):
        self.index = index

    def arguments(self) -> tuple[int, ...]:
        return (self.index,)

    def rows(self, values: Values, rows: slice) -> Tensor:
        return torch.diag_embed(values[self.index].double())[..., rows, :]

    def add_rows(self, out: Tensor, values: Values, rows: slice, factor: Tensor | None = None) -> None:
        entries = values[self.index].double()[..., rows]
        self._diagonal(out, rows).add_(entries if factor is None else entries * factor.squeeze(-1))

    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        target = gradients.of(self.index)[..., rows]
        target.add_(self._diagonal(cotangent, rows).sum_to_size(target.shape))

    @staticmethod
    def _diagonal(matrix: Tensor, rows: slice) -> Tensor:
        return matrix[..., :, rows].diagonal(dim1=-2, dim2=-1)


class Multiple(Part):
    """A constant times a matrix.

    :param index: Of the constant, (*batch).
    """

    def __init__(self, index: int, base: Part):
        self.index = index
        self.base = base

    def arguments(self) -> tuple[int, ...]:
        return (self.index, *self.base.arguments())

    def _constant(self, values: Values) -> Tensor:
        constant = values[self.index].double()
        return constant.reshape(1, 1) if constant.numel() == 1 else constant[..., None, None]

    def rows(self, values: Values, rows: slice) -> Tensor:
        return self._constant(values) * self.base.rows(values, rows)

    def add_rows(self, out: Tensor, values: Values, rows: slice, factor: Tensor | None = None) -> None:
        constant = self._constant(values)
        self.base.add_rows(out, values, rows, constant if factor is None else constant * factor)

    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        if gradients.wanted[self.index]:
            total = gradients.of(self.index)
            product = inner_product(cotangent, self.base.rows(gradients.values, rows))
            total += product.sum() if total.numel() == 1 else product.sum_to_size(total.shape)
        if self.base.is_wanted(gradients):
            self.base.pass_on(cotangent * self._constant(gradients.values), rows, gradients)


class Sum(Part):
    """The sum of some matrices."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts

    def arguments(self) -> tuple[int, ...]:
        return tuple(index for part in self.parts for index in part.arguments())

    def rows(self, values: Values, rows: slice) -> Tensor:
        first, *others = (part.rows(values, rows) for part in self.parts)
        return sum(others, start=first)

    def add_rows(self, out: Tensor, values: Values, rows: slice, factor: Tensor | None = None) -> None:
        for part in self.parts:
            part.add_rows(out, values, rows, factor)

    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        for part in self.parts:
            if part.is_wanted(gradients):
                part.pass_on(cotangent, rows, gradients)


class Product(Part):
    """The product, entry by entry, of two matrices."""

    def __init__(self, left: Part, right: Part):
        self.left = left
        self.right = right

    def arguments(self) -> tuple[int, ...]:
        return (*self.left.arguments(), *self.right.arguments())

    def rows(self, values: Values, rows: slice) -> Tensor:
        return self.left.rows(values, rows) * self.right.rows(values, rows)

    def pass_on(self, cotangent: Tensor, rows: slice, gradients: Gradients) -> None:
        for part, other in ((self.left, self.right), (self.right, self.left)):
            if part.is_wanted(gradients):
                part.pass_on(cotangent * other.rows(gradients.values, rows), rows, gradients)


class Arguments:
    """The tensors that the parts of a matrix are functions of, in the order of their numbers."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def add(self, tensor: Tensor) -> int:
        """The number that it has from here on."""
        self.tensors.append(tensor)
        return len(self.tensors) - 1


@singledispatch
def part_of(matrix: LinearOperator, arguments: Arguments) -> Part:
    """What a matrix is put together from; operators of another form register here what they are.

    :param matrix: (*batch, N, N).
    :param arguments: Takes what it is a function of.
    """
    evaluated = matrix.evaluate_kernel()
    if type(evaluated) is not type(matrix):
        return part_of(evaluated, arguments)
    return Numbers(arguments.add(evaluated.to_dense()))


@part_of.register
def _of_numbers(matrix: DenseLinearOperator, arguments: Arguments) -> Part:
    return Numbers(arguments.add(matrix.tensor))


@part_of.register
def _of_sum(matrix: SumLinearOperator, arguments: Arguments) -> Part:
    return Sum([part_of(part, arguments) for part in matrix.linear_ops])


@part_of.register
def _of_multiple(matrix: ConstantMulLinearOperator, arguments: Arguments) -> Part:
    return Multiple(arguments.add(constant_in(matrix)), part_of(matrix.base_linear_op, arguments))


@part_of.register
def _of_diagonal(matrix: DiagLinearOperator, arguments: Arguments) -> Part:
    return Diagonal(arguments.add(matrix._diagonal()))


def add_multiple(out: Tensor, matrix: Tensor, factor: Tensor | None) -> None:
    """Adds a matrix, (*batch, k, N), to another in place, multiplied by a factor, (*batch, 1, 1)."""
    if factor is None:
        out.add_(matrix)
    elif factor.numel() == 1:
        out.add_(matrix, alpha=float(factor))
    else:
        out.addcmul_(matrix, factor)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """The sum of the products of all entries of two matrices, (*batch)."""
    if left.dim() == right.dim() == 2 and left.is_contiguous() and right.is_contiguous():
        return torch.dot(left.view(-1), right.view(-1))
    return (left * right).sum((-2, -1))
