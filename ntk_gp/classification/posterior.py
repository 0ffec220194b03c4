"""The latent posterior at test inputs: means and covariances."""

from __future__ import annotations

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator, ZeroLinearOperator
from torch import Tensor

from .. import memory
from ..bridge.exactly_solved import without_constants
from ..bridge.prediction_strategies import check_shift
from ..bridge.recognised import networks_of
from ..jacobian.base import Jacobian
from ..operators import NTKLinearOperator
from ..operators._marginal_terms import in_double
from ..operators.ntk_posterior_linear_operator import NTKPosteriorEntries, NTKPosteriorLinearOperator
from ..solvers import PosteriorCovariance
from .approximation import LaplaceApproximation
from .function_space import FunctionSpaceCurvature
from .spaces import Curvature

# Rows of test points whose covariance with one another is formed for the sake of its diagonal blocks.
_ROWS_TOGETHER = 512
_POINTS_OF_A_GRAM = 32


class LaplaceCovariance(PosteriorCovariance):
    """The covariance of the latent function at any inputs, for kernels that are linear in weights; in float64.

    :param approximation: With the curvature that it comes from.
    """

    def __init__(self, approximation: LaplaceApproximation):
        assert approximation.prior.system is not None
        super().__init__(approximation.prior.system)
        self.curvature: Curvature = approximation.curvature

    @property
    def nbytes(self) -> int:
        return 8 * self.curvature.whitened_size() ** 2

    def whitened_size(self) -> int:
        return self.curvature.whitened_size()

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        left = self.curvature.whitened_cross(jacobian1)
        right = left if jacobian2 is jacobian1 else self.curvature.whitened_cross(jacobian2)
        product = left.mT @ right
        if not self.curvature.is_explained:
            return product
        return jacobian1.gram(jacobian2, self.system.variances) - product

    def variance(self, jacobian: Jacobian) -> Tensor:
        squares = self.curvature.whitened_cross(jacobian).square().sum(-2)
        if not self.curvature.is_explained:
            return squares
        # What rounding leaves below zero is zero as far as float64 can tell.
        return (jacobian.diagonal(self.system.variances) - squares).clamp_min(0.0)

    def covariance_of_points(self, jacobian: Jacobian) -> Tensor:
        """Of each point by itself, (B, m, C, C)."""
        outputs = jacobian.function.num_outputs
        if outputs == 1:
            return self.variance(jacobian)[..., None, None]
        half = self.curvature.whitened_cross(jacobian).mT.unflatten(-2, (-1, outputs))
        product = half @ half.mT
        if not self.curvature.is_explained:
            return product
        return self._prior_of_points(jacobian) - product

    def _prior_of_points(self, jacobian: Jacobian) -> Tensor:
        """Blocks of the diagonal of small Gram matrices: rows of J would be far more numbers."""
        outputs, blocks = jacobian.function.num_outputs, []
        for start in range(0, jacobian.num_points, _POINTS_OF_A_GRAM):
            some = jacobian[slice(start, start + _POINTS_OF_A_GRAM)]
            gram = some.gram(some, self.system.variances).unflatten(-1, (-1, outputs)).unflatten(-3, (-1, outputs))
            blocks.append(gram.diagonal(dim1=-4, dim2=-2).permute(0, 3, 1, 2))
        return torch.cat(blocks, dim=1)


class LatentPosterior:
    """Means and covariances at test inputs, from what was computed once from the training data.

    :param approximation: Of the posterior at the training inputs.
    """

    def __init__(self, approximation: LaplaceApproximation):
        self.approximation = approximation
        self.covariance: LaplaceCovariance | None = None
        if approximation.prior.system is not None:
            self.covariance = LaplaceCovariance(approximation)
            self.weights = approximation.curvature.mean_weights(approximation.position)

    def check_networks(self, test_test_covar: LinearOperator) -> None:
        """Raises where the network is not the one that the training data were prepared with."""
        if not networks_of(test_test_covar) <= self.approximation.prior.networks:
            raise RuntimeError(
                "The kernel's network has changed since the model's predictions were prepared. Call model.train() and "
                "model.eval() to prepare them anew."
            )

    def shift(self, x: Tensor) -> Tensor:
        """J(x) ŵ, by which the posterior mean differs from the prior's: (*batch, m, d) to (*batch, m·C)."""
        assert self.covariance is not None
        linearization = self.covariance.system.linearization
        jacobian = linearization.autodiff.linearize(x.reshape(-1, *x.shape[-2:]))
        shift = jacobian.jvp(self.weights.to(x.dtype).reshape(1, 1, -1))
        check_shift(shift.reshape(x.shape[:-2].numel(), -1), x)
        return shift.reshape(*x.shape[:-2], -1)

    def prediction(
        self, test_test_covar: LinearOperator, test_train_covar: LinearOperator
    ) -> tuple[Tensor, LinearOperator]:
        """The difference that the data make to the mean, (*batch, m·C), and the covariance.

        :param test_test_covar: The prior's, (*batch, m·C, m·C).
        :param test_train_covar: (*batch, m·C, N); evaluated for kernels that are not linear in weights.
        """
        matrix = without_constants(test_test_covar.evaluate_kernel())
        self.check_networks(matrix)
        if self.covariance is not None and isinstance(matrix, NTKLinearOperator):
            shift = self.shift(matrix.x1)
            if gpytorch_settings.skip_posterior_variances.on():
                return shift, ZeroLinearOperator(*matrix.shape)
            return shift, NTKPosteriorLinearOperator(matrix.x1, matrix.x1, source=self.covariance)
        return self._by_kernel(matrix, test_train_covar)

    def points_per_block(self) -> int:
        """How many test points may be looked at together, one by one: an eighth of the memory budget."""
        prior = self.approximation.prior
        outputs = prior.mean.shape[-1]
        budget = memory.TEST_POINTS.bytes(prior.mean.device) // (8 * outputs)
        if prior.system is not None:
            return max(1, budget // (3 * prior.space.num_coordinates))
        rows = prior.mean.numel()  # of K; and the covariance of all with all
        return max(1, min(_ROWS_TOGETHER // outputs, budget // (2 * rows + 2 * _ROWS_TOGETHER)))

    def marginals(self, prior: MultivariateNormal) -> tuple[Tensor, Tensor] | None:
        """The posterior at each of some points by itself: mean, (m, C), and covariance, (m, C, C), in float64; None for
        kernels that are not linear in weights.

        :param prior: At these points, without batches.
        """
        matrix = without_constants(to_linear_operator(prior.lazy_covariance_matrix).evaluate_kernel())
        self.check_networks(matrix)
        if self.covariance is None or not isinstance(matrix, NTKLinearOperator):
            return None
        jacobian = self.covariance.system.jacobian_at(matrix.x1.unsqueeze(0))
        covariance = self.covariance.covariance_of_points(jacobian)[0]
        mean = prior.loc + self.shift(matrix.x1)
        return mean.double().reshape(covariance.shape[:-1]), covariance

    def _by_kernel(self, matrix: LinearOperator, test_train_covar: LinearOperator) -> tuple[Tensor, LinearOperator]:
        curvature = self.approximation.curvature
        if not isinstance(curvature, FunctionSpaceCurvature):
            raise TypeError("The model's forward returns other kernels at test inputs than at training inputs.")
        cross = in_double(test_train_covar)
        shift = (cross @ self.approximation.position.coordinates).to(matrix.dtype)
        if gpytorch_settings.skip_posterior_variances.on():
            return shift, ZeroLinearOperator(*matrix.shape)
        explained = curvature.explained(cross.mT)
        covariance = in_double(matrix) - explained.mT @ explained
        return shift, NTKPosteriorEntries(covariance.to(matrix.dtype))
