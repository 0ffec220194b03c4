"""Matrices without a structure to solve by: one dense factor, or iteration where that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.operators import (
    AddedDiagLinearOperator,
    IdentityLinearOperator,
    LinearOperator,
    RootLinearOperator,
)
from linear_operator.utils import linear_cg
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.memoize import cached
from torch import Size, Tensor

from .. import memory
from .._compat import InvQuadLogdet
from ..solvers.iterative import tolerance
from ..stock import STOCK_CHOLESKY_SIZES, chosen_cholesky_size
from ._iteration import Iteration
from ._marginal_terms import Assembly, exact_terms, in_double, warn_of_lost_digits
from ._roots import square_root, warn_of_low_rank
from ._solve import Solve
from ._solving_operators import Factorised

_Preconditioner = Callable[[Tensor], Tensor] | None


class DenselySolved(Factorised):
    """Solves, log-determinants and roots by one dense factor in float64 as long as that fits in
    :class:`ntk_gp.settings.memory_budget`; beyond, by conjugate gradients at this package's tolerance, with its
    preconditioner where there is noise. No setting of GPyTorch is changed for that: other threads would meet it."""

    _iteration_memo: Iteration | None = None

    @cached(name="size")  # of a sum it is put together from its parts', and asked for throughout linear_operator
    def _size(self) -> Size:
        return super()._size()

    @property
    def _is_dense(self) -> bool:
        return self._fits or self.shape[-1] <= _cholesky_size() or _iteration_is_switched_off()

    @property
    def _fits(self) -> bool:
        elements = 3 * self.shape.numel()
        return 8 * elements <= memory.SYSTEM.bytes(self._place)

    def _assembly(self) -> tuple[Assembly, list[Tensor]]:
        """How the matrix is formed in float64, and the tensors that it is a function of."""
        return Assembly.of(self, gpytorch_settings.cholesky_jitter.value(self.dtype))

    def _double(self) -> Tensor:
        """The matrix in float64."""
        return in_double(self)

    def _factorise(self) -> Tensor:
        """The Cholesky factor, (*batch, N, N)."""
        if torch.is_grad_enabled() and self.requires_grad:
            matrix = self._double()
            factor = psd_safe_cholesky(matrix, jitter=gpytorch_settings.cholesky_jitter.value(self.dtype))
            largest = matrix.detach().diagonal(dim1=-2, dim2=-1).amax()
        else:
            assembly, tensors = self._assembly()
            factor, largest = assembly.factor(tensors)
        warn_of_lost_digits(largest, factor, self.dtype)
        return factor

    def _solve_columns(self, rhs: Tensor) -> Tensor:
        if self._is_dense:
            return torch.cholesky_solve(rhs.double(), self._factor).to(rhs.dtype)
        return Solve.apply(self, rhs, *self.representation())

    def _solve(self, rhs: Tensor, preconditioner: _Preconditioner = None, num_tridiag: int | None = 0) -> Any:
        if not num_tridiag and self._is_dense:
            return torch.cholesky_solve(rhs.double(), self._factor).to(rhs.dtype)
        if not num_tridiag and preconditioner is None and rhs.dim() == 2 and Iteration.serves(self):
            return self._iteration.solve(rhs)
        if preconditioner is None:
            preconditioner = self._solve_preconditioner()
        return linear_cg(
            self._matmul,
            rhs,
            n_tridiag=num_tridiag or 0,
            tolerance=tolerance(),
            max_iter=gpytorch_settings.max_cg_iterations.value(),
            max_tridiag_iter=gpytorch_settings.max_lanczos_quadrature_iterations.value(),
            preconditioner=preconditioner,
        )

    @property
    def _iteration(self) -> Iteration:
        """The preconditioner, kept: it is no part of any graph."""
        if self._iteration_memo is None:
            with torch.inference_mode(False), torch.no_grad():
                self._iteration_memo = Iteration(cast(AddedDiagLinearOperator, self.detach()))
        return self._iteration_memo

    def _inv_quad_and_logdet(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        return self._exact_terms(rhs, logdet) if self._is_dense else self._estimated_terms(rhs, logdet)

    def _exact_terms(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        """rhsᵀ A⁻¹ rhs for each column, (*batch, r), and log |A|, (*batch)."""
        if torch.is_grad_enabled() and self.requires_grad:
            return self._differentiable_terms(rhs, logdet)
        factor = self._factor
        inv_quad = log_determinant = self._zeros()
        if rhs is not None:
            inv_quad = torch.linalg.solve_triangular(factor, rhs.double(), upper=False).square().sum(-2)
        if logdet:
            log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return inv_quad, log_determinant

    def _differentiable_terms(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        """The same, with derivatives that are written out."""
        assembly, tensors = self._assembly()
        inv_quad, log_determinant = exact_terms(assembly, tensors, rhs, self.dtype, logdet)
        return self._zeros() if rhs is None else inv_quad, log_determinant if logdet else self._zeros()

    def _estimated_terms(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        """The same, the log-determinant by Lanczos quadrature."""
        if not logdet:
            return self._zeros() if rhs is None else (rhs * self._solve_columns(rhs)).sum(-2), self._zeros()
        preconditioner, preconditioning, preconditioning_logdet = self._preconditioner()
        if preconditioning is None:
            preconditioning_logdet = 0.0
            preconditioning = IdentityLinearOperator(
                self.shape[-1], batch_shape=self.batch_shape, dtype=self.dtype, device=self._place
            )
        representation = preconditioning.representation()
        inv_quad, log_determinant = InvQuadLogdet.apply(
            self.representation_tree(),
            preconditioning.representation_tree(),
            preconditioner,
            len(representation),
            rhs is not None,
            *self._probe_vectors_and_norms(),
            *(() if rhs is None else (rhs,)),
            *self.representation(),
            *representation,
        )
        return inv_quad, log_determinant + preconditioning_logdet

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """A square root, for samples: exact, also of singular matrices, as long as the matrix fits in the budget."""
        if method is not None or not self._fits:
            if method is None and self._choose_root_method() == "lanczos":
                warn_of_low_rank(self.shape[-1])
            return super().root_decomposition(method)
        return RootLinearOperator(square_root(self._double()).to(self.dtype))


def _cholesky_size() -> float:
    """Up to which size GPyTorch would factorise: as the user has set it, not as an import has."""
    chosen = chosen_cholesky_size()
    return min(STOCK_CHOLESKY_SIZES) if chosen is None else chosen


def _iteration_is_switched_off() -> bool:
    """Whether the user, not an import, has asked GPyTorch for factorisations throughout."""
    flags = (gpytorch_settings.fast_computations.solves, gpytorch_settings.fast_computations.log_prob)
    return any(not flag.is_default() and flag.off() for flag in flags)
