"""φ(K) V for some vectors V: from all eigenvectors of K, or in the Krylov space of V, by products with K alone."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .filters import Filter
from .lanczos import Lanczos


class Expansion(ABC):
    """Vectors V, (N, r), in coordinates in which K is diagonal, or nearly."""

    @abstractmethod
    def apply(self, filter: Filter) -> Tensor:
        """φ(K) V at T times, (T, N, r)."""

    @abstractmethod
    def measure(self, filter: Filter) -> tuple[Tensor, Tensor]:
        """Eigenvalues λᵢ, (r, k), and squared coordinates (qᵢᵀv)², (r, k): vᵀ g(K) v = Σ (qᵢᵀv)² g(λᵢ).

        :param filter: Times until which they have to serve.
        """


class Eigenvectors:
    """All of them, from K as a dense matrix, for any number of vectors and times.

    :param matrix: K, (N, N), float64.

    :ivar values: Eigenvalues, (N,), in ascending order; zero where they are below what rounding leaves.
    :ivar floor: Which is N eps times the largest.
    """

    def __init__(self, matrix: Tensor):
        values, self.vectors = torch.linalg.eigh(matrix)
        self.values, self.floor = _above_rounding(values, len(matrix))

    def expand(self, columns: Tensor) -> EigenExpansion:
        return EigenExpansion(self, columns)


class EigenExpansion(Expansion):
    def __init__(self, eigenvectors: Eigenvectors, columns: Tensor):
        self._of = eigenvectors
        self._coordinates = eigenvectors.vectors.mT @ columns  # (N, r)

    def apply(self, filter: Filter) -> Tensor:
        learned = filter.learned(self._of.values, self._of.floor)
        return self._of.vectors @ (learned.unsqueeze(-1) * self._coordinates)

    def measure(self, filter: Filter) -> tuple[Tensor, Tensor]:
        squares = self._coordinates.mT.square()
        return self._of.values.expand_as(squares), squares


class KrylovExpansion(Expansion):
    r"""In Krylov spaces that grow until the error is within a tolerance, or warn.

    With uₘ = ‖v‖ V φₜ(T) e₁ (Lanczos), u − uₘ obeys the same differential equation as u = φₜ(K) v, with
    ρₜ = ‖v‖ βₘ [φₜ(T)]ₘ₁ vₘ₊₁ in the place of v, whose direction and sign do not change. So

    .. math::

        \lVert u - u_m \rVert \le \lVert v \rVert \beta_m \bigl| [\psi_t(T)]_{m1} \bigr|, \qquad
        \lVert K (u - u_m) \rVert \le \lVert v \rVert \beta_m \bigl| [\phi_t(T)]_{m1} \bigr|,

    and the root of the product of both bounds ‖u − uₘ‖_K = ‖Σ^{1/2} Jᵀ (u − uₘ)‖: the error of the weights, as the
    prior measures it; that of f_t at x is no more than this times the prior standard deviation there. The same holds
    for gradient descent while no error changes its sign (η λ ≤ 1); with larger rates, the change by the last fifth
    of the steps is what is compared with the tolerance.

    :param product: V to K V, (N, r) to (N, r).
    :param columns: V, float64.
    :param tolerance: The error of ‖φₜ(K) v‖_K, relative to it, that is allowed at each time.
    :param most_steps: After so many, a warning says what the error is.

    :ivar error: Its bound, or estimate, for the times asked for last.
    """

    error = 0.0

    def __init__(self, product: Callable[[Tensor], Tensor], columns: Tensor, tolerance: float, most_steps: int):
        self._lanczos = Lanczos(product, columns)
        self._tolerance = tolerance
        self._most_steps = most_steps

    @property
    def steps(self) -> int:
        """Those done so far, a product with K each."""
        return self._lanczos.steps

    def apply(self, filter: Filter) -> Tensor:
        coefficients = self._coefficients(filter)
        return (coefficients.unsqueeze(-2) @ self._lanczos.basis).squeeze(-2).mT

    def measure(self, filter: Filter) -> tuple[Tensor, Tensor]:
        self._coefficients(filter)
        values, vectors = self._lanczos.eigh()
        values, _ = _above_rounding(values, self._lanczos.basis.shape[-1])
        return values, (self._lanczos.norms.unsqueeze(-1) * vectors[:, 0]).square()

    def _coefficients(self, filter: Filter) -> Tensor:
        """‖v‖ φ(T) e₁, (T, r, m), once m is large enough."""
        lanczos = self._lanczos
        lanczos.extend(8 - lanczos.steps)
        while True:
            coefficients, error = self._at_present(filter)
            self.error = float(error.max()) if error.numel() else 0.0
            if self.error <= self._tolerance or lanczos.is_exhausted:
                return coefficients
            if lanczos.steps >= self._most_steps:
                self._warn(filter)
                return coefficients
            lanczos.extend(min(max(4, lanczos.steps // 4), self._most_steps - lanczos.steps))

    def _at_present(self, filter: Filter) -> tuple[Tensor, Tensor]:
        """Coefficients, (T, r, m), and the relative error of each, (T, r)."""
        lanczos = self._lanczos
        values, vectors = lanczos.eigh()
        values, floor = _above_rounding(values, lanczos.basis.shape[-1])
        learned = filter.learned(values, floor)
        first, last = vectors[:, 0], vectors[:, -1]
        coefficients = (vectors @ (learned * first).unsqueeze(-1)).squeeze(-1)  # of v / ‖v‖
        size = (values * (learned * first).square()).sum(-1).sqrt()
        if filter.is_monotone(float(values.max())):
            by_size, by_image = (
                (function * first * last).sum(-1).abs() for function in (filter.integral(values), learned)
            )
            error = lanczos.remainder * (by_size * by_image).sqrt()
        else:
            error = self._change(filter, coefficients, values, vectors)
        relative = torch.where(size > 0, error / size.where(size > 0, 1.0), torch.where(error > 0, torch.inf, 0.0))
        return lanczos.norms.unsqueeze(-1) * coefficients, relative

    def _change(self, filter: Filter, coefficients: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        """How far they are from those of a fifth fewer steps, in the norm of K, (T, r)."""
        fewer = self._lanczos.steps - max(2, self._lanczos.steps // 5)
        if fewer < 1:
            return torch.full_like(coefficients[..., 0], torch.inf)
        known, directions = torch.linalg.eigh(self._lanczos.tridiagonal()[:, :fewer, :fewer])
        learned = filter.learned(*_above_rounding(known, self._lanczos.basis.shape[-1]))
        change = coefficients.clone()
        change[..., :fewer] -= (directions @ (learned * directions[:, 0]).unsqueeze(-1)).squeeze(-1)
        along = (vectors.mT @ change.unsqueeze(-1)).squeeze(-1)
        return (values * along.square()).sum(-1).sqrt()

    def _warn(self, filter: Filter) -> None:
        warnings.warn(
            f"Lanczos' process stopped after {self.steps} steps with a relative error of up to {self.error:.1e} in the "
            f"weights; {self._tolerance:.1e} was asked for, at times up to {float(filter.elapsed.max()):.3g} "
            "(in units of half the sum of squares). Allow more steps (max_steps, and memory for as many vectors: "
            "ntk_gp.settings.memory_budget), ask for shorter times, or take all eigenvectors (method='spectrum').",
            NumericalWarning,
            stacklevel=6,
        )


def _above_rounding(values: Tensor, rows: int) -> tuple[Tensor, float]:
    """Eigenvalues, those below the rounding of the largest as zero; and that bound."""
    floor = rows * torch.finfo(values.dtype).eps * float(values.max()) if values.numel() else 0.0
    return values.where(values > floor, 0.0), floor
