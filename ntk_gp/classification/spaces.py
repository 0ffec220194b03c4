r"""The latent function at the training inputs, f ~ N(m, K), in two kinds of coordinates z.

==============  ===================  ==================  ===================================  =====================
coordinates z   f − m                prior's square      what is factorised                   size
==============  ===================  ==================  ===================================  =====================
a, as f's rows  K a                  aᵀ K a              B = I + Rᵀ K R                       n·r, r = rank of H
u, whitened     Φ u, Φ = J Σ^{1/2}   uᵀ u                Λ = I + Φᵀ H Φ                       P
==============  ===================  ==================  ===================================  =====================

Both are (f − m)ᵀ K⁻¹ (f − m), |B| = |Λ| = |I + H K|, and neither K nor H = R Rᵀ, of rank C − 1 at each point for a
softmax, is ever inverted (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section 3.4).
Everything is in float64, without batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from ..jacobian.base import Jacobian


class Position(NamedTuple):
    """A latent function at the training inputs.

    :param coordinates: z.
    :param latent: f − m, (N,).
    """

    coordinates: Tensor
    latent: Tensor

    def plus(self, step: Position, length: float) -> Position:
        """A step further."""
        return Position(self.coordinates + length * step.coordinates, self.latent + length * step.latent)


class Space(ABC):
    """Coordinates of the latent function at the training inputs.

    :ivar int num_coordinates: How many there are.
    """

    num_coordinates: int

    @abstractmethod
    def at(self, coordinates: Tensor) -> Position:
        """The latent function with these coordinates."""

    @abstractmethod
    def inner(self, left: Position, right: Position) -> Tensor:
        """(f − m)ᵀ K⁻¹ (f' − m), ()."""

    @abstractmethod
    def curved(self, root: Tensor) -> Curvature:
        """K⁻¹ + H, factorised.

        :param root: R, (n, C, r).
        :raises RuntimeError: If K is so large that this has no factor in float64.
        """


class Curvature(ABC):
    """K⁻¹ + H, the precision of the latent function in Laplace's approximation, in the coordinates of a space."""

    @abstractmethod
    def newton_step(self, position: Position, gradient: Tensor) -> Position:
        """(K⁻¹ + H)⁻¹ (∇ log p(y | f) − K⁻¹ (f − m)).

        :param gradient: ∇ log p(y | f), (N,).
        """

    @abstractmethod
    def logdet(self) -> Tensor:
        """log |I + H K|, ()."""

    @abstractmethod
    def covariance_of_points(self) -> Tensor:
        """(K⁻¹ + H)⁻¹ at each training point by itself, (n, C, C)."""

    @abstractmethod
    def solve(self, vector: Tensor) -> Tensor:
        """(I + H K)⁻¹ v, (N,)."""

    @abstractmethod
    def evidence_by_prior(self, position: Position, pull: Tensor) -> Tensor:
        r"""The derivative of the evidence by what K is made of: K itself, or the prior variances.

        It is ⟨½ (a aᵀ + t aᵀ + a tᵀ − R B⁻¹ Rᵀ), ∂K⟩ with t = (I + H K)⁻¹ s.

        :param pull: s, the derivative of −½ log |I + H K| by f̂, (N,).
        """

    @abstractmethod
    def mean_weights(self, position: Position) -> Tensor:
        """ŵ, (P,): f̂(x) = m(x) + J(x) ŵ at any x."""

    @abstractmethod
    def draw_weights(self, normals: Tensor) -> Tensor:
        """Draws from the posterior of w − w₀, less ŵ, from independent standard normals (k, :attr:`num_normals`)."""

    @property
    @abstractmethod
    def num_normals(self) -> int:
        """How many standard normals a draw is made of."""

    @abstractmethod
    def whitened_size(self) -> int:
        """t, the height of :meth:`whitened_cross`."""

    @abstractmethod
    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        """c(x), (B, t, M), of the posterior covariance: k(x, x') − c(x)ᵀ c(x') if :attr:`is_explained`, otherwise
        c(x)ᵀ c(x')."""

    is_explained: bool
    """Whether c(x)ᵀ c(x') is what the data explain of the prior covariance, or what they leave."""
