"""Sums of a neural tangent kernel matrix and other matrices."""

from __future__ import annotations

import contextlib
import warnings

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.operators import AddedDiagLinearOperator, DiagLinearOperator, LinearOperator, SumLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.memoize import cached
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import settings
from ..solvers.iterative import tolerance
from ..stock import STOCK_CHOLESKY_SIZES, chosen_cholesky_size, stock
from ._checks import check_right_hand_side


class _DenselySolved(LinearOperator):
    """Solves and log-determinants by one dense Cholesky factor in float64 as long as that fits in
    :class:`ntk_gp.settings.memory_budget`; beyond, by GPyTorch's conjugate gradients at this package's tolerance."""

    @property
    def _is_dense(self) -> bool:
        elements = 3 * self.batch_shape.numel() * self.shape[-1] ** 2
        return 8 * elements <= settings.memory_budget.bytes(self.device)

    @cached(name="float64_factor")
    def _factor(self) -> Tensor:
        matrix = self.to_dense().double()
        factor = psd_safe_cholesky(matrix, jitter=gpytorch_settings.cholesky_jitter.value(self.dtype))
        rounding = torch.finfo(self.dtype).eps * matrix.detach().diagonal(dim1=-2, dim2=-1).amax()
        smallest = factor.detach().diagonal(dim1=-2, dim2=-1).amin().square()
        if 0.1 * smallest < rounding:
            warnings.warn(
                f"A sum or product of kernels in {self.dtype} with so little noise loses too many digits: what its "
                f"factorisation leaves falls to {float(smallest):.1e}, and its entries are known to "
                f"{float(rounding):.1e}. Use float64 inputs and model, or more noise.",
                NumericalWarning,
                stacklevel=2,
            )
        return factor

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        check_right_hand_side(right_tensor)
        if not self._is_dense:
            with _conjugate_gradients():
                return super().solve(right_tensor, left_tensor)
        vector = right_tensor.dim() == 1
        rhs = right_tensor.unsqueeze(-1) if vector else right_tensor
        solution = torch.cholesky_solve(rhs.double(), self._factor()).to(right_tensor.dtype)
        solution = solution.squeeze(-1) if vector else solution
        return solution if left_tensor is None else left_tensor @ solution

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        if inv_quad_rhs is not None:
            check_right_hand_side(inv_quad_rhs)
        if not self._is_dense:
            with _conjugate_gradients():
                return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)
        factor = self._factor()
        inv_quad = log_determinant = torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        if inv_quad_rhs is not None:
            vector = inv_quad_rhs.dim() == 1
            rhs = inv_quad_rhs.unsqueeze(-1) if vector else inv_quad_rhs
            inv_quad = torch.linalg.solve_triangular(factor, rhs.double(), upper=False).square().sum(-2).to(self.dtype)
            inv_quad = inv_quad.sum(-1) if vector or reduce_inv_quad else inv_quad
        if logdet:
            log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).to(self.dtype)
        return inv_quad, log_determinant


class NTKSumLinearOperator(_DenselySolved, SumLinearOperator):
    """A neural tangent kernel matrix plus others, such as a Matérn kernel's or correlated noise; solved exactly.

    :param linear_ops: The matrices to add; or one alone that holds such a sum or a product, in a form that solves
        otherwise.
    """

    def _mul_constant(self, other: float | Tensor) -> LinearOperator:
        return self.__class__(*(operator._mul_constant(other) for operator in self.linear_ops))

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        return self + super().add_diagonal(diag)._diag_tensor

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return NTKSumAddedDiagLinearOperator(self, other)
        added = super().__add__(other)
        return self.__class__(*added.linear_ops) if type(added) is SumLinearOperator else added


class NTKSumAddedDiagLinearOperator(_DenselySolved, AddedDiagLinearOperator):
    """Such a sum plus noise.

    :param linear_ops: The :class:`NTKSumLinearOperator` and the :class:`~linear_operator.operators.DiagLinearOperator`.
    """


def _conjugate_gradients() -> contextlib.ExitStack:
    """GPyTorch's settings as the user has made them, at this package's tolerance if none; not those of an import."""
    stack = contextlib.ExitStack()
    stack.enter_context(gpytorch_settings.cg_tolerance(tolerance()))
    if chosen_cholesky_size() is None:
        stack.enter_context(gpytorch_settings.max_cholesky_size(stock(min(STOCK_CHOLESKY_SIZES))))
    for flag in (gpytorch_settings.fast_computations.solves, gpytorch_settings.fast_computations.log_prob):
        if flag.is_default():
            stack.enter_context(flag(True))
    return stack
