"""What every way to solve offers, and what it says of itself so that one can be chosen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from .. import memory
from ..jacobian.base import Jacobian
from .system import System


class PosteriorCovariance(ABC):
    """The posterior covariance at any test points, from what was computed once from the training data; in float64.

    Whatever serves variances is one of these: a :class:`Solver`, or a :class:`~ntk_gp.solvers.FastVariance`. For each
    test point it computes a vector c(x) of t numbers, and of these a covariance: what that takes in memory is known
    before.

    Operators carry it by reference: it must have no method of a tensor's that converts (`to`, `half`, `clone`, …).

    :ivar System system: K + D of the training data.
    """

    keeps_small_variances: ClassVar[bool] = True
    """Whether a variance is an answer however small it is, and not perhaps what an unfinished iteration has left."""

    is_replicated: ClassVar[bool] = False
    """Whether a variance asks for nothing that other ranks hold (:class:`ntk_gp.settings.distributed`)."""

    def __init__(self, system: System):
        self.system = system

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, beside the system's Jacobian."""

    @abstractmethod
    def whitened_size(self) -> int:
        """t, how many numbers c(x) has: what one row of test points takes in memory."""

    def points_per_block(self, outputs: int) -> int:
        """How many test points' c may be held at once: an eighth of the memory budget."""
        budget = memory.TEST_POINTS.bytes(self.system.x.device)
        return max(1, budget // (8 * self.system.batch * outputs * max(1, self.whitened_size())))

    @abstractmethod
    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        """The posterior covariance between two sets of test points, (B, M₁, M₂)."""

    @abstractmethod
    def variance(self, jacobian: Jacobian) -> Tensor:
        """The posterior variance, (B, M). Never negative."""


class Solver(PosteriorCovariance):
    """One way to solve with a :class:`System`; everything in float64, batches first.

    The posterior covariance is k(x, x') − c(x)ᵀ c(x') in function space, where c(x) = L⁻¹ k(X, x) is what the data
    explain, and c(x)ᵀ c(x') in weight space, where c(x) is what they leave.

    Which solver a system gets is decided by what the class methods below say, before anything is factorised. A new one
    implements this class in a file of its own, and has its line in :mod:`ntk_gp.solvers.table`.

    :param system: K + D.
    """

    name: ClassVar[str]
    """What :class:`ntk_gp.settings.solver` calls it."""

    is_exact: ClassVar[bool] = True
    """Whether it solves to float64's digits, as a factorisation does. One that is not serves where none that is can."""

    @classmethod
    @abstractmethod
    def cost(cls, system: System) -> float:
        """About how many flops it takes until the first right-hand side is solved."""

    @classmethod
    @abstractmethod
    def nbytes_needed(cls, system: System) -> float:
        """The most bytes that it holds at once while it is made."""

    @classmethod
    def fits(cls, system: System) -> bool:
        """Whether the memory budget has room for it."""
        return system.fits(cls.nbytes_needed(system) / 8)

    @classmethod
    def obstacle(cls, system: System) -> str | None:
        """Why it cannot serve this system, as words that follow "it"; None where it can."""
        if cls.fits(system):
            return None
        return f"needs {readable_bytes(cls.nbytes_needed(system))}, more than ntk_gp.settings.memory_budget"

    @abstractmethod
    def solve(self, rhs: Tensor) -> Tensor:
        """(K + D)⁻¹ rhs, (B, N, r)."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log |K + D|, (B,)."""

    def mean_weights(self, residual: Tensor) -> Tensor:
        """ŵ = Σ Jᵀ (K + D)⁻¹ r for every row r: (B, r, N) to (B, r, P). The posterior mean is f(x) + J(x) ŵ."""
        return self.system.features(self.solve(residual.mT)).mT

    @abstractmethod
    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        """Of the log-determinant with respect to each group's variance, (B, G), and to each row's noise, (B, N)."""

    def extended(self, system: System) -> Solver | None:
        """The solver of a system that begins with this one's rows, made from this one; None if nothing is saved."""
        return None


def readable_bytes(count: float) -> str:
    """A number of bytes as people write it: `"1.5 GB"`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
