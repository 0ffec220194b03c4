r"""What training by some time makes of an error along an eigenvector of K, as a function of its eigenvalue λ.

=====================  ================================  ===========================================
\                      gradient flow, time t             gradient descent, k steps of rate η
=====================  ================================  ===========================================
what is left of it     :math:`e^{-\lambda t}`            :math:`(1 - \eta\lambda)^k`
φ(λ)                   :math:`(1-e^{-\lambda t})/λ`      :math:`(1-(1-\eta\lambda)^k)/λ`
at λ = 0               t                                 kη
ψ(λ)                   :math:`\int_0^t \phi_s \,ds`      :math:`\eta \sum_{j<k} \phi_j`
=====================  ================================  ===========================================

φ is what the dual weights are made by, α = φ(K)(y − f₀), and needs no inverse of K. ψ = (t − φ)/λ, with t = kη for
descent, bounds errors of Krylov's approximation to φ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Filter(ABC):
    """One kind of training, at T times.

    :param elapsed: The time that has passed, T numbers, in units in which the loss is half the sum of squares.
    """

    def __init__(self, elapsed: Tensor):
        self.elapsed = elapsed

    @abstractmethod
    def left(self, eigenvalues: Tensor) -> Tensor:
        """What is left of the error: (..., k) to (T, ..., k)."""

    @abstractmethod
    def _learned(self, eigenvalues: Tensor, elapsed: Tensor) -> Tensor:
        """φ at positive eigenvalues."""

    @abstractmethod
    def _series(self, eigenvalues: Tensor, elapsed: Tensor) -> Tensor:
        """ψ at eigenvalues with λt < 0.01, where (t − φ)/λ cancels, to nine digits."""

    @abstractmethod
    def twice(self) -> Filter:
        """After twice the time: φ₂ₜ = φₜ (2 − λ φₜ), which covariances are made by."""

    @abstractmethod
    def is_monotone(self, largest: float) -> bool:
        """Whether no error changes its sign on the way, for eigenvalues up to this one."""

    def learned(self, eigenvalues: Tensor, floor: float = 0.0) -> Tensor:
        """φ, (..., k) to (T, ..., k), for eigenvalues λ ≥ 0.

        :param floor: What is known of eigenvalues that are zero: they are below this. At times beyond its inverse,
            whether something is learned along their eigenvectors cannot be told, and they are left out.
        """
        elapsed = self._times(eigenvalues)
        positive = eigenvalues > 0
        learned = self._learned(eigenvalues.where(positive, 1.0), elapsed)
        unlearned = elapsed.where(elapsed * floor <= 1, 0.0).where(elapsed.isfinite(), 0.0)
        return torch.where(positive, learned, unlearned)

    def integral(self, eigenvalues: Tensor) -> Tensor:
        """ψ, (..., k) to (T, ..., k)."""
        elapsed = self._times(eigenvalues)
        small = eigenvalues * elapsed < 1e-2
        away = eigenvalues.where(eigenvalues > 0, 1.0)
        closed = (elapsed - self.learned(eigenvalues)) / away
        return torch.where(small, self._series(eigenvalues.where(small, 0.0), elapsed), closed)

    def _times(self, eigenvalues: Tensor) -> Tensor:
        """Elapsed times, to be broadcast with eigenvalues: (T, 1, ...)."""
        return self.elapsed.reshape(-1, *[1] * eigenvalues.dim())


class Flow(Filter):
    """Gradient flow."""

    def left(self, eigenvalues: Tensor) -> Tensor:
        exponent = self._times(eigenvalues) * eigenvalues
        return torch.exp(-exponent.where(eigenvalues > 0, 0.0))  # 0 · ∞ is none

    def _learned(self, eigenvalues: Tensor, elapsed: Tensor) -> Tensor:
        return -torch.expm1(-eigenvalues * elapsed) / eigenvalues

    def _series(self, eigenvalues: Tensor, elapsed: Tensor) -> Tensor:
        z = eigenvalues * elapsed
        return elapsed**2 * (1 / 2 - z / 6 * (1 - z / 4 * (1 - z / 5)))

    def twice(self) -> Flow:
        return Flow(2 * self.elapsed)

    def is_monotone(self, largest: float) -> bool:
        return True


class Descent(Filter):
    """Gradient descent.

    :param steps: k, T whole numbers as floats.
    :param rate: η, in units in which the loss is half the sum of squares.
    """

    def __init__(self, steps: Tensor, rate: float):
        super().__init__(steps * rate)
        self.steps = steps
        self.rate = rate

    def _steps(self, eigenvalues: Tensor) -> Tensor:
        return self.steps.reshape(-1, *[1] * eigenvalues.dim())

    def left(self, eigenvalues: Tensor) -> Tensor:
        return (1 - self.rate * eigenvalues) ** self._steps(eigenvalues)

    def _learned(self, eigenvalues: Tensor, elapsed: Tensor) -> Tensor:
        step, steps = self.rate * eigenvalues, self._steps(eigenvalues)
        # The logarithm of |1 − ηλ|: 1 − ηλ, or from ηλ > 1 on ηλ − 1 = 1 + (ηλ − 2), each without cancellation.
        past = step > 1
        logarithm = torch.log1p(torch.where(past, step - 2, -step))
        exponent = torch.where(steps > 0, steps * logarithm, 0.0)  # at ηλ = 1, 0 · (−∞)
        flipped = past & (steps % 2 == 1)  # (1 − ηλ)ᵏ is negative
        return torch.where(flipped, 1 + torch.exp(exponent), -torch.expm1(exponent)) / eigenvalues

    def _series(self, eigenvalues: Tensor, elapsed: Tensor) -> Tensor:
        k, z = self.steps.reshape(elapsed.shape), self.rate * eigenvalues
        binomial = self.rate**2 * k * (k - 1) / 2  # η² C(k, 2), then C(k, 3) ηλ, …
        return binomial * (1 - (k - 2) / 3 * z * (1 - (k - 3) / 4 * z * (1 - (k - 4) / 5 * z)))

    def twice(self) -> Descent:
        return Descent(2 * self.steps, self.rate)

    def is_monotone(self, largest: float) -> bool:
        return self.rate * largest <= 1
