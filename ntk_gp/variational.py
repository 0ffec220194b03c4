r"""Variational posteriors over a network's weights: what q(u) at inducing points says of w.

With :math:`LL^\top = K_{ZZ} + \epsilon I`, where :math:`\epsilon` is the jitter that GPyTorch adds, a whitened
:math:`q(v) = N(\mu, S)` stands for :math:`u = m(Z) + Lv` (Matthews, "Scalable Gaussian process inference using
variational methods", 2017). The predictive mean is that of the weights :math:`\Sigma J(Z)^\top L^{-\top} \mu`, and

.. math:: w + \Sigma J(Z)^\top L^{-\top} \bigl(v - L^{-1}(J(Z) w + \sqrt{\epsilon}\, \xi)\bigr), \qquad
    w \sim N(0, \Sigma),\ v \sim q,\ \xi \sim N(0, I)

is a draw from the predictive distribution as it is, jitter on :math:`K_{ZZ}` included (pathwise conditioning: Wilson et
al., "Efficiently sampling functions from Gaussian process posteriors", ICML 2020).
"""

from __future__ import annotations

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ApproximateGP
from gpytorch.variational import LargeBatchVariationalStrategy, UnwhitenedVariationalStrategy, VariationalStrategy
from linear_operator import to_dense
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from .operators import NTKLinearOperator
from .operators._roots import root_by_eigenvalues

_WHITENED = (VariationalStrategy, LargeBatchVariationalStrategy)
_SERVED = (*_WHITENED, UnwhitenedVariationalStrategy)


class VariationalWeights:
    """The posterior over the weights of a variational model's features, in float64.

    :param model: In eval mode, with a `mean_module` and a `covar_module` that is linear in weights, and what the
        variational strategy needs: a VariationalStrategy, a LargeBatchVariationalStrategy or an
        UnwhitenedVariationalStrategy without batches.
    :ivar x: The inducing points as the network sees them, (1, M, d).
    :ivar linearization: Of the kernel's features.
    :raises TypeError: For another strategy.
    :raises ValueError: For batches, and where the features do not fit in memory.
    """

    def __init__(self, model: ApproximateGP):
        strategy = _checked_strategy(model)
        self._points = strategy.inducing_points.detach()
        with torch.no_grad():
            model(self._points[:1])  # sets q to the prior where it has never been set
            matrix = model.covar_module(self._points.double()).evaluate_kernel()
            if not isinstance(matrix, NTKLinearOperator):
                raise ValueError(
                    f"The features of the {len(self._points)} inducing points do not fit in "
                    "ntk_gp.settings.memory_budget. Call model(x) instead."
                )
            self.linearization = matrix.linearization
            self.x = matrix.x1.reshape(1, *matrix.x1.shape[-2:])
            self._jacobian = self.linearization.jacobian(self.x)
            variances = matrix.variances.reshape(1, -1)
            self._variances = self._jacobian.function.expand_variances(variances)
            self._factorise(matrix.to_dense(), strategy.jitter_val)
            self._take(strategy, model.mean_module(self._points).double())

    def _factorise(self, gram: Tensor, jitter: float) -> None:
        """L, and what the factor has on its diagonal beyond K: more than the jitter where that did not do."""
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self._root = psd_safe_cholesky(gram + jitter * eye)
        self._added = (self._root.square().sum(-1) - gram.diagonal()).clamp(min=0.0)

    def _take(self, strategy: VariationalStrategy, prior_mean: Tensor) -> None:
        """The whitened mean and a root of the whitened covariance; a Delta distribution has none."""
        q = strategy.variational_distribution
        mean = q.mean.double()
        covariance = to_dense(q.lazy_covariance_matrix).double() if isinstance(q, MultivariateNormal) else None
        root = None if covariance is None else root_by_eigenvalues(covariance)
        if not isinstance(strategy, _WHITENED):
            mean = self._whitened((mean - prior_mean).unsqueeze(-1)).squeeze(-1)
            root = None if root is None else self._whitened(root)
        self._mean, self._covariance_root = mean, root

    @property
    def dtype(self) -> torch.dtype:
        """That of the inducing points."""
        return self._points.dtype

    @property
    def num_parameters(self) -> int:
        """How many features there are."""
        return self._jacobian.function.num_parameters

    def mean(self) -> Tensor:
        """The weights of the predictive mean, (P,)."""
        return self._weights(self._mean.unsqueeze(0))[0]

    def draw(self, weights: Tensor, normal: Tensor) -> Tensor:
        """Draws from the posterior, (k, P), made of draws from the prior.

        :param weights: These, (k, P), of variance one.
        :param normal: Standard normal numbers, (k, 2·M).
        """
        weights = weights * self._variances.sqrt()
        first, second = normal.split(len(self._points), dim=-1)
        values = self._jacobian.jvp(weights.unsqueeze(0))[0] + second * self._added.sqrt()
        v = self._mean.expand(first.shape)
        if self._covariance_root is not None:
            v = v + first @ self._covariance_root.mT
        return weights + self._weights(v - self._whitened(values.mT).mT)

    def prior(self, weights: Tensor) -> Tensor:
        """Draws from the prior, of draws of variance one, (k, P)."""
        return weights * self._variances.sqrt()

    def _whitened(self, columns: Tensor) -> Tensor:
        """L⁻¹ of columns, (M, k)."""
        return torch.linalg.solve_triangular(self._root, columns, upper=False)

    def _weights(self, v: Tensor) -> Tensor:
        """Σ J(Z)ᵀ L⁻ᵀ v for rows v (k, M): (k, P)."""
        solved = torch.linalg.solve_triangular(self._root.mT, v.mT, upper=True).mT
        return self._jacobian.vjp(solved.unsqueeze(0))[0] * self._variances

    def is_plain(self, model: ApproximateGP) -> bool:
        """Whether the model's prior is its mean and kernel, and no more."""
        with torch.no_grad():
            own = model.forward(self._points)
            mean, covariance = model.mean_module(self._points), model.covar_module(self._points).to_dense()
            same = own.mean.shape == mean.shape and torch.allclose(own.mean, mean)
            return same and torch.allclose(own.covariance_matrix, covariance, rtol=1e-4)


def _checked_strategy(model: ApproximateGP) -> VariationalStrategy:
    strategy = model.variational_strategy
    if type(strategy) not in _SERVED:
        raise TypeError(
            f"Expected a model with one of {', '.join(kind.__name__ for kind in _SERVED)}, got one with a "
            f"{type(strategy).__name__}, whose posterior is not one over the weights of one network. Call model(x) "
            "instead."
        )
    points, mean = strategy.inducing_points, strategy.variational_distribution.mean
    if points.dim() > 2 or mean.dim() > 1 or mean.shape[-1] != points.shape[-2]:
        raise ValueError(
            f"Expected a variational model of one function, got one with inducing points of shape "
            f"{tuple(points.shape)} and a variational mean of shape {tuple(mean.shape)}. Call model(x) instead."
        )
    return strategy
