"""Matrices with a neural tangent kernel in them that GPyTorch solves by their structure: solved by it, exactly.

=============================  ===================================  =======================================
matrix                         by                                   flops, beside products with vectors
=============================  ===================================  =======================================
⊗ Kᵢ + ⊗ Nᵢ (multitask)        eigenvalues of each whitened factor  Σ nᵢ³
blocks of a batch              each block's own solver              a sum over blocks
W B Wᵀ + D (interpolation)     Woodbury's formula                   n m² + m³, for a grid of m points
R Rᵀ + D (inducing points)     GPyTorch's own Woodbury formula      n m² + m³
=============================  ===================================  =======================================

Everything in float64, no setting of GPyTorch decides, and no gradient goes through a factorisation: a solve is
α + S(b − A α), with α the solution and S the inverse, both constants, and A with its graph.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from .._compat import arguments_of
from ._solving_operators import Factorised
from .ntk_sum_linear_operator import NTKSumLinearOperator


class SolvedByStructure(Factorised):
    """What such matrices share; each says how to factorise, apply the inverse, and find the log-determinant.

    What they factorise into is handed to the other methods as `parts`, all of it in float64.
    """

    @abstractmethod
    def _inverse(self, parts: Any, rhs: Tensor) -> Tensor:
        """A⁻¹ rhs, (*batch, N, r); `parts` taken for constants."""

    @abstractmethod
    def _product(self, parts: Any, rhs: Tensor) -> Tensor:
        """A rhs, (*batch, N, r)."""

    @abstractmethod
    def _log_determinant(self, parts: Any) -> Tensor:
        """log |A|, (*batch)."""

    def _solution(self, parts: Any, rhs: Tensor) -> Tensor:
        with torch.no_grad():
            solution = self._inverse(parts, rhs)
        return solution + self._inverse(parts, rhs - self._product(parts, solution))

    def _solve_columns(self, rhs: Tensor) -> Tensor:
        return self._solution(self._factor, rhs.double()).to(rhs.dtype)

    def _inv_quad_and_logdet(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        parts = self._factor
        inv_quad = log_determinant = self._zeros()
        if rhs is not None:
            rhs = rhs.double()
            inv_quad = (rhs * self._solution(parts, rhs)).sum(-2)
        if logdet:
            log_determinant = self._log_determinant(parts).expand(self.batch_shape)
        return inv_quad, log_determinant

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """A square root, for samples, by a dense factor."""
        return NTKSumLinearOperator(*arguments_of(self)).root_decomposition(method)


def symmetric(matrix: Tensor) -> Tensor:
    """The same, with a symmetric derivative, as upstream has it: x₁ and x₂ then take half of it each."""
    return (matrix + matrix.mT) / 2
