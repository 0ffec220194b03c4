"""What operators that solve by themselves share: vectors taken for columns, and a factor that is kept."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.memoize import clear_cache_hook
from torch import Tensor


class Solves(LinearOperator):
    """A square matrix A, (*batch, N, N), whose subclass says how to solve for columns: A⁻¹ B, or L A⁻¹ B.

    A right-hand side without rows, or with entries that are NaN or infinite, is refused with a `ValueError`.
    """

    @abstractmethod
    def _solve_columns(self, rhs: Tensor) -> Tensor:
        """A⁻¹ rhs, (*batch, N, r), in the dtype of `rhs`; differentiable."""

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Any:
        if num_tridiag:
            return super()._solve(rhs, preconditioner, num_tridiag)
        return self._solve_columns(rhs)

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        columns, is_vector = _columns(right_tensor)
        solution = self._solve_columns(columns)
        solution = solution.squeeze(-1) if is_vector else solution
        return solution if left_tensor is None else left_tensor @ solution


class SolvesWithLogdet(Solves):
    """Such a matrix that knows its log-determinant as well."""

    @abstractmethod
    def _inv_quad_and_logdet(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        """rhsᵀ A⁻¹ rhs for each column, (*batch, r), and log |A|, (*batch); zeros, (*batch), for what is not asked for.

        :param rhs: (*batch, N, r).
        """

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        columns, is_vector = (None, False) if inv_quad_rhs is None else _columns(inv_quad_rhs)
        inv_quad, log_determinant = self._inv_quad_and_logdet(columns, bool(logdet))
        if columns is not None and (is_vector or reduce_inv_quad):
            inv_quad = inv_quad.sum(-1)
        return inv_quad.to(self.dtype), log_determinant.to(self.dtype)

    def _zeros(self) -> Tensor:
        """One for each batch, for what is not asked for."""
        return torch.zeros(self.batch_shape, dtype=self.dtype, device=self._place)

    @property
    def _place(self) -> torch.device:
        """The device, which an operator made of several may not know itself."""
        return self.representation()[0].device if self.device is None else self.device


class Factorised(SolvesWithLogdet):
    """Such a matrix with a factor, such as a Cholesky factor: computed once, and kept unless it has a graph."""

    _factor_memo: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        clear_cache_hook(self)  # made here, since threads that share this could each make their own later
        super().__init__(*args, **kwargs)

    @abstractmethod
    def _factorise(self) -> Any:
        """The factor, in float64, with its graph."""

    @property
    def _factor(self) -> Any:
        """A factor with a graph is not kept: derivatives can be taken through it only once."""
        if torch.is_grad_enabled() and self.requires_grad:
            return self._factorise()
        if self._factor_memo is None:
            with torch.inference_mode(False), torch.no_grad():  # derivatives of what it solves may be asked for later
                self._factor_memo = self._factorise()
        return self._factor_memo


def _columns(rhs: Tensor) -> tuple[Tensor, bool]:
    """(*batch, N, r) from that, or from (N,), and whether it was the latter."""
    check_right_hand_side(rhs)
    is_vector = rhs.dim() == 1
    return rhs.unsqueeze(-1) if is_vector else rhs, is_vector


def check_right_hand_side(rhs: Tensor) -> None:
    """Raises for an empty training set, and for targets that are not numbers."""
    if rhs.shape[-2 if rhs.dim() > 1 else -1] == 0:
        raise ValueError("There is no training data: expected at least one input with its target.")
    if not torch.isfinite(rhs).all():
        count = int((~torch.isfinite(rhs)).sum())
        raise ValueError(
            f"{count} of {rhs.numel()} training targets (less the prior mean) are NaN or infinite. Remove them, or set "
            "gpytorch.settings.observation_nan_policy('mask')."
        )
