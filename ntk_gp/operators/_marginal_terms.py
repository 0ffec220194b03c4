"""The two terms of a marginal likelihood of a matrix that is put together from parts, with their derivatives."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.warnings import NumericalWarning
from torch import Size, Tensor

from ..jacobian.memory import empty
from ..solvers.cholesky import cholesky_solve, factorise_in_place, invert_in_place
from ._parts import Arguments, Gradients, GramMatrices, Part, Sum, Values, blocks_of_rows, part_of


class Assembly:
    """A matrix A, formed from its parts in one piece of memory, and factorised there.

    :param part: What A is put together from; `values`, everywhere, are those of its arguments.
    :param shape: (*batch, N, N).
    :param jitter: What is added to the diagonal where A cannot be factorised without, see `psd_safe_cholesky`.
    """

    def __init__(self, part: Part, shape: Size, jitter: float):
        self.part = part
        self.shape = shape
        self.jitter = jitter

    @classmethod
    def of(cls, matrix: LinearOperator, jitter: float) -> tuple[Assembly, list[Tensor]]:
        """That of an operator, and the tensors that it is a function of, with their graphs."""
        arguments = Arguments()
        return cls(part_of(matrix, arguments), matrix.shape, jitter), arguments.tensors

    def dense(self, values: Values) -> Tensor:
        """A in float64, in memory of its own, without a graph."""
        out = empty(self.shape, like=values[0].new_empty(0, dtype=torch.float64))
        for rows in blocks_of_rows(out):
            block = out[..., rows, :]
            block.zero_()
            self.part.add_rows(block, values, rows)
        return out

    def differentiable(self, values: Values) -> Tensor:
        """A in float64 with its graph."""
        return self.part.rows(values, slice(0, self.shape[-2])).expand(self.shape)

    @property
    def keeps_grams(self) -> bool:
        """Whether A is a sum with a neural tangent kernel's matrix whose Gram matrices are kept."""
        return isinstance(self.part, Sum) and any(isinstance(part, GramMatrices) for part in self.part.parts)

    def positive_factor(self, values: Values) -> Tensor | None:
        """The Cholesky factor L of A, without a graph, if it has one."""
        factor, info = factorise_in_place(self.dense(values))
        return None if info.any() else factor

    def factor(self, values: Values) -> tuple[Tensor, Tensor]:
        """The Cholesky factor L of A, without a graph, and the largest entry of A's diagonal."""
        matrix = self.dense(values)
        largest = matrix.diagonal(dim1=-2, dim2=-1).amax()
        factor, info = factorise_in_place(matrix)
        if info.any():  # the matrix is gone: once more
            factor = psd_safe_cholesky(self.dense(values), jitter=self.jitter)
        return factor, largest


def in_double(matrix: LinearOperator) -> Tensor:
    """A matrix, (*batch, M, N), in float64, neural tangent kernels evaluated in it; with its graph where it has one."""
    assembly, tensors = Assembly.of(matrix, 0.0)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return assembly.differentiable(tensors)
    return assembly.dense(tensors)


def exact_terms(
    assembly: Assembly, tensors: list[Tensor], rhs: Tensor | None, dtype: torch.dtype, logdet: bool = True
) -> tuple[Tensor, Tensor]:
    """rhsᵀ A⁻¹ rhs for each column, (*batch, r), and log |A|, (*batch), in float64; with derivatives.

    :param tensors: What A is a function of.
    :param rhs: (*batch, N, r); None for one column of zeros.
    :param dtype: That in which the entries of A are known.
    :raises NotPSDError: If A has no Cholesky factor, not even with jitter.
    """
    with torch.no_grad():
        factor, largest = assembly.factor(tensors)
    warn_of_lost_digits(largest, factor, dtype)
    columns = factor.new_zeros(*assembly.shape[:-1], 1) if rhs is None else rhs.double()
    return MarginalTerms.apply(assembly, factor, columns, logdet, *tensors)


def warn_of_lost_digits(largest: Tensor, factor: Tensor, dtype: torch.dtype) -> None:
    """Warns where a matrix, the largest entry of whose diagonal is given, is not known well enough for its factor."""
    rounding = torch.finfo(dtype).eps * largest
    smallest = factor.detach().diagonal(dim1=-2, dim2=-1).amin().square()
    if 0.1 * smallest < rounding:
        warnings.warn(
            f"A sum or product of kernels in {dtype} with so little noise loses too many digits: what its "
            f"factorisation leaves falls to {float(smallest):.1e}, and its entries are known to "
            f"{float(rounding):.1e}. Use float64 inputs and model, or more noise.",
            NumericalWarning,
            stacklevel=2,
        )


class MarginalTerms(torch.autograd.Function):
    r"""rhsᵀ A⁻¹ rhs for each column, (*batch, r), and log |A|, (*batch), with their exact derivatives.

    Those are −αᵀ ∂A α with :math:`\alpha = A^{-1} b`, and tr(A⁻¹ ∂A): together ⟨C, ∂A⟩ for one matrix C of cotangents,
    of which the parts of A are passed a few rows at a time. Nothing is differentiated through the factorisation. A, its
    factor, its inverse and, where one part can have it, C share one piece of memory.
    """

    @staticmethod
    def forward(
        ctx: Any, assembly: Assembly, factor: Tensor, rhs: Tensor, logdet: bool, *values: Tensor
    ) -> tuple[Tensor, Tensor]:
        alpha = cholesky_solve(factor, rhs)
        ctx.assembly, ctx.logdet, ctx.factor = assembly, logdet, factor
        ctx.save_for_backward(alpha, rhs, *values)
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (rhs * alpha).sum(-2), log_determinant

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        alpha, rhs, *values = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            found = _twice_differentiable(ctx.assembly, (rhs, *values), (ctx.needs_input_grad[2], *wanted), grads)
            return None, None, found[0], None, *found[1:]
        by_quad, by_logdet = grads
        by_rhs = (2 * alpha * by_quad.unsqueeze(-2)).sum_to_size(rhs.shape) if ctx.needs_input_grad[2] else None
        if not any(wanted):
            return None, None, by_rhs, None, *([None] * len(values))
        factor = ctx.factor
        if factor is None:  # a second time, where the graph was retained
            factor, _ = ctx.assembly.factor(values)
        ctx.factor = None  # what is made of it is overwritten, and need not wait for the graph to go
        inverse = invert_in_place(factor) if ctx.logdet else factor  # which is multiplied by zero below
        del factor
        gradients = Gradients(values, wanted, inverse)
        for rows in blocks_of_rows(inverse):
            block = inverse[..., rows, :]
            outer = (alpha[..., rows, :] * -by_quad.unsqueeze(-2)) @ alpha.mT
            cotangent = outer.sum_to_size(block.shape).addcmul_(block, by_logdet[..., None, None])
            ctx.assembly.part.pass_on(cotangent, rows, gradients)
        return None, None, by_rhs, None, *gradients.result()


def _twice_differentiable(
    assembly: Assembly, arguments: Values, wanted: tuple[bool, ...], grads: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The same derivatives with a graph of their own, through a Cholesky factor."""
    # Of views: an argument may be a function of another, and each derivative is by one alone.
    rhs, *values = views = [tensor.view_as(tensor) for tensor in arguments]
    factor = psd_safe_cholesky(assembly.differentiable(values), jitter=assembly.jitter)
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    terms = half.square().sum(-2), 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    chosen = [view for view, is_wanted in zip(views, wanted, strict=True) if is_wanted]
    found = iter(torch.autograd.grad(terms, chosen, grads, create_graph=True, allow_unused=True))
    return [next(found) if is_wanted else None for is_wanted in wanted]
