"""The likelihood of two classes that GPyTorch lacks: the logistic one, which networks are trained with."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import BernoulliLikelihood
from torch import Tensor
from torch.distributions import Bernoulli


class LogisticLikelihood(BernoulliLikelihood):
    r"""Two classes, :math:`p(y = 1 \mid f) = 1 / (1 + e^{-f})`: the network's output is a logit.

    It is the likelihood of networks trained with `binary_cross_entropy_with_logits`. GPyTorch's own
    :class:`~gpytorch.likelihoods.BernoulliLikelihood` has the normal distribution function
    :math:`\Phi(f)` in its place, for which a logit is too large by a factor of about 1.7. Labels are 0 and 1. It serves
    variational models as well as :class:`~ntk_gp.LaplaceGP`.

    Marginal probabilities are integrated by Gauss-Hermite quadrature
    (`gpytorch.settings.num_gauss_hermite_locs`).

    Example:
        >>> LogisticLikelihood()(torch.zeros(3)).probs
        tensor([0.5000, 0.5000, 0.5000])
    """

    def forward(self, function_samples: Tensor, *args: Any, **kwargs: Any) -> Bernoulli:
        return Bernoulli(logits=function_samples)

    def marginal(self, function_dist: MultivariateNormal, *args: Any, **kwargs: Any) -> Bernoulli:
        """p(y = 1), (*batch, n), averaged over the latent function."""
        return Bernoulli(probs=self.quadrature(torch.sigmoid, function_dist).clamp(0.0, 1.0))

    def expected_log_prob(
        self, observations: Tensor, function_dist: MultivariateNormal, *params: Any, **kwargs: Any
    ) -> Tensor:
        signs = 2 * observations.to(function_dist.loc) - 1
        return self.quadrature(lambda f: torch.nn.functional.logsigmoid(signs * f), function_dist)
