"""Weighted mixtures of Gaussian processes' predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from torch import Size, Tensor
from torch.distributions import Distribution, Normal

# Halvings of an interval: as many as float64 has bits, and the exponents' few.
_HALVINGS = 64


class Mixture(Distribution):
    r"""A weighted mixture of Gaussians over the values at n points: :math:`\sum_s w_s N(\mu_s, \Sigma_s)`.

    What is asked for point by point (`mean`, `variance`, `log_prob`, `cdf`, `quantile`) is of each point's own mixture,
    (n,), or (n, C) of several outputs; samples are joint ones over all points.

    :param weights: (S,), that add up to one.
    :param components: S distributions of one shape, of one batch; or a function that makes them, if ever they are asked
        for: their covariances are matrices of n² numbers.
    :param dtype: Of what comes out. (Default: the components'.)
    :param marginals: Their means and variances, (S, n) or (S, n, C) each, where these are known already.
    """

    arg_constraints: dict = {}  # noqa: RUF012 -- as torch.distributions has it
    has_rsample = True

    def __init__(
        self,
        weights: Tensor,
        components: Sequence[MultivariateNormal] | Callable[[], Sequence[MultivariateNormal]],
        dtype: torch.dtype | None = None,
        marginals: tuple[Tensor, Tensor] | None = None,
    ):
        self._made = components if callable(components) else tuple(components)
        self._means, self._variances = marginals_of(self.components) if marginals is None else marginals
        self.weights = weights.to(self._means)
        self.dtype = self._means.dtype if dtype is None else dtype
        super().__init__(batch_shape=self._means.shape[1:], validate_args=False)

    @property
    def components(self) -> tuple[MultivariateNormal, ...]:
        """The S distributions."""
        if callable(self._made):
            self._made = tuple(self._made())
        return self._made

    @property
    def _column(self) -> Tensor:
        """The weights, to be broadcast with (S, n) or (S, n, C)."""
        return self.weights.reshape(-1, *[1] * (self._means.dim() - 1))

    @property
    def _normals(self) -> Normal:
        return Normal(self._means, self._variances.sqrt(), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._mean.to(self.dtype)

    @property
    def _mean(self) -> Tensor:
        return (self._column * self._means).sum(0)

    @property
    def variance(self) -> Tensor:
        """The mean of the variances, and the variance of the means."""
        spread = (self._means - self._mean).square()
        return (self._column * (self._variances + spread)).sum(0).to(self.dtype)

    @property
    def stddev(self) -> Tensor:
        return self.variance.sqrt()

    @property
    def covariance_matrix(self) -> Tensor:
        """Over all points, (n, n); or (n·C, n·C), in the order that the components' have."""
        means = torch.stack([component.loc.reshape(-1) for component in self.components])
        spread = means - self.weights @ means
        within = sum(
            w * component.covariance_matrix for w, component in zip(self.weights, self.components, strict=True)
        )
        return (within + (spread * self.weights.unsqueeze(-1)).mT @ spread).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density of each point's own mixture at `value`, (*sample, n); no joint one."""
        densities = self._normals.log_prob(value.to(self._means).unsqueeze(-self._means.dim()))
        return (densities + self._column.log()).logsumexp(-self._means.dim()).to(self.dtype)

    def cdf(self, value: Tensor) -> Tensor:
        """The probability of values up to `value`, (*sample, n), point by point."""
        return self._cdf(value.to(self._means)).to(self.dtype)

    def _cdf(self, value: Tensor) -> Tensor:
        # By erfc, which keeps its digits in the lower tail.
        standardised = (self._means - value.unsqueeze(-self._means.dim())) / self._variances.sqrt()
        return (self._column * torch.special.erfc(standardised / math.sqrt(2)) / 2).sum(-self._means.dim())

    def quantile(self, probability: float | Tensor) -> Tensor:
        """The value below which a point is with this probability, between 0 and 1: (n,) for a number.

        A tensor of probabilities of any shape (*sample, ) gives (*sample, n). Differentiable; by bisection between the
        lowest and the highest of the components' quantiles.
        """
        p = torch.as_tensor(probability, dtype=self._means.dtype, device=self._means.device)
        return self.icdf(p.reshape(*p.shape, *[1] * (self._means.dim() - 1)))

    def icdf(self, value: Tensor) -> Tensor:
        """The same, for probabilities that broadcast with (n,), in the manner of `torch.distributions`."""
        p = torch.as_tensor(value, dtype=self._means.dtype, device=self._means.device)
        if not ((p > 0) & (p < 1)).all():
            raise ValueError(f"Probabilities must be between 0 and 1, got {p.min().item()} to {p.max().item()}.")
        dim = -self._means.dim()
        p = p.expand(torch.broadcast_shapes(p.shape, self.batch_shape))
        with torch.no_grad():
            ends = self._normals.icdf(p.unsqueeze(dim))
            low, high = ends.amin(dim), ends.amax(dim)
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                is_below = self._cdf(middle) < p
                low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
            root = (low + high) / 2
        if not (self._means.requires_grad or self._variances.requires_grad or p.requires_grad):
            return root.to(self.dtype)
        density = (self._normals.log_prob(root.unsqueeze(dim)) + self._column.log()).logsumexp(dim).exp().detach()
        error = self._cdf(root) - p  # zero up to rounding; what counts are its derivatives
        return (root - (error - error.detach()) / density).to(self.dtype)

    def confidence_region(self, probability: float = 0.95) -> tuple[Tensor, Tensor]:
        """The central interval with this probability, point by point: two tensors (n,)."""
        return self.quantile((1 - probability) / 2), self.quantile((1 + probability) / 2)

    def rsample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Joint draws over all points, (*sample, n): each is one component's. Differentiable within components."""
        count = math.prod(sample_shape)
        chosen = torch.multinomial(self.weights.detach(), count, replacement=True)
        out = self._means.new_empty(count, *self.batch_shape)
        for index in chosen.unique().tolist():
            places = (chosen == index).nonzero().squeeze(-1)
            out = out.index_copy(0, places, self.components[index].rsample(Size([len(places)])))
        return out.reshape(*sample_shape, *self.batch_shape).to(self.dtype)

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def expand(self, batch_shape: Size | list[int] | tuple[int, ...], _instance: Any = None) -> Mixture:
        raise NotImplementedError("A mixture is over the points that it was made for: predict at repeated inputs.")

    def __repr__(self) -> str:
        return f"Mixture({len(self.weights)} components, batch_shape={tuple(self.batch_shape)})"


def marginals_of(components: Sequence[MultivariateNormal], dim: int | None = None) -> tuple[Tensor, Tensor]:
    """The means and variances of S distributions, (S, n) or (S, n, C) each; put together along a dimension if one is
    named."""
    pairs = [(component.mean, _variance(component)) for component in components]
    means, variances = (torch.stack(each) if dim is None else torch.cat(each, dim) for each in zip(*pairs, strict=True))
    return means, variances


def _variance(component: MultivariateNormal) -> Tensor:
    """Of each point. GPyTorch rounds what is below 1e-10 up to that, whatever the unit of the targets is."""
    if component.mean.dim() > 1:
        return component.variance
    variance = component.lazy_covariance_matrix.diagonal(dim1=-2, dim2=-1)
    return variance.clamp_min(torch.finfo(variance.dtype).eps * float(variance.detach().max()))
