"""The ready model: mean, kernels, priors and averaging put together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, Likelihood
from gpytorch.models import ExactGP
from torch import Tensor, nn

from .averaging import Averaged, Mixture, averaged
from .averaging.laplace import best
from .averaging.unconstrained import Hyperparameters, working_copy
from .kernels import FeatureKernel, GainKernel, NTKKernel, TangentMaternKernel
from .means import NetworkMean
from .network import InputDtype, InputShape, Output, ParameterSelection
from .priors import register_log_prior, scale_to_data

# The shares of what the network leaves unexplained that the terms start with, beyond gain and offset where it is not
# theirs: the network's own linear model is expected to explain it; gain and offset have 0.3 each.
SHARES = {"gain": 0.6, "tangent": 1.0, "inputs": 0.1, "features": 0.1, "metric": 0.1}
_NOISE = 0.1
# Predictions outside of the source inputs' range by more than this part of it are told.
_MARGIN = 0.05


class AdaptedGP(ExactGP):
    r"""A trained network, adapted to labelled points: the recipe that is taken where nothing else is known.

    The prior mean is the network. The kernel is a sum of terms, each for a way in which the new domain may differ:

    =============  ============================================================================  ===============
    `"gain"`       the network is right up to a factor and a level: :class:`~ntk_gp.GainKernel`  0.3 v₀ each
    `"tangent"`    other weights of the network: :class:`~ntk_gp.NTKKernel`                      v₁
    `"inputs"`     anything smooth in the inputs: Matérn-3/2                                     0.1 v₁
    `"features"`   anything smooth in the penultimate layer's features: Matérn-3/2               0.1 v₁
    `"metric"`     anything smooth in the tangent kernel's metric: Matérn-3/2                    0.1 v₁
    =============  ============================================================================  ===============

    The last column is the variance that each is expected to contribute, of :math:`v_0 = \operatorname{mean}\,(y -
    f(x))^2` and of :math:`v_1`, what is left of that beside the best gain and offset; the noise is expected to be
    0.1 v₁. These are medians of log-normal priors 1.5 e-folds wide; lengthscales
    have the median distance between the training inputs, one e-fold wide (:func:`~ntk_gp.scale_to_data`).
    :meth:`predict` averages over the hyperparameters that the data leave open.

    It is an ordinary ExactGP: `gp(x)`, GPyTorch's training loop, BoTorch's `fit_gpytorch_mll` and acquisition functions
    work. Much the same is written in fifteen lines (`docs/recipe.md`).

    :param train_x: The labelled inputs, (n, d), or (n, *input_shape).
    :param train_y: Their targets, (n,) or (n, 1).
    :param network: The trained network; it is not changed.
    :param likelihood: With noise to learn. (Default: a :class:`~gpytorch.likelihoods.GaussianLikelihood`.)
    :param terms: Which terms, in which order.
    :param parameters: The parameters that the network is linearised in, see :class:`~ntk_gp.NTKKernel`.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: Index of the output to take of a network with several, and the way to it, likewise.
    :param source_inputs: What the network was trained on, (m, d), or (lowest, highest) for each column: :meth:`outside`
        then tells inputs outside of its range.

    :ivar terms: The names of the terms that there are. Their kernels are `gp.term(name)`.
    :ivar unexplained: v₀.

    :raises ValueError: If data are empty, not finite, have batches or several outputs, or the network explains the
        targets exactly; for unknown terms; and where the kernels do.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> x = torch.randn(12, 2)
        >>> gp = AdaptedGP(x, x.sin().sum(-1), network).fit()
        >>> prediction = gp.predict(torch.randn(5, 2), draws=8)
        >>> prediction.mean.shape, prediction.quantile(0.9).shape
        (torch.Size([5]), torch.Size([5]))
    """

    num_outputs = 1  # as BoTorch asks

    def __init__(
        self,
        train_x: Tensor,
        train_y: Tensor,
        network: nn.Module,
        *,
        likelihood: Likelihood | None = None,
        terms: Sequence[str] = tuple(SHARES),
        parameters: ParameterSelection = None,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        source_inputs: Tensor | tuple[Any, Any] | None = None,
    ):
        options: dict[str, Any] = {"input_shape": input_shape, "input_dtype": input_dtype, "output": output}
        mean = NetworkMean(network, **options)
        x, y = _checked_data(mean.network.flattened(train_x), train_y)
        super().__init__(x, y, likelihood or GaussianLikelihood(noise_constraint=Positive()))
        self.mean_module = mean
        made = _make_terms(_checked_terms(terms), x, network, parameters, options)
        self.terms = tuple(made)
        self.covar_module = AdditiveKernel(*made.values())
        low, high = _source_range(source_inputs, x)
        self.register_buffer("source_low", low)
        self.register_buffer("source_high", high)
        self.to(x)
        self._average: tuple[list[Tensor], tuple, Averaged] | None = None
        shares = [SHARES[name] for name in self.terms]
        self.unexplained = scale_to_data(self, noise=_NOISE, shares=shares, width=1.5)
        if "inputs" in self.terms:
            _set_to_median_distance(self.term("inputs").base_kernel, self.train_inputs[0])

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def __call__(self, x: Tensor, **kwargs: Any) -> MultivariateNormal:
        """The prior in train mode, the posterior in eval mode, at (*batch, n, d) or (*batch, n, *input_shape)."""
        return super().__call__(self.mean_module.network.flattened(x), **kwargs)

    def term(self, name: str) -> Kernel:
        """The kernel of a term, scaled."""
        if name not in self.terms:
            raise ValueError(f"There is no term {name!r}: they are {', '.join(map(repr, self.terms))}.")
        return self.covar_module.kernels[self.terms.index(name)]

    def fit(self) -> AdaptedGP:
        """Sets the hyperparameters to their likeliest values given data and priors, GPyTorch's objective; and goes to
        eval mode.

        The search starts from where they are, and from the priors' medians. :meth:`predict` needs no fit.

        :return: The model itself.
        """
        hyperparameters = Hyperparameters(working_copy(self), jacobians=False)
        optimum = best(hyperparameters.log_density, hyperparameters.starts())
        if not optimum.has_converged:
            warnings.warn(
                "The search for the likeliest hyperparameters has not converged. The best ones so far are set; "
                "predict() averages over them in any case.",
                RuntimeWarning,
                stacklevel=2,
            )
        hyperparameters.set(optimum.u)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter, found in zip(trained, hyperparameters.parameters, strict=True):
                parameter.copy_(found)
        return self.train().eval()

    def predict(self, x: Tensor, draws: int = 32, *, seed: int = 0, warn_outside: bool = False) -> Mixture:
        """Predictions of observations at x (n, d), :func:`~ntk_gp.averaged` over the hyperparameters.

        What is averaged is kept until data, hyperparameters, draws or seed change: the first call takes longest.

        :param draws: Of the hyperparameters.
        :param seed: Of the draws.
        :param warn_outside: Warn of inputs that are :meth:`outside`.
        :return: A :class:`~ntk_gp.averaging.Mixture` with mean, variance, quantiles, densities and samples.
        """
        x = self.mean_module.network.flattened(x)
        if warn_outside and (outside := self.outside(x)).any():
            warnings.warn(
                f"{int(outside.sum())} of {len(x)} inputs are outside of what the network was trained on, first in row "
                f"{int(outside.nonzero()[0])}: it knows nothing there, and the error bars rest on the kernels alone.",
                stacklevel=2,
            )
        return self.averaged(draws, seed=seed).predict(x)

    def averaged(self, draws: int = 32, *, seed: int = 0) -> Averaged:
        """The average that :meth:`predict` takes, with its evidence and effective sample size."""
        state = [*self.train_inputs, self.train_targets, *self.parameters(), *self.likelihood.buffers()]
        key = (draws, seed, self.mean_module.network.fingerprint(thorough=True))
        kept = self._average
        if kept is None or kept[1] != key or not _are_equal(kept[0], state):
            made = averaged(self, draws=draws, seed=seed)
            kept = self._average = ([tensor.detach().clone() for tensor in state], key, made)
        return kept[2]

    def outside(self, x: Tensor) -> Tensor:
        """Which inputs (*batch, n, d) are outside of the range of the source inputs, in any column, by more than 5 % of
        it: (*batch, n).

        :raises ValueError: If the model was made without `source_inputs`.
        """
        if self.source_low is None:
            raise ValueError("The model does not know its network's inputs: make it with source_inputs=.")
        x = self.mean_module.network.flattened(x)
        margin = _MARGIN * (self.source_high - self.source_low)
        return ((x < self.source_low - margin) | (x > self.source_high + margin)).any(-1)

    # What BoTorch asks of a model.

    @property
    def batch_shape(self) -> torch.Size:
        return self.train_inputs[0].shape[:-2]

    def posterior(
        self,
        X: Tensor,
        observation_noise: bool | Tensor = False,
        posterior_transform: Callable[..., Any] | None = None,
        **_: Any,
    ) -> Any:
        """The posterior at the present hyperparameters as BoTorch's acquisition functions want it, (*batch, q, d) to a
        `GPyTorchPosterior`; needs the package botorch."""
        try:
            from botorch.posteriors.gpytorch import GPyTorchPosterior
        except ImportError as error:
            raise ImportError(
                "AdaptedGP.posterior needs the package botorch; gp(x) and gp.predict(x) do not."
            ) from error
        distribution = self.eval()(X)
        if isinstance(observation_noise, Tensor):
            distribution = self.likelihood(distribution, X, noise=observation_noise.squeeze(-1))
        elif observation_noise:
            distribution = self.likelihood(distribution, X)
        posterior = GPyTorchPosterior(distribution=distribution)
        return posterior if posterior_transform is None else posterior_transform(posterior=posterior, X=X)

    def transform_inputs(self, X: Tensor, input_transform: Any = None) -> Tensor:
        """X itself: there are no transforms."""
        return X

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> ExactGP:
        """A model with more observations, X (*batch, n, d) and Y (*batch, n, 1), at the same hyperparameters."""
        self.posterior(X.reshape(-1, X.shape[-1])[:1])  # prepares the predictions that it starts from
        return self.get_fantasy_model(self.mean_module.network.flattened(X), Y.squeeze(-1), **kwargs)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_average": None}


def _make_terms(
    names: Sequence[str],
    x: Tensor,
    network: nn.Module,
    parameters: ParameterSelection,
    options: dict[str, Any],
) -> dict[str, Kernel]:
    linear: dict[str, Any] = {**options, "parameters": parameters}
    makers: dict[str, Callable[[], Kernel]] = {
        "gain": lambda: _gain(network, x, options),
        "tangent": lambda: ScaleKernel(NTKKernel(network, normalize=True, **linear)),
        "inputs": lambda: ScaleKernel(MaternKernel(nu=1.5)),
        "features": lambda: ScaleKernel(_on_features(network, x, options)),
        "metric": lambda: ScaleKernel(TangentMaternKernel(network, nu=1.5, **linear)),
    }
    made = {}
    for name in names:
        try:
            made[name] = makers[name]()
        except _CannotServe as error:
            warnings.warn(f"The term {name!r} is left out: {error}", stacklevel=3)
    if not made:
        raise ValueError("No term is left: a kernel needs one. Add 'tangent' or 'inputs' to terms.")
    return made


class _CannotServe(Exception):
    """A term has no meaning for this network, and why."""


def _gain(network: nn.Module, x: Tensor, options: dict[str, Any]) -> Kernel:
    kernel = GainKernel(network, **options)
    if not (kernel.features(x)[:, 0] != 0).any():
        raise _CannotServe("the network is zero at all training inputs, and so is any multiple of it.")
    return kernel


def _on_features(network: nn.Module, x: Tensor, options: dict[str, Any]) -> Kernel:
    kernel = FeatureKernel(network, MaternKernel(nu=1.5), **options)
    try:
        kernel.num_features(x)
    except ValueError as error:
        raise _CannotServe(str(error)) from error
    return kernel


def _set_to_median_distance(kernel: Kernel, x: Tensor) -> None:
    """As the kernels that have a metric of their own do it."""
    distances = torch.pdist(x[:: math.ceil(len(x) / 1000)].double())
    distances = distances[distances > 0]
    if len(distances):
        register_log_prior(kernel, "lengthscale", float(distances.median()), width=1.0)


def _checked_terms(terms: Sequence[str]) -> Sequence[str]:
    names = [terms] if isinstance(terms, str) else list(terms)
    unknown = [name for name in names if name not in SHARES]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(f"Expected some of the terms {', '.join(map(repr, SHARES))}, each once, got {terms!r}.")
    return names


def _checked_data(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    targets = y.squeeze(-1) if y.dim() == 2 and y.shape[-1] == 1 else y
    if x.dim() != 2 or targets.shape != x.shape[:1] or len(x) == 0:
        raise ValueError(
            f"Expected inputs (n, d) and targets (n,) or (n, 1) with n > 0, got {tuple(x.shape)} and {tuple(y.shape)}. "
            "Make a model for each batch; of several outputs, make one for each with output=, or write the model "
            "yourself (docs/recipe.md)."
        )
    if not targets.isfinite().all():
        bad = (~targets.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"{len(bad)} targets are NaN or infinite, first at {bad[:3]}. Remove these points.")
    return x, targets.to(x)


def _source_range(source: Tensor | tuple[Any, Any] | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if source is None:
        return None, None
    if isinstance(source, Tensor):
        flat = source.reshape(len(source), -1).to(x)
        low, high = flat.amin(0), flat.amax(0)
    else:
        low, high = (
            torch.as_tensor(end, dtype=x.dtype, device=x.device).expand(x.shape[-1:]).clone() for end in source
        )
    if low.shape != x.shape[-1:] or not (low <= high).all():
        raise ValueError(
            f"Expected source_inputs (m, {x.shape[-1]}), or (lowest, highest) of each column, got a range from "
            f"{low.tolist()} to {high.tolist()}."
        )
    return low, high


def _are_equal(kept: Sequence[Tensor], present: Sequence[Tensor]) -> bool:
    return len(kept) == len(present) and all(
        one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
        for one, other in zip(kept, present, strict=True)
    )
