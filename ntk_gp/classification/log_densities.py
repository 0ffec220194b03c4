r"""log p(y | f) of labels, with the derivatives by the latent function that Laplace's approximation takes.

=========================  =====================================  ====================================================
likelihood                 log p(y | f) at one point              H, minus the second derivative
=========================  =====================================  ====================================================
`SoftmaxLikelihood`        f_y − log Σ_c exp f_c                  diag(p) − p pᵀ, C×C, of rank C − 1
`LogisticLikelihood`       log σ(s f), s = ±1                     σ(f) σ(−f)
`BernoulliLikelihood`      log Φ(s f)                             ρ (ρ + s f), with ρ = N(s f) / Φ(s f)
=========================  =====================================  ====================================================

All are concave in f, so that H is positive semidefinite; it is handed out as a root, H = R Rᵀ, and never inverted.
Every formula keeps its relative precision where probabilities are close to zero or one: there 1 − p must be summed, not
subtracted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from gpytorch.likelihoods import BernoulliLikelihood, SoftmaxLikelihood
from torch import Tensor, nn

from .likelihoods import LogisticLikelihood


class LogDensity(ABC):
    """log p(y | f) of all labels, as a function of f (n, C) in float64.

    :param labels: The labels, (n,), integers from 0 on.
    :ivar int num_outputs: C.
    :ivar int rank: r, of one point's H.
    """

    num_outputs = 1
    rank = 1

    def __init__(self, labels: Tensor):
        self.labels = labels

    @abstractmethod
    def value(self, f: Tensor) -> Tensor:
        """Their sum, ()."""

    @abstractmethod
    def gradient(self, f: Tensor) -> Tensor:
        """By f, (n, C)."""

    @abstractmethod
    def curvature_root(self, f: Tensor) -> Tensor:
        """R with R Rᵀ = H, of each point: (n, C, r)."""

    @abstractmethod
    def curvature_trace_gradient(self, f: Tensor, covariance: Tensor) -> Tensor:
        """The gradient of tr(V H) by f with V held, (n, C): third derivatives.

        :param covariance: V of each point, (n, C, C), symmetric.
        """


class SoftmaxDensity(LogDensity):
    """Several classes, by the softmax of as many latent functions.

    :param labels: (n,), from 0 to C − 1.
    :param num_classes: C.
    """

    def __init__(self, labels: Tensor, num_classes: int):
        super().__init__(labels)
        self.num_outputs = num_classes
        self.rank = num_classes - 1

    def value(self, f: Tensor) -> Tensor:
        return f.log_softmax(-1).gather(-1, self.labels.unsqueeze(-1)).sum()

    def gradient(self, f: Tensor) -> Tensor:
        others = f.softmax(-1).scatter(-1, self.labels.unsqueeze(-1), 0.0)
        return (-others).scatter(-1, self.labels.unsqueeze(-1), others.sum(-1, keepdim=True))

    def curvature_root(self, f: Tensor) -> Tensor:
        """diag(s) Q with s = √p, a unit vector, and Q an orthonormal basis of what is orthogonal to it: the columns
        other than k of the reflection that takes s to −e_k. With the largest s_k there is no cancellation in them."""
        s = (f.log_softmax(-1) / 2).exp()
        largest, k = s.max(-1, keepdim=True)
        ones = torch.eye(self.num_outputs, dtype=f.dtype, device=f.device)
        towards = s + ones[k.squeeze(-1)]
        reflection = ones - towards.unsqueeze(-1) * (s / (1 + largest)).unsqueeze(-2)
        columns = torch.arange(self.rank, device=f.device).expand(len(f), -1)
        columns = columns + (columns >= k)
        return s.unsqueeze(-1) * reflection.gather(-1, columns.unsqueeze(-2).expand(-1, s.shape[-1], -1))

    def curvature_trace_gradient(self, f: Tensor, covariance: Tensor) -> Tensor:
        """tr(V H) = Σ_a p_a V_aa − pᵀV p, and ∂p_a/∂f_c = p_a (δ_ac − p_c)."""
        p = f.softmax(-1)
        by_p = covariance.diagonal(dim1=-2, dim2=-1) - 2 * (covariance @ p.unsqueeze(-1)).squeeze(-1)
        return p * (by_p - (p * by_p).sum(-1, keepdim=True))


class _TwoClasses(LogDensity):
    """Two classes, by one latent function.

    :param labels: (n,), 0 or 1.
    """

    def __init__(self, labels: Tensor):
        super().__init__(labels)
        self.signs = (2.0 * labels - 1).unsqueeze(-1).double()

    @abstractmethod
    def _curvature(self, f: Tensor) -> Tensor:
        """H, (n, 1)."""

    @abstractmethod
    def _curvature_derivative(self, f: Tensor) -> Tensor:
        """∂H/∂f, (n, 1)."""

    def curvature_root(self, f: Tensor) -> Tensor:
        return self._curvature(f).sqrt().unsqueeze(-1)

    def curvature_trace_gradient(self, f: Tensor, covariance: Tensor) -> Tensor:
        return covariance.squeeze(-1) * self._curvature_derivative(f)


class LogisticDensity(_TwoClasses):
    """Two classes by the logistic function."""

    def value(self, f: Tensor) -> Tensor:
        return nn.functional.logsigmoid(self.signs * f).sum()

    def gradient(self, f: Tensor) -> Tensor:
        return self.signs * torch.sigmoid(-self.signs * f)

    def _curvature(self, f: Tensor) -> Tensor:
        return torch.sigmoid(f) * torch.sigmoid(-f)

    def _curvature_derivative(self, f: Tensor) -> Tensor:
        return self._curvature(f) * (torch.sigmoid(-f) - torch.sigmoid(f))


class ProbitDensity(_TwoClasses):
    """Two classes by the normal distribution function."""

    def value(self, f: Tensor) -> Tensor:
        return torch.special.log_ndtr(self.signs * f).sum()

    def gradient(self, f: Tensor) -> Tensor:
        return self.signs * _inverse_mills(self.signs * f)

    def _curvature(self, f: Tensor) -> Tensor:
        z = self.signs * f
        return _inverse_mills(z) * _mills_excess(z)

    def _curvature_derivative(self, f: Tensor) -> Tensor:
        z = self.signs * f
        ratio, excess = _inverse_mills(z), _mills_excess(z)
        curvature = ratio * excess
        return self.signs * (ratio * (1 - curvature) - curvature * excess)


def _inverse_mills(z: Tensor) -> Tensor:
    """ρ(z) = N(z) / Φ(z), for any z."""
    return math.sqrt(2 / math.pi) / torch.special.erfcx(-z / math.sqrt(2))


def _mills_excess(z: Tensor) -> Tensor:
    """ρ(z) + z, positive; far below zero, where it is a small difference, by Laplace's continued fraction."""
    x = (-z).clamp_min(20.0)
    tail = x
    for k in range(20, 1, -1):
        tail = x + k / tail
    return torch.where(z < -20, 1 / tail, _inverse_mills(z) + z)


def log_density(likelihood: nn.Module, labels: Tensor) -> LogDensity:
    """That of a likelihood of GPyTorch's, or of a :class:`~ntk_gp.LogisticLikelihood`, for labels (n,) of any dtype.

    :raises TypeError: For any other likelihood, or one with mixing weights.
    :raises ValueError: For labels of another shape, or that are not integers from 0 to C − 1.
    """
    form = getattr(type(likelihood), "forward", None)
    if form is SoftmaxLikelihood.forward:
        if likelihood.mixing_weights is not None:
            raise TypeError(
                "Expected a SoftmaxLikelihood without mixing weights: the network's outputs are the classes' logits. "
                "Make it with SoftmaxLikelihood(num_classes=C, mixing_weights=False)."
            )
        return SoftmaxDensity(_checked(labels, likelihood.num_classes), likelihood.num_classes)
    if form is LogisticLikelihood.forward:
        return LogisticDensity(_checked(labels, 2))
    if form is BernoulliLikelihood.forward:
        return ProbitDensity(_checked(labels, 2))
    raise TypeError(
        f"Expected gpytorch.likelihoods.SoftmaxLikelihood(num_classes=C, mixing_weights=False), "
        f"gpytorch.likelihoods.BernoulliLikelihood or ntk_gp.LogisticLikelihood, got {type(likelihood).__name__}. For "
        "Gaussian noise take gpytorch.models.ExactGP, for other likelihoods gpytorch.models.ApproximateGP."
    )


def _checked(labels: Tensor, num_classes: int) -> Tensor:
    """The labels as integers."""
    if num_classes < 2:
        raise ValueError(f"Expected two classes or more, got num_classes={num_classes}.")
    if labels.dim() != 1:
        raise ValueError(
            f"Expected labels of shape (n,), the number of each point's class, got {tuple(labels.shape)}. Of one-hot "
            "rows take .argmax(-1); of a column .squeeze(-1)."
        )
    whole = labels.long()
    wrong = (whole.to(labels.dtype) != labels) | (whole < 0) | (whole >= num_classes)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"Expected labels that are integers from 0 to {num_classes - 1}, got {labels[first].item()} in row {first} "
            f"of {len(labels)}."
        )
    return whole
