"""Predictions averaged over a model's hyperparameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ExactGP
from torch import Tensor

from .. import memory, settings
from .laplace import WeightedDraws, weighted_draws
from .mixture import Mixture, marginals_of
from .unconstrained import Hyperparameters, working_copy

# Beyond so many labels, the search for other modes is kept short: each step takes long, and there are fewer of them.
_MANY = 500
# Points that are predicted together: covariances of all pairs of them are formed, for every draw.
_POINTS = 500

# What is predicted from a model's posterior: that itself, or observations.
_Outcome = Callable[[ExactGP, MultivariateNormal], MultivariateNormal]


def _latent(model: ExactGP, posterior: MultivariateNormal) -> MultivariateNormal:
    return posterior


def _observed(args: tuple, kwargs: dict, model: ExactGP, posterior: MultivariateNormal) -> MultivariateNormal:
    return model.likelihood(posterior, *args, **kwargs)


class AveragedPredictions:
    """What is predicted from weighted models: those of :class:`Averaged`, and of a comparison."""

    _models: Sequence[ExactGP]
    weights: Tensor

    def __call__(self, x: Tensor) -> Mixture:
        """The posterior over the function's values at x (n, d), as a mixture of the models' posteriors."""
        return self._mixture(x, _latent, splits=True)

    def predict(self, x: Tensor, *args: Any, **kwargs: Any) -> Mixture:
        """The same over observations there, through each model's likelihood, with its own noise.

        :param args: For the likelihoods, as these take them: `noise=` (n,) of
            :class:`~gpytorch.likelihoods.FixedNoiseGaussianLikelihood`, the inputs of one whose noise depends on them.
        """
        splits = not args and not kwargs  # they may be of each point
        return self._mixture(x, functools.partial(_observed, args, kwargs), splits)

    def _mixture(self, x: Tensor, outcome: _Outcome, splits: bool) -> Mixture:
        _check_inputs(x)
        weights = self.weights.to(x.device)
        if len(x) <= _POINTS or not splits:
            return Mixture(weights, self._components(x, outcome), dtype=x.dtype)
        marginals = [
            marginals_of([self._posterior(model, block, outcome) for block in x.split(_POINTS)], dim=0)
            for model in self._prepared()
        ]
        means, variances = (torch.stack(each) for each in zip(*marginals, strict=True))
        return Mixture(weights, functools.partial(self._components, x, outcome), x.dtype, (means, variances))

    def _components(self, x: Tensor, outcome: _Outcome) -> list[MultivariateNormal]:
        """Each model's posterior at x."""
        return [self._posterior(model, x, outcome) for model in self._prepared()]

    def _prepared(self) -> Iterator[ExactGP]:
        """The models. What a copy prepares goes with it, and other threads do not see it go."""
        keeps = _is_kept(self._models)
        for model in settings.progress(list(self._models), "Predictions of each draw"):
            yield model if keeps else copy.copy(model)

    @staticmethod
    def _posterior(model: ExactGP, x: Tensor, outcome: _Outcome) -> MultivariateNormal:
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return outcome(model, model(x.double()))


class Averaged(AveragedPredictions):
    """A model's predictions averaged over the posterior of its hyperparameters; made by :func:`ntk_gp.averaged`.

    It stays as it was made: later changes of the model have no effect on it.

    :ivar weights: Of the draws, (S,), that add up to one.
    :ivar draws: The hyperparameters drawn, by name: (S, *shape) each.
    :ivar effective_sample_size: How many draws of equal weight would be as good.
    :ivar log_evidence: log p(y), with the hyperparameters integrated out; None where that is not defined.
    :ivar log_evidence_error: Its standard error, from the weights' spread; None with it.
    :ivar no_evidence_because: Why there is none: which parameter has no proper prior.
    """

    log_evidence: float | None
    log_evidence_error: float | None

    def __init__(self, hyperparameters: Hyperparameters, draws: WeightedDraws):
        self.weights = draws.weights
        self.effective_sample_size = draws.effective_sample_size
        self.no_evidence_because = hyperparameters.without_proper_prior()
        has_evidence = self.no_evidence_because is None
        self.log_evidence = draws.log_integral if has_evidence else None
        self.log_evidence_error = draws.log_integral_error if has_evidence else None
        values, models = [], []
        for u in draws.u:
            hyperparameters.set(u)
            values.append(hyperparameters.values())
            models.append(_component(hyperparameters.model))
        self._models = models
        self.draws = {name: torch.stack([each[name] for each in values]) for name in values[0]}
        self._targets = hyperparameters.model.train_targets

    def __repr__(self) -> str:
        return (
            f"Averaged({len(self.weights)} draws, effective_sample_size={self.effective_sample_size:.1f}, "
            f"log_evidence={self.log_evidence})"
        )


def averaged(model: ExactGP, draws: int = 32, seed: int | None = None) -> Averaged:
    r"""Averages a model's predictions over its hyperparameters, instead of taking the likeliest ones.

    With few labels many hyperparameters explain the data about as well, and the likeliest alone are too sure of
    themselves. Their posterior is approximated around its mode, in coordinates without constraints (logarithms of what
    is positive), by a Gaussian; draws from it are weighted by their exact density over the Gaussian's, so that what
    comes out is as exact as the effective number of draws allows. Priors count as they are registered
    (`ntk_gp.priors` has weak ones that are scaled to the data); what has none is flat in these coordinates.

    The model itself is not changed; a copy in float64 is worked on, which shares the network's tensors and all that is
    kept of its kernel. Costs a search for the mode, of some tens of gradients of the marginal likelihood, 2 gradients
    for each hyperparameter and `draws` marginal likelihoods; and `draws` predictions whenever it predicts.

        >>> from ntk_gp.averaging import averaged
        >>> from ntk_gp.priors import scale_to_data
        >>> import gpytorch
        >>> class GP(gpytorch.models.ExactGP):
        ...     def __init__(self, x, y):
        ...         super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        ...         self.mean_module = gpytorch.means.ZeroMean()
        ...         self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel())
        ...     def forward(self, x):
        ...         return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> x = torch.linspace(0, 1, 10).unsqueeze(-1)
        >>> gp = GP(x, (6 * x).sin().squeeze(-1))
        >>> _ = scale_to_data(gp)
        >>> average = averaged(gp, draws=16, seed=0)
        >>> average.predict(torch.rand(3, 1)).quantile(0.95).shape
        torch.Size([3])

    :param model: An ExactGP with a Gaussian likelihood and training data (n, d), with one output or several, in train
        or eval mode. Its present hyperparameters are where the search begins.
    :param draws: How many draws.
    :param seed: Of the draws. (Default: from torch's random numbers.)
    :return: What maps x (n, d) to a :class:`~ntk_gp.averaging.Mixture` over the function's values, by `predict` over
        observations.
    :raises TypeError: If the model is no ExactGP.
    :raises ValueError: If it has no data, batches, or no hyperparameters.
    """
    if draws < 1:
        raise ValueError(f"Expected at least one draw, got {draws}.")
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    with torch.inference_mode(False):
        hyperparameters = Hyperparameters(working_copy(model))
        found = weighted_draws(
            hyperparameters.log_density,
            hyperparameters.value,
            hyperparameters.starts(),
            draws,
            seed,
            other_starts=4 if hyperparameters.model.train_targets.numel() <= _MANY else 1,
        )
        return Averaged(hyperparameters, found)


def _component(model: ExactGP) -> ExactGP:
    """A copy with the hyperparameters as they are now, that shares whatever has none: data, networks, caches."""
    shared: list[Any] = [*model.train_inputs, model.train_targets]
    shared += [module for module in model.modules() if not any(True for _ in module.parameters())]
    memo: dict[int, Any] = {id(each): each for each in shared}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


def _is_kept(models: Sequence[ExactGP]) -> bool:
    """Whether what the models prepare for predictions, about two matrices each, may stay until the next one."""
    (x, *_), y = models[0].train_inputs, models[0].train_targets
    return 2 * 8 * len(models) * y.numel() ** 2 <= memory.CACHES.bytes(x.device)


def _check_inputs(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"Expected a floating-point tensor of inputs (n, d), got {x!r:.80}.")
    if x.dim() > 2:
        raise ValueError(
            f"Expected inputs (n, d), got {tuple(x.shape)}: batches are predicted one after the other, or flattened to "
            "one."
        )
