"""Likelihoods whose noise a trained network tells."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.priors import Prior
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Size, Tensor, nn

from .._compat import GaussianLikelihoodBase
from ..means import NetworkMean
from ..network import InputDtype, InputShape, Output


class NetworkNoise(nn.Module):
    """The noise that one output of a network tells as its logarithm, at training and test inputs alike.

    :param network: The trained network; a frozen copy is kept.
    :param noise_output: The output that is the logarithm of the noise variance.
    :param inputs: `input_shape` and `input_dtype`, as for :class:`~ntk_gp.NTKKernel`.
    """

    def __init__(self, network: nn.Module, noise_output: Output, **inputs: Any):
        super().__init__()
        self.log_variance = NetworkMean(network, output=noise_output, **inputs)
        outputs = self.log_variance.network.outputs
        if outputs.are_tasks or outputs.is_batch or noise_output is None:
            raise ValueError(f"noise_output must be one output, by its index or name, got {noise_output!r}.")

    def forward(self, x: Tensor) -> Tensor:
        """exp f(x), (*batch, n, d) to (*batch, n)."""
        log_variance = self.log_variance(x)
        variance = log_variance.exp()
        bad = ~(variance.isfinite() & (variance > 0))
        if bad.any():
            first = log_variance[bad].flatten()[0].item()
            raise ValueError(
                f"The network's noise is no positive finite number in {variance.dtype} at {int(bad.sum())} inputs: its "
                f"logarithm there is {first:.4g}. Expected the logarithm of a variance as that output; compute in "
                "float64, or bound that output in the network."
            )
        return variance


class NetworkNoiseLikelihood(GaussianLikelihoodBase):
    r"""Gaussian noise whose variance a trained network tells: :math:`\sigma^2(x) = c\, \exp f_j(x)`.

    For networks with a head for the mean and one for the logarithm of the noise variance, trained together by a
    Gaussian likelihood; so are those of the malaria maps of Maddox, Tang, Moreno, Wilson and Damianou, "Fast Adaptation
    with Linearized Neural Networks" (AISTATS 2021). The network is frozen; c, one by default, can be learned. With c
    held at one it is the published form.

    Noise depends on the inputs, so they go with every call, as for GPyTorch's `HeteroskedasticNoise`:
    `likelihood(model(x), x)` and `mll(model(x), y, x)`.

    :param network: The trained network; it is not changed.
    :param noise_output: Index j of the output that is the logarithm of the noise variance, and the way to it, as
        `output` is for :class:`~ntk_gp.NTKKernel`.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param noise_factor_prior: Prior over c.
    :param noise_factor_constraint: Constraint on it. (Default: :class:`~gpytorch.constraints.Positive`.)
    :param learn_factor: Whether c is a parameter; otherwise it stays one.

    :ivar torch.Tensor noise_factor: c, (1,).

    :raises ValueError: For an index that is none, or that the network has no output for (at the first inputs); and
        where the variance overflows or is zero.
    :raises RuntimeError: Where it is called without inputs.

    Example:
        >>> import gpytorch
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        >>> likelihood, x = NetworkNoiseLikelihood(network, noise_output=1), torch.randn(5, 2)
        >>> prior = gpytorch.distributions.MultivariateNormal(torch.zeros(5), torch.eye(5))
        >>> torch.allclose(likelihood(prior, x).variance, 1 + network(x)[:, 1].exp(), atol=1e-5)
        True
    """

    def __init__(
        self,
        network: nn.Module,
        noise_output: Output,
        *,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        noise_factor_prior: Prior | None = None,
        noise_factor_constraint: Interval | None = None,
        learn_factor: bool = True,
    ):
        super().__init__(
            noise_covar=NetworkNoise(network, noise_output, input_shape=input_shape, input_dtype=input_dtype)
        )
        log_variance = self.noise_covar.log_variance.network
        constraint = noise_factor_constraint or Positive()
        raw = constraint.inverse_transform(torch.ones(1, dtype=log_variance.dtype, device=log_variance.device))
        self.register_parameter("raw_noise_factor", nn.Parameter(raw, requires_grad=learn_factor))
        self.register_constraint("raw_noise_factor", constraint)
        if noise_factor_prior is not None:
            self.register_prior("noise_factor_prior", noise_factor_prior, _get_factor, _set_factor)

    @property
    def noise_factor(self) -> Tensor:
        return self.raw_noise_factor_constraint.transform(self.raw_noise_factor)

    @noise_factor.setter
    def noise_factor(self, value: float | Tensor) -> None:
        _set_factor(self, value)

    def noise_at(self, x: Tensor) -> Tensor:
        """c exp f_j(x): (*batch, n, d) to (*batch, n)."""
        variance = self.noise_covar(x)
        return variance * self.noise_factor.to(variance)

    def _shaped_noise_covar(
        self, base_shape: Size, *params: Any, noise: Tensor | None = None, **_: Any
    ) -> LinearOperator:
        if noise is not None:
            return DiagLinearOperator(noise)
        inputs = params[0] if params else None
        inputs = inputs[0] if isinstance(inputs, list | tuple) and inputs else inputs
        if not isinstance(inputs, Tensor):
            raise RuntimeError(
                "The noise depends on the inputs, and none came: call likelihood(model(x), x), and mll(model(x), y, x)."
            )
        return DiagLinearOperator(self.noise_at(inputs).expand(base_shape))


def _get_factor(likelihood: NetworkNoiseLikelihood) -> Tensor:
    return likelihood.noise_factor


def _set_factor(likelihood: NetworkNoiseLikelihood, value: float | Tensor) -> None:
    raw = likelihood.raw_noise_factor
    value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
    likelihood.initialize(raw_noise_factor=likelihood.raw_noise_factor_constraint.inverse_transform(value.reshape(1)))
