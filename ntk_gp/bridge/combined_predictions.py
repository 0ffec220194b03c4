"""Predictions of sums and products with a neural tangent kernel in them, from what is kept of the training data."""

from __future__ import annotations

import torch
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator, MatmulLinearOperator, SumLinearOperator
from torch import Tensor

from ..operators import NTKLinearOperator
from ..operators._batches import flatten_batch
from ..operators._densely_solved import DenselySolved
from ..operators._marginal_terms import in_double
from ..operators.ntk_sum_linear_operator import NTKSumLinearOperator
from ..solvers.cholesky import cholesky_solve
from .exactly_solved import without_constants


class KeptFactor:
    """The Cholesky factor L of A = K + D in float64, :math:`\\alpha = A^{-1} (y - m)`, and what follows from it.

    A prediction at M inputs forms the M×N matrix between them and the training inputs, once, and solves with L for it,
    once: N² M flops. A mean alone takes a Jacobian-vector product for each neural tangent kernel in a sum, and of the
    other kernels their M×N matrices.

    :param matrix: A, without a graph, (*batch, N, N).
    :param residual: y − m in float64, (*batch, N), a constant; zero where a target is missing.
    :param missing: Which targets are missing, (*batch, N): there A is a row and column of the identity.
    """

    def __init__(self, matrix: DenselySolved, residual: Tensor, missing: Tensor):
        self.factor: Tensor = matrix._factor
        self.missing = missing if missing.any() else None
        self.alpha = cholesky_solve(self.factor, residual.unsqueeze(-1)).squeeze(-1)
        self._weights: list[_Weights] = []

    def __deepcopy__(self, memo: dict) -> KeptFactor:
        return self  # nothing in it is written to

    def prediction(self, test_test: LinearOperator, test_train: LinearOperator) -> tuple[Tensor, LinearOperator]:
        """What is added to the prior mean, (*batch, M), and the covariance.

        :param test_test: (*batch, M, M).
        :param test_train: (*batch, M, N).
        """
        cross = in_double(test_train)
        if self.missing is not None:
            cross = cross.masked_fill(self.missing.unsqueeze(-2), 0.0)
        shift = (cross @ self.alpha.unsqueeze(-1)).squeeze(-1)
        whitened = torch.linalg.solve_triangular(self.factor, cross.mT, upper=False).to(test_test.dtype)
        explained = MatmulLinearOperator(whitened.mT, -whitened)
        return shift.to(test_test.dtype), NTKSumLinearOperator(to_linear_operator(test_test), explained)

    def shift(self, test_train: LinearOperator) -> Tensor:
        """What is added to the prior mean, (*batch, M), without the matrix of a neural tangent kernel."""
        total: Tensor | None = None
        tangent_kernels = 0
        for part in _summands(test_train):
            if isinstance(part, NTKLinearOperator) and self.alpha.dim() == 1 and not part.batch_shape:
                shift = self._weights_of(part, tangent_kernels).shift(part)
                tangent_kernels += 1
            else:
                shift = (in_double(part) @ self.alpha.unsqueeze(-1)).squeeze(-1)
            total = shift if total is None else total + shift
        assert total is not None
        return total.to(test_train.dtype)

    def _weights_of(self, part: NTKLinearOperator, position: int) -> _Weights:
        """Those of the tangent kernel at this position of the sum, from an earlier prediction where it is the same."""
        known = self._weights[position] if position < len(self._weights) else None
        if known is not None and known.serve(part):
            return known
        new = _Weights(part, self.alpha)
        if position == len(self._weights):
            self._weights = [*self._weights, new]  # another list: threads may be reading this one
        return new


class _Weights:
    """ŵ = Σ Jᵀ α of one neural tangent kernel in a sum, (P,) in float64.

    :param part: Its matrix between test and training inputs.
    :param alpha: (N,).
    """

    def __init__(self, part: NTKLinearOperator, alpha: Tensor):
        with torch.inference_mode(False), torch.no_grad():
            self.kernel = part.detach()
            jacobian = part.linearization.jacobian(flatten_batch(part.x2.detach().double()))
            variances = jacobian.function.expand_variances(part.variances.detach().double().reshape(1, -1))
            self.weights = jacobian.vjp(alpha.reshape(1, 1, -1))[0, 0] * variances[0]

    def serve(self, part: NTKLinearOperator) -> bool:
        """Whether they are those of this kernel, too, and of the same training inputs."""
        return self.kernel.is_of_one_kernel_with(part) and torch.equal(self.kernel.x2, part.x2.detach())

    def shift(self, part: NTKLinearOperator) -> Tensor:
        """J(x) ŵ at the test inputs, (M,)."""
        x = part.x1.unsqueeze(0)
        return part.linearization.autodiff.linearize(x).jvp(self.weights.to(x.dtype).reshape(1, 1, -1)).reshape(-1)


def _summands(matrix: LinearOperator) -> list[LinearOperator]:
    """The matrices that this one is the sum of, evaluated; itself where it is none."""
    matrix = without_constants(matrix)
    if not isinstance(matrix, SumLinearOperator):
        return [matrix]
    return [summand for part in matrix.linear_ops for summand in _summands(part)]
