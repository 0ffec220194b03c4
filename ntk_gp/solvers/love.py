"""Fast variances: from a cache of a limited rank, for very many training points or parameters.

No prediction looks at the training data, nor costs more the more of them there are.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import torch
from gpytorch import settings as gpytorch_settings
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import memory, settings
from ..jacobian.base import Jacobian
from ..jacobian.products import JacobianProduct
from ..stock import is_stock
from .base import PosteriorCovariance
from .function_space import FunctionSpaceSolver
from .landmarks import PivotedCholesky
from .system import System

logger = logging.getLogger("ntk_gp")

# Training rows at which upper and lower bounds of variances are compared; Lanczos starts from as many points.
_PROBES = 64
# δ and ε are those of LandmarkVariance. ε, meant to be above the eigenvalues that the landmarks leave, is this many
# times their mean.
_CAUTION = 4.0
# The largest δ: the part of the prior precision of r² that the bound gives up, so that r² is divided by 1 − δ.
_LARGEST_LOSS = 0.5
# Up to this ε, a formula gives nearly the best δ; above, smaller ones are tried as long as they make variances smaller.
_SMALL_RESIDUAL = 0.01
# Rows of F D⁻¹ Fᵀ, which is symmetric, that are multiplied at once, each block as far as the diagonal only.
_TRIANGLE_ROWS = 1024


@dataclass(frozen=True)
class VarianceReport:
    r"""How far fast variances may be from the exact ones.

    :param rank: The landmarks.
    :param residual: The mean eigenvalue of what they leave of the kernel matrix, in units of the noise.
    :param error: By what part of itself a variance may be too large, on average: bounded at some training points.
    :param tolerance: What was asked for.
    """

    rank: int
    residual: float
    error: float
    tolerance: float

    @property
    def converged(self) -> bool:
        return self.error <= self.tolerance


class FastVariance(PosteriorCovariance):
    """What serves variances where `gpytorch.settings.fast_pred_var` is on; everything in float64.

    It keeps a summary of the training data, of a limited rank, in place of a factor of K + D. Variances are meant to be
    no smaller than the exact ones, and fall to them as the rank grows.

    :param system: K + D, without batches.

    :ivar int rank: t, how many landmarks or Lanczos vectors the summary is made of.
    :ivar VarianceReport report: How far variances may be from the exact ones, where a tolerance decided.
    """

    rank: int
    report: VarianceReport | None = None

    def __init__(self, system: System):
        if system.batch > 1:
            raise ValueError(f"fast_pred_var serves a model without batches; this one has {system.batch}.")
        super().__init__(system)

    def whitened_size(self) -> int:
        return self.rank


def choose_fast_variance(system: System) -> FastVariance:
    """By landmarks to a tolerance; a `gpytorch.settings.max_root_decomposition_size` that the user has set is the rank
    of Lanczos's factor instead."""
    rank = gpytorch_settings.max_root_decomposition_size.value()
    return LandmarkVariance(system) if is_stock(rank) else LanczosVariance(system, rank)


class LanczosVariance(FastVariance):
    r"""The posterior covariance :math:`J_* (\Sigma - S S^\top) J_*^\top` with :math:`S = \Sigma J^\top R` and
    :math:`R R^\top \approx (K + D)^{-1}` from t steps of Lanczos.

    LOVE: Pleiss, Gardner, Weinberger and Wilson, "Constant-time predictive distributions for Gaussian processes", ICML
    2018. Projections explain less than the whole: the variance is never below the exact one, and falls to it with t.

    :param system: K + D, without batches.
    :param rank: t.
    """

    def __init__(self, system: System, rank: int):
        super().__init__(system)
        self.weights = system.features(_inverse_root(system, rank).unsqueeze(0))[0]  # S, (P, t)
        self.rank = self.weights.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes

    def _whitened(self, jacobian: Jacobian) -> Tensor:
        """(J S)ᵀ, (B, t, M)."""
        if jacobian.x.requires_grad:
            return jacobian.jvp(self.weights.mT.unsqueeze(0))
        return JacobianProduct.apply(self.weights.mT.unsqueeze(0), jacobian)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        whitened1 = self._whitened(jacobian1)
        whitened2 = whitened1 if jacobian2 is jacobian1 else self._whitened(jacobian2)
        return jacobian1.gram(jacobian2, self.system.variances) - whitened1.mT @ whitened2

    def variance(self, jacobian: Jacobian) -> Tensor:
        return (jacobian.diagonal(self.system.variances) - self._whitened(jacobian).square().sum(-2)).clamp_min(0.0)


def _inverse_root(system: System, rank: int) -> Tensor:
    """R, (N, t), with R Rᵀ ≈ (K + D)⁻¹."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    points = torch.randperm(system.jacobian.num_points, generator=generator, device="cpu")[:_PROBES].to(system.x.device)
    cross = system.jacobian.gram(system.jacobian[points], system.variances)[0]
    signs = torch.randint(0, 2, (cross.shape[-1],), generator=generator, device="cpu").mul(2).sub(1)
    image = cross @ signs.to(cross)
    limit = min(rank, system.num_rows)
    basis = image.new_empty(limit, system.num_rows)  # vectors one after another
    matrix = image.new_zeros(limit, limit)
    size = 0
    for size in settings.progress(range(1, limit + 1), "Lanczos"):
        norm = image.norm()
        # Nothing is left but rounding. Less would not do: noise far below the largest eigenvalue still counts.
        if size > 1 and bool(norm <= 10 * torch.finfo(norm.dtype).eps * matrix[0, 0]):
            size -= 1
            break
        basis[size - 1] = image / norm
        if size > 1:
            matrix[size - 1, size - 2] = matrix[size - 2, size - 1] = norm
        image = system.matmul(basis[size - 1].reshape(1, -1, 1))[0, :, 0]
        matrix[size - 1, size - 1] = image @ basis[size - 1]
        done = basis[:size]
        for _ in range(2):  # once more against rounding
            image = image - done.mT @ (done @ image)
    factor = torch.linalg.cholesky(matrix[:size, :size])
    return torch.linalg.solve_triangular(factor, basis[:size], upper=False).mT


class LandmarkVariance(FastVariance):
    r"""The posterior covariance from all training points, seen through the kernel at m landmarks among them.

    With :math:`K \approx F^\top F` (`PivotedCholesky`), prior features fall into c = L⁻¹ k(Z, x), which the
    landmarks Z span, and a rest of size :math:`r^2 = k(x, x) - c^\top c`:

    .. math:: \operatorname{var} = \frac{r^2}{1 - \delta}
              + c^\top \Big(I + \tfrac{\delta}{\delta + \epsilon} F D^{-1} F^\top\Big)^{-1} c .

    Without the terms in δ this is the variance of a sparse Gaussian process (DTC). With them it is not below the exact
    one, for any δ between 0 and 1, if ε is at least the largest eigenvalue of
    :math:`D^{-1/2} (K - F^\top F) D^{-1/2}`: the weights' precision, :math:`I + \Phi^\top D^{-1} \Phi`, then is at
    least the block-diagonal one here. That allows for a prediction whose weights on the data all lie along this one
    eigenvector. Those of real test points do not, and ε is four times the mean eigenvalue: an assumption, not a proof.
    The price is about :math:`2 \sqrt{\epsilon r^2 / \mathrm{var}}` of the variance, and vanishes with the landmarks.

    Held are two triangles of m² numbers and the landmarks' inputs; a test point costs m kernel values and 2 m² flops.
    Landmarks are added until variances are within :class:`ntk_gp.settings.love_tolerance`. If that takes all the
    training rows, or rounding ends it before (with very little noise), variances are exact where memory allows.

    :param system: K + D, without batches.
    """

    def __init__(self, system: System):
        super().__init__(system)
        cholesky = PivotedCholesky(system, _landmark_limit(system))
        _add_landmarks(cholesky)
        self.exact: FunctionSpaceSolver | None = None
        if cholesky.rank < system.num_rows:
            self.landmarks, self.rows = _system_of_rows(system, cholesky.rows)
            self.root = cholesky.root()  # L
            self.lost, self.factor, error = _bounded(cholesky)
            self.report = VarianceReport(cholesky.rank, cholesky.residual(), error, settings.love_tolerance.value())
        if cholesky.limit == system.num_rows and not (self.report is not None and self.report.converged):
            del cholesky
            self.exact = FunctionSpaceSolver(system)
            self.report = VarianceReport(system.num_rows, 0.0, 0.0, settings.love_tolerance.value())
        assert self.report is not None
        self.rank = self.report.rank
        logger.debug("Fast variances: %s", self.report)
        if not self.report.converged:
            _warn(self.report)

    @property
    def nbytes(self) -> int:
        if self.exact is not None:
            return self.exact.nbytes
        return self.root.nbytes + self.factor.nbytes + self.landmarks.x.nbytes

    def whitened_size(self) -> int:
        return 3 * self.rank if self.exact is None else self.exact.whitened_size()

    def _whitened_parts(self, jacobian: Jacobian) -> tuple[Tensor, Tensor]:
        """c and L_B⁻¹ c, (B, m, M)."""
        known = torch.linalg.solve_triangular(self.root, self.landmarks.cross(jacobian)[:, self.rows], upper=False)
        return known, torch.linalg.solve_triangular(self.factor, known, upper=False)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        if self.exact is not None:
            return self.exact.covariance(jacobian1, jacobian2)
        known1, whitened1 = self._whitened_parts(jacobian1)
        known2, whitened2 = (known1, whitened1) if jacobian2 is jacobian1 else self._whitened_parts(jacobian2)
        rest = jacobian1.gram(jacobian2, self.system.variances) - known1.mT @ known2
        return rest / (1 - self.lost) + whitened1.mT @ whitened2

    def variance(self, jacobian: Jacobian) -> Tensor:
        if self.exact is not None:
            return self.exact.variance(jacobian)
        known, whitened = self._whitened_parts(jacobian)
        rest = (jacobian.diagonal(self.system.variances) - known.square().sum(-2)).clamp_min(0.0)
        return rest / (1 - self.lost) + whitened.square().sum(-2)


def _warn(report: VarianceReport) -> None:
    warnings.warn(
        f"fast_pred_var stopped at rank {report.rank}, where variances may be too large by about {report.error:.1e} of "
        f"themselves; {report.tolerance:.1e} was asked for. Switch fast_pred_var off for exact variances, or give "
        "ntk_gp.settings.memory_budget more.",
        NumericalWarning,
        stacklevel=3,
    )


def _system_of_rows(system: System, rows: Tensor) -> tuple[System, Tensor]:
    """The system of the points that some rows belong to, and where the rows are in it."""
    outputs = system.jacobian.function.num_outputs
    points, place = (rows // outputs).unique(return_inverse=True)
    noise = system.noise.unflatten(-1, (-1, outputs))[:, points].flatten(1)
    return System(system.linearization, system.x[:, points], system.variances, noise), place * outputs + rows % outputs


def _landmark_limit(system: System) -> int:
    """As many landmarks as leave F three quarters of the memory budget, and the triangles the rest."""
    held = system.jacobian.shards.most_rows(system.num_rows)
    beside_rows = memory.LANDMARKS.bytes(system.x.device) // (8 * held)
    return max(1, min(system.num_rows, beside_rows, int((memory.TRIANGLE.bytes(system.x.device) / 8) ** 0.5)))


def _add_landmarks(cholesky: PivotedCholesky) -> None:
    """Until bounds are as close as the tolerance asks, or no more fit."""
    for _ in settings.progress(range(cholesky.limit), "Landmarks"):
        cholesky.grow()
        logger.debug("%d landmarks leave %.1e of the noise", cholesky.rank, cholesky.residual())
        if cholesky.is_full or _expected_error(cholesky) <= settings.love_tolerance.value():
            return


def _expected_error(cholesky: PivotedCholesky) -> float:
    """About how far apart :func:`_bounded` will find the bounds, as a part of a variance, without making them."""
    residual = _CAUTION * cholesky.residual()
    rest = float((cholesky.left_if_new(cholesky.checked[:_PROBES]) / cholesky.checked_variances[:_PROBES]).mean())
    lost, gained = _splits(residual, rest)
    return residual / lost + rest * lost / (1 - lost) + gained + rest * residual * (1 + 1 / gained)


def _splits(residual: float, rest: float) -> tuple[float, float]:
    """Good values for δ in the upper bound of a variance, and for its counterpart η in the lower one.

    Either bound has a term that grows with its parameter and one that falls; where these are equal, the sum is about
    smallest.

    :param residual: ε, what the landmarks leave of the kernel matrix, in units of the noise.
    :param rest: r² / var, what they leave of a point's prior variance, as a part of its posterior one.
    """
    residual, rest = max(residual, 1e-300), max(rest, 1e-300)
    return min(_LARGEST_LOSS, (residual / rest) ** 0.5), min(1.0, (residual * rest) ** 0.5)


def _bounded(cholesky: PivotedCholesky) -> tuple[float, Tensor, float]:
    r"""δ, the Cholesky factor of :math:`I + \tfrac{\delta}{\delta + \epsilon} F D^{-1} F^\top`, and the error.

    That is how far variances at some training points are from lower bounds, as a part of these, on average.
    The lower bounds come from a precision that is never below the weights',
    :math:`I + (1 + \eta) F D^{-1} F^\top` and :math:`1 + (1 + 1/\eta) \epsilon` for the rest.
    """
    residual, probes = _CAUTION * cholesky.residual(), cholesky.checked[:_PROBES]
    known, rest = cholesky.columns(probes), cholesky.left_if_new(probes)
    precision = _precision(cholesky)
    lost, gained = _splits(residual, float((rest / cholesky.checked_variances[:_PROBES]).mean()))

    def upper(lost: float) -> tuple[Tensor, Tensor]:
        factor = _factor(precision, lost / (lost + residual))
        return factor, rest / (1 - lost) + _quadratic(factor, known)

    factor, variances = upper(lost)
    while residual > _SMALL_RESIDUAL:  # the estimate is for small ones
        other, smaller = upper(lost / 2)
        if smaller.mean() >= 0.99 * variances.mean():
            break
        lost, factor, variances = lost / 2, other, smaller
    lower = rest / (1 + residual * (1 + 1 / gained)) + _quadratic(_factor(precision, 1 + gained), known)
    return lost, factor, float((variances / lower).mean()) - 1


def _precision(cholesky: PivotedCholesky) -> Tensor:
    """The lower triangle of F D⁻¹ Fᵀ, (m, m). Leaves D^{-1/2} in F."""
    shards = cholesky.shards
    factor = cholesky.factor.mul_(shards.own(cholesky.system.noise[0].rsqrt(), 0))
    out = factor.new_zeros(len(factor), len(factor))
    for start in range(0, len(factor), _TRIANGLE_ROWS):
        stop = min(start + _TRIANGLE_ROWS, len(factor))
        torch.mm(factor[start:stop], factor[:stop].mT, out=out[start:stop, :stop])
    return shards.summed(out)


def _factor(precision: Tensor, share: float) -> Tensor:
    """The Cholesky factor of I + share · precision."""
    matrix = precision * share
    matrix.diagonal().add_(1.0)
    return torch.linalg.cholesky(matrix)


def _quadratic(factor: Tensor, known: Tensor) -> Tensor:
    """The diagonal of knownᵀ (factor factorᵀ)⁻¹ known."""
    return torch.linalg.solve_triangular(factor, known, upper=False).square().sum(0)
