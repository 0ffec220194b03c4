"""Likelihoods for several outputs together that GPyTorch has for one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.likelihoods.noise_models import FixedGaussianNoise
from linear_operator.operators import DiagLinearOperator
from torch import Size, Tensor

from ._compat import is_interleaved


class FixedNoiseMultitaskGaussianLikelihood(FixedNoiseGaussianLikelihood):
    r"""Known noise for each point and each output of a multitask model, :math:`y_{ic} \sim N(f_{ic}, \sigma_{ic}^2)`.

    What :class:`~gpytorch.likelihoods.FixedNoiseGaussianLikelihood` is for one output: beside
    :class:`~gpytorch.distributions.MultitaskMultivariateNormal` that one raises, or adds nothing. For `output="all"`
    and lists of outputs; a batch of outputs (`output="batch"`) takes GPyTorch's, with noise (C, n).

    At other points than those of training the noise is given, `likelihood(model(x), noise=noise)`, as for fantasies.

    :param noise: The variances at the training points, (*batch, n, C), in units of the targets squared. Those below
        `gpytorch.settings.min_fixed_noise` are raised to it, with a warning.
    :param learn_additional_noise: Learn one more variance, the same for all points and outputs, and add it.
    :param batch_shape: Of that one.
    :param kwargs: `noise_prior` and `noise_constraint` of that one.

    :ivar torch.Tensor noise: The sum of both.

    :raises ValueError: If the noise has one dimension only; when it is used, if it does not fit the points or outputs.

    Example:
        >>> likelihood = FixedNoiseMultitaskGaussianLikelihood(torch.full((25, 3), 0.01))
        >>> prior = MultitaskMultivariateNormal(torch.zeros(25, 3), torch.eye(75))
        >>> likelihood(prior).variance.shape
        torch.Size([25, 3])
    """

    def __init__(
        self,
        noise: Tensor,
        learn_additional_noise: bool = False,
        batch_shape: Size | None = None,
        **kwargs: Any,
    ):
        _check_noise(noise)
        super().__init__(noise, learn_additional_noise, Size() if batch_shape is None else batch_shape, **kwargs)

    @property
    def noise(self) -> Tensor:
        additional = self.second_noise
        return self.noise_covar.noise + (additional.unsqueeze(-1) if isinstance(additional, Tensor) else additional)

    @noise.setter
    def noise(self, value: Tensor) -> None:
        _check_noise(value)
        self.noise_covar.noise = value

    def marginal(
        self, function_dist: MultitaskMultivariateNormal, *params: Any, **kwargs: Any
    ) -> MultitaskMultivariateNormal:
        """The distribution of observations."""
        if not isinstance(function_dist, MultitaskMultivariateNormal):
            raise TypeError(
                f"Expected a MultitaskMultivariateNormal, got {type(function_dist).__name__}. For one output, or a "
                "batch of outputs, there is gpytorch.likelihoods.FixedNoiseGaussianLikelihood."
            )
        interleaved = is_interleaved(function_dist)
        noise = self._shaped_noise_covar(function_dist.mean.shape, *params, interleaved=interleaved, **kwargs)
        return function_dist.__class__(
            function_dist.mean, function_dist.lazy_covariance_matrix + noise, interleaved=interleaved
        )

    def _shaped_noise_covar(
        self, base_shape: Size, *params: Any, interleaved: bool = True, noise: Tensor | None = None, **kwargs: Any
    ) -> DiagLinearOperator:
        """Diagonal, (*batch, n·C, n·C), point-major; output-major if not interleaved."""
        known = self.noise_covar.noise if noise is None else noise
        if known.dim() < 2 or known.shape[-2:] != base_shape[-2:]:
            whose = "that of the training points has" if noise is None else "got"
            raise ValueError(
                f"Expected noise for (points, outputs) = {tuple(base_shape[-2:])}, {whose} shape {tuple(known.shape)}. "
                "Give it for the points that are asked for: likelihood(model(x), noise=noise)."
            )
        if self.second_noise_covar is not None:
            known = known + self.second_noise_covar.noise.unsqueeze(-1)
        return DiagLinearOperator((known if interleaved else known.mT).flatten(-2))

    def get_fantasy_likelihood(self, **kwargs: Any) -> FixedNoiseMultitaskGaussianLikelihood:
        """The likelihood with more points.

        :param noise: Theirs, (*batch, m, C).
        """
        if "noise" not in kwargs:
            raise RuntimeError("Fantasies need the noise of their points: give noise=, of shape (*batch, m, C).")
        old, new = self.noise_covar.noise, kwargs["noise"]
        _check_noise(new)
        batch_shape = torch.broadcast_shapes(old.shape[:-2], new.shape[:-2])
        both = [part.expand(*batch_shape, *part.shape[-2:]) for part in (old, new)]
        likelihood = copy.deepcopy(self)
        likelihood.noise_covar = FixedGaussianNoise(torch.cat(both, dim=-2))
        return likelihood


def _check_noise(noise: Tensor) -> None:
    if noise.dim() < 2:
        raise ValueError(
            f"Expected a variance for each point and output, (*batch, n, C), got shape {tuple(noise.shape)}. The same "
            "for all outputs: noise.unsqueeze(-1).expand(-1, C)."
        )
