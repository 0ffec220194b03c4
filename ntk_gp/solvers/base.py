"""What every way to solve offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .. import settings
from ..jacobian.base import Jacobian
from ..jacobian.products import JacobianProduct
from .system import System


class Solver(ABC):
    """One way to solve with a :class:`System`; everything in float64, batches first.

    Operators carry it by reference: it must have no method of a tensor's that converts (`to`, `half`, `clone`, …).

    The posterior covariance is k(x, x') − c(x)ᵀ c(x') in function space, and c(x)ᵀ c(x') in weight space; c has t rows.

    :param system: K + D.
    """

    def __init__(self, system: System):
        self.system = system

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """(K + D)⁻¹ rhs, (B, N, r)."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log |K + D|, (B,)."""

    def mean_weights(self, residual: Tensor) -> Tensor:
        """ŵ = Σ Jᵀ (K + D)⁻¹ r for every row r: (B, r, N) to (B, r, P). The posterior mean is f(x) + J(x) ŵ."""
        return self.system.features(self.solve(residual.mT)).mT

    def _cross(self, jacobian: Jacobian) -> Tensor:
        """K(X, x), (B, N, M); differentiable where the inputs of the Jacobian are."""
        system = self.system
        if not jacobian.x.requires_grad:
            return system.jacobian.gram(jacobian, system.weights)
        tangents = jacobian.rows() * system.parameter_variances.unsqueeze(-2)
        return JacobianProduct.apply(tangents, system.jacobian).mT

    @abstractmethod
    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        """The posterior covariance, (B, M₁, M₂)."""

    @abstractmethod
    def variance(self, jacobian: Jacobian) -> Tensor:
        """The posterior variance, (B, M). Never negative."""

    @abstractmethod
    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        """Of the log-determinant with respect to each group's variance, (B, G), and to each row's noise, (B, N)."""

    def extended(self, system: System) -> Solver | None:
        """The solver of a system that begins with this one's rows, made from this one; None if nothing is saved."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0

    @abstractmethod
    def half_size(self) -> int:
        """t, the height of c."""

    def points_per_block(self, outputs: int) -> int:
        """How many test points' c may be held at once: an eighth of the memory budget."""
        budget = settings.memory_budget.bytes(self.system.x.device)
        return max(1, budget // (8 * 8 * self.system.batch * outputs * max(1, self.half_size())))
