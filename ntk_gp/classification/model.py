"""The model: a Gaussian process with labels, made as an ExactGP is."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import Likelihood
from gpytorch.models import GP
from linear_operator import to_linear_operator
from torch import Tensor

from .. import settings
from .approximation import LaplaceApproximation, LatentPrior
from .left_out import without_own_labels
from .log_densities import log_density
from .posterior import LatentPosterior
from .probabilities import Link


class LaplaceGP(GP):
    r"""A Gaussian process classifier by Laplace's approximation.

    It is made as a :class:`~gpytorch.models.ExactGP` is: a subclass has a mean and a kernel, and `forward` returns the
    prior of the latent function, a :class:`~gpytorch.distributions.MultitaskMultivariateNormal` with a task for each
    class, or a :class:`~gpytorch.distributions.MultivariateNormal` for two classes and one output. In train mode a call
    is that prior; in eval mode it is the posterior of the latent function, which is taken for the normal distribution
    :math:`N(\hat f, (K^{-1} + H)^{-1})` with the mode :math:`\hat f` and the curvature H of the log-likelihood there.
    With :class:`~ntk_gp.NetworkMean` and :class:`~ntk_gp.NTKKernel` that is the linearised network with Laplace's
    approximation over its weights (Immer, Korzepa and Bauer, "Improving predictions of Bayesian neural nets via local
    linearization", AISTATS 2021).

    Everything is computed in float64, in function space (n·(C − 1) rows) or, for a kernel that is linear in the
    network's weights, in weight space (P rows), whichever is cheaper; :class:`ntk_gp.settings.solver` sets one. Costs a
    factorisation in each Newton step: 4 to 12 at ordinary scales, 30 at a scale of 10⁹. Predictions are differentiable
    with respect to the inputs, the evidence with respect to the hyperparameters.

    :param train_inputs: The labelled inputs, (n, d) or (n,).
    :param train_targets: Their labels, (n,): integers from 0 to C − 1.
    :param likelihood: `gpytorch.likelihoods.SoftmaxLikelihood(num_classes=C, mixing_weights=False)`;
        :class:`~ntk_gp.LogisticLikelihood` for two classes by a logit; or `gpytorch.likelihoods.BernoulliLikelihood`,
        whose link is the normal distribution function.
    :param expand_at: Where the log-likelihood is expanded to second order: `"mode"`, at the mode of the posterior, for
        labels that the network has not seen; or `"prior_mean"`, at the prior mean, which stays the mean: for the labels
        that the network was trained on, as `laplace-torch` does, since their mode is where training ended.

    :raises TypeError: For another likelihood, or inputs that are no tensor.
    :raises ValueError: For labels that are not such integers, inputs that are NaN, other shapes, and another
        `expand_at`.
    :raises MemoryError: At the first evaluation, if neither space fits in :class:`ntk_gp.settings.memory_budget`.

    Example:
        >>> import gpytorch
        >>> from ntk_gp import NetworkMean, NTKKernel
        >>> class Classifier(LaplaceGP):
        ...     def __init__(self, x, labels, network):
        ...         likelihood = gpytorch.likelihoods.SoftmaxLikelihood(num_classes=3, mixing_weights=False)
        ...         super().__init__(x, labels, likelihood)
        ...         self.mean_module = NetworkMean(network, output="all")
        ...         self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network, output="all"))
        ...     def forward(self, x):
        ...         return gpytorch.distributions.MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        >>> model = Classifier(torch.randn(9, 2), torch.arange(9) % 3, network).eval()
        >>> model.predict_proba(torch.randn(4, 2)).shape
        torch.Size([4, 3])
    """

    def __init__(self, train_inputs: Tensor, train_targets: Tensor, likelihood: Likelihood, *, expand_at: str = "mode"):
        super().__init__()
        if expand_at not in ("mode", "prior_mean"):
            raise ValueError(f"expand_at must be 'mode' or 'prior_mean', got {expand_at!r}.")
        self.expand_at = expand_at
        self.likelihood = likelihood
        self._posterior: tuple[list[Tensor], LatentPosterior] | None = None
        self.train_inputs: tuple[Tensor, ...] = ()
        self.train_targets = torch.empty(0)
        self.set_train_data(train_inputs, train_targets, strict=False)

    def set_train_data(self, inputs: Tensor | None = None, targets: Tensor | None = None, strict: bool = True) -> None:
        """Other training data, at the same hyperparameters.

        :param strict: Whether shape, dtype and device must be those of the present ones.
        """
        x = self.train_inputs[0] if inputs is None else _checked_inputs(inputs)
        labels = self.train_targets if targets is None else targets
        if strict:
            _check_alike("inputs", x, self.train_inputs[0])
            _check_alike("targets", labels, self.train_targets)
        if len(labels) != len(x):
            raise ValueError(f"Expected a label for each of {len(x)} inputs, got {len(labels)} labels.")
        log_density(self.likelihood, labels)
        self.train_inputs, self.train_targets = (x,), labels
        self._clear_cache()

    def _apply(self, fn: Any, recurse: bool = True) -> LaplaceGP:
        self.train_inputs = tuple(fn(x) for x in self.train_inputs)
        self.train_targets = fn(self.train_targets)
        self._clear_cache()
        return super()._apply(fn, recurse)

    def _clear_cache(self) -> None:
        self._posterior = None

    def __call__(self, x: Tensor, **kwargs: Any) -> MultivariateNormal:
        """The prior of the latent function in train mode; its posterior in eval mode, at (*batch, m, d)."""
        x = _checked_inputs(x, batches=True)
        if self.training:
            if gpytorch_settings.debug.on() and not torch.equal(x, self.train_inputs[0]):
                raise RuntimeError("You must train on the training inputs! In eval mode, any inputs will do.")
            return super().__call__(x, **kwargs)
        if gpytorch_settings.prior_mode.on():
            return super().__call__(x, **kwargs)
        posterior, known = self.latent_posterior(), self.train_inputs[0]
        joint = super().__call__(torch.cat([known.expand(*x.shape[:-2], *known.shape), x], dim=-2), **kwargs)
        rows = posterior.approximation.prior.mean.numel()
        covariance = to_linear_operator(joint.lazy_covariance_matrix)
        shift, posterior_covariance = posterior.prediction(covariance[..., rows:, rows:], covariance[..., rows:, :rows])
        mean = (joint.loc[..., rows:] + shift).reshape(*x.shape[:-1], *joint.event_shape[1:])
        return type(joint)(mean, posterior_covariance)

    @property
    def approximation(self) -> LaplaceApproximation:
        """Laplace's approximation at the training inputs, at the present hyperparameters: `approximation.latent_mean`
        is f̂, `approximation.steps` the number of Newton steps, `approximation.log_evidence()` the evidence."""
        return self.latent_posterior().approximation

    def latent_posterior(self) -> LatentPosterior:
        """What predictions come from: made for the first one, and again where a parameter has changed since."""
        state = [*self.parameters(), *self.train_inputs, self.train_targets]
        kept = self._posterior
        if kept is None or not _are_equal(kept[0], state):
            with torch.inference_mode(False), torch.no_grad():
                density = log_density(self.likelihood, self.train_targets)
                prior = LatentPrior(super().__call__(*self.train_inputs), density)
                approximation = LaplaceApproximation(prior, density, self.expand_at == "prior_mean")
                made = LatentPosterior(approximation)
                kept = self._posterior = ([tensor.detach().clone() for tensor in state], made)
        return kept[1]

    def predict_proba(
        self,
        x: Tensor,
        method: str = "probit",
        *,
        samples: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""The probabilities of the classes at x, averaged over the latent function.

        Of the posterior only the C×C covariance of each point with itself is computed, some points at a time.

        :param x: (*batch, m, d).
        :param method: `"probit"`: softmax of :math:`\mu_c / \sqrt{1 + \pi v_c / 8}` (MacKay, "The evidence framework
            applied to classification networks", Neural Computation 1992), which is approximate, and leaves out what
            classes have in common; exact for a :class:`~gpytorch.likelihoods.BernoulliLikelihood`. `"monte_carlo"`: the
            average over draws of all classes together, with an error of at most :math:`1 / (2\sqrt{\text{samples}})`.
        :param samples: How many draws; the same ones for all points.
        :param generator: The source of randomness. (Default: torch's own, on the CPU.)
        :return: (*batch, m, C); for two classes with one output, the probability of label 1, (*batch, m).
        """
        if self.training:
            raise RuntimeError("The model is in train mode. Call model.eval() first.")
        x = _checked_inputs(x, batches=True)
        link = Link(self.likelihood, method, samples, generator)
        posterior = self.latent_posterior()
        size = posterior.points_per_block()
        with torch.no_grad():
            blocks = settings.progress(x.reshape(-1, x.shape[-1]).split(size), "Probabilities")
            found = torch.cat([link(*self._marginals(block)) for block in blocks])
        return found.reshape(*x.shape[:-1], *found.shape[1:]).to(posterior.approximation.prior.dtype)

    def leave_one_out_proba(
        self, method: str = "probit", *, samples: int = 1000, generator: torch.Generator | None = None
    ) -> Tensor:
        r"""The probabilities of the classes at each training input, by the posterior without its own label.

        Their logarithms at the labels, summed, are a score to choose a scale or the layers by, as
        :class:`~gpytorch.mlls.LeaveOneOutPseudoLikelihood` is in regression. It has no gradients: compare a few values.
        Each label's own term is divided out of the approximation, which is not expanded anew: no model is fitted again,
        and for labels that decide much by themselves it is not what fitting without them would give.

        Costs what one evaluation of :meth:`predict_proba` at the training inputs does.

        :param method: As for :meth:`predict_proba`, and `samples` and `generator` with it.
        :return: (n, C); for two classes with one output, the probability of label 1, (n,).
        """
        if self.training:
            raise RuntimeError("The model is in train mode. Call model.eval() first.")
        link = Link(self.likelihood, method, samples, generator)
        approximation = self.approximation
        with torch.no_grad():
            return link(*without_own_labels(approximation)).to(approximation.prior.dtype)

    def _marginals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The latent posterior at each of some points by itself: mean, (m, C), and covariance, (m, C, C)."""
        posterior = self.latent_posterior()
        found = None if posterior.covariance is None else posterior.marginals(super().__call__(x))
        if found is not None:
            return found
        distribution = self(x)
        mean = distribution.loc.double().reshape(len(x), -1)
        covariance = distribution.covariance_matrix.double().reshape(*mean.shape, *mean.shape)
        return mean, covariance.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_posterior": None}


def _checked_inputs(x: Any, batches: bool = False) -> Tensor:
    x = x[0] if isinstance(x, (list, tuple)) and len(x) == 1 else x
    if not isinstance(x, Tensor):
        raise TypeError(f"Expected inputs as one tensor, got {type(x).__name__}.")
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.dim() < 2 or (x.dim() > 2 and not batches) or x.shape[-2] == 0:
        expected = "(*batch, m, d)" if batches else "(n, d) or (n,)"
        raise ValueError(f"Expected inputs of shape {expected}, at least one, got {tuple(x.shape)}.")
    if not torch.isfinite(x).all():
        row = (~torch.isfinite(x)).nonzero()[0, -2]
        raise ValueError(f"Inputs of shape {tuple(x.shape)} have NaN or infinite values, first in row {int(row)}.")
    return x


def _check_alike(name: str, new: Tensor, old: Tensor) -> None:
    for attribute in ("shape", "dtype", "device"):
        expected, found = getattr(old, attribute), getattr(new, attribute)
        if expected != found:
            raise RuntimeError(
                f"Cannot modify {attribute} of {name} (expected {expected}, found {found}); strict=False allows it."
            )


def _are_equal(known: list[Tensor], tensors: list[Tensor]) -> bool:
    return len(known) == len(tensors) and all(
        one.device == other.device and torch.equal(one, other) for one, other in zip(known, tensors, strict=True)
    )
