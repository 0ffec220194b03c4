"""Sums and products that are too large for a dense factor: preconditioned conjugate gradients."""

from __future__ import annotations

import logging

from linear_operator.operators import AddedDiagLinearOperator, LinearOperator
from torch import Tensor

from .._compat import added_diagonal, without_diagonal
from ..solvers.iterative import (
    NystromPreconditioner,
    SolveReport,
    conjugate_gradients,
    drawn_landmarks,
    most_landmarks,
)
from ._marginal_terms import in_double

logger = logging.getLogger("ntk_gp")


class Iteration:
    """K + D, (N, N), of which products are formed, and m columns: K + D is never held as a whole by this.

    :param matrix: A sum or a product, plus noise; without a graph.
    """

    report: SolveReport | None = None

    def __init__(self, matrix: AddedDiagLinearOperator):
        self.kernel: LinearOperator = without_diagonal(matrix)
        self.noise: Tensor = added_diagonal(matrix)._diagonal().expand(matrix.shape[:-1]).detach().double()
        self.dtype = matrix.dtype
        rows, device = matrix.shape[-1], self.noise.device
        landmarks = drawn_landmarks(rows, most_landmarks(rows, device)).to(device)
        cross = in_double(self.kernel[:, landmarks])
        self.preconditioner = NystromPreconditioner(cross, cross[landmarks].clone(), self.noise)

    @staticmethod
    def serves(matrix: LinearOperator) -> bool:
        """Whether a matrix is one: without batches, and with noise that is positive."""
        if not isinstance(matrix, AddedDiagLinearOperator) or matrix.batch_shape:
            return False
        return bool((added_diagonal(matrix)._diagonal() > 0).all())

    def matmul(self, rhs: Tensor) -> Tensor:
        """(K + D) rhs, (1, N, r), in float64."""
        product = self.kernel._matmul(rhs[0].to(self.dtype)).double()
        return (product + self.noise.unsqueeze(-1) * rhs[0]).unsqueeze(0)

    single_precision_matmul = matmul

    def solve(self, rhs: Tensor) -> Tensor:
        """(K + D)⁻¹ rhs, (N, r), to the tolerance, or with a warning that says how far from it."""
        solution, self.report = conjugate_gradients(self, rhs.double(), self.preconditioner)
        logger.debug("Conjugate gradients: %s", self.report)
        if not self.report.converged:
            what = "Conjugate gradients for a sum or product of kernels"
            self.report.warn(what, len(self.noise), "more noise, or float64 inputs")
        return solution.to(rhs.dtype)
