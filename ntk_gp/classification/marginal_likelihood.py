"""The evidence of Laplace's approximation, as GPyTorch's training loops want it."""

from __future__ import annotations

from typing import Any

from gpytorch.distributions import MultivariateNormal
from gpytorch.mlls import MarginalLogLikelihood
from torch import Tensor, nn

from .approximation import LaplaceApproximation, LatentPrior
from .log_densities import log_density
from .model import LaplaceGP


class LaplaceMarginalLogLikelihood(MarginalLogLikelihood):
    r"""The evidence of a :class:`~ntk_gp.LaplaceGP` for each label, with the log-priors of its hyperparameters.

    .. math:: \log q(y) = \log p(y \mid \hat f) - \tfrac12 (\hat f - m)^\top K^{-1} (\hat f - m)
        - \tfrac12 \log |I + H K|

    Its gradients with respect to kernel and mean are exact, the mode's dependence on them included (Rasmussen and
    Williams, 2006, section 5.5.1). Like :class:`~gpytorch.mlls.ExactMarginalLogLikelihood` it is divided by the number
    of observations, n. With `expand_at="prior_mean"` it is the evidence of the network's weights around zero, as
    `laplace-torch` has it. Costs the Newton steps from the last mode, two or three in a training loop, and for the
    gradient about as much as two more.

    :param likelihood: The model's likelihood.
    :param model: The :class:`~ntk_gp.LaplaceGP`.

    Example:
        >>> import gpytorch, torch
        >>> from ntk_gp import LogisticLikelihood, NetworkMean, NTKKernel
        >>> class Classifier(LaplaceGP):
        ...     def __init__(self, x, labels, network):
        ...         super().__init__(x, labels, LogisticLikelihood())
        ...         self.mean_module = NetworkMean(network)
        ...         self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network, normalize=True))
        ...     def forward(self, x):
        ...         return MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x, labels = torch.randn(10, 2), torch.arange(10) % 2
        >>> model = Classifier(x, labels, network)
        >>> mll = LaplaceMarginalLogLikelihood(model.likelihood, model)
        >>> loss = -mll(model(x), labels)
        >>> loss.backward()
    """

    model: LaplaceGP

    def __init__(self, likelihood: nn.Module, model: LaplaceGP):
        if not isinstance(model, LaplaceGP):
            raise TypeError(f"Expected an ntk_gp.LaplaceGP, got {type(model).__name__}.")
        super().__init__(likelihood, model)
        self._last: Tensor | None = None

    def forward(self, function_dist: MultivariateNormal, target: Tensor, *params: Any, **kwargs: Any) -> Tensor:
        """:math:`\\log q(y) / n`, ().

        :param function_dist: The prior of the latent function at the training inputs: what the model returns in train
            mode.
        :param target: The labels, (n,).
        """
        if not self.model.training:
            raise RuntimeError("The model is in eval mode, where it returns the posterior. Call model.train() first.")
        if not isinstance(function_dist, MultivariateNormal):
            raise TypeError(f"Expected what the model returns in train mode, got {type(function_dist).__name__}.")
        density = log_density(self.likelihood, target)
        prior = LatentPrior(function_dist, density)
        at_prior_mean = self.model.expand_at == "prior_mean"
        approximation = LaplaceApproximation(prior, density, at_prior_mean, self._last)
        self._last = approximation.position.coordinates
        evidence = approximation.log_evidence()
        for added in self.model.added_loss_terms():
            evidence = evidence + added.loss(*params)
        for _, module, prior_of, closure, _ in self.model.named_priors():
            evidence = evidence + prior_of.log_prob(closure(module)).sum()
        return (evidence / len(target)).to(function_dist.loc.dtype)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}
