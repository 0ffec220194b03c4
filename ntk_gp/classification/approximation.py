r"""Laplace's approximation: a normal distribution in place of the posterior of the latent function, and its evidence.

With the mode f̂, a = ∇ log p(y | f̂) and H = −∇∇ log p(y | f̂), the posterior is taken for N(f̂, (K⁻¹ + H)⁻¹), and

.. math:: \log q(y) = \log p(y \mid \hat f) - \tfrac12 (\hat f - m)^\top K^{-1} (\hat f - m) - \tfrac12 \log |I + H K| .

Its derivatives are written out. The first two terms are stationary in f̂; the last is not, and its derivative by f̂, s,
goes through f̂ = m + K ∇ log p(y | f̂): with t = (I + H K)⁻¹ s,

.. math:: d \log q = \tfrac12 a^\top dK\, a - \tfrac12 \operatorname{tr} R B^{-1} R^\top dK + t^\top (dK\, a + dm) +
    a^\top dm

(Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, section 5.5.1).
"""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import memory, settings
from .._compat import is_interleaved
from ..bridge.exactly_solved import without_constants
from ..bridge.recognised import networks_of
from ..distributed.replicated import must_agree
from ..operators import NTKLinearOperator
from ..operators._marginal_terms import in_double
from ..solvers import System
from ..solvers.base import readable_bytes
from .function_space import FunctionSpace
from .log_densities import LogDensity
from .newton import Mode, find_mode
from .spaces import Position, Space
from .weight_space import WeightSpace

# How many Newton steps are expected, where the cost of two ways is compared.
_STEPS = 10


class LatentPrior:
    """N(m, K) at the training inputs, in the space that is cheaper.

    :param distribution: What a model's `forward` makes of the training inputs.
    :param density: Of their labels.
    :raises ValueError: If it has batches, or another shape than the labels ask for.
    :raises MemoryError: If neither function nor weight space fits in the memory budget.

    :ivar dtype: The one that the model computes in.
    :ivar mean: m, (n, C), float64, with its graph.
    :ivar parameter: What K is linear in, with its graph: K itself, (N, N), or the prior variances, (1, G); float64.
    :ivar Space space: The coordinates.
    :ivar system: What K is made of, where it is a neural tangent kernel's.
    :ivar variances: The prior variances then, (1, G), float64, with their graph.
    """

    def __init__(self, distribution: MultivariateNormal, density: LogDensity):
        _check_prior(distribution, density)
        self.dtype = distribution.loc.dtype
        self.mean = distribution.loc.double().reshape(len(density.labels), density.num_outputs)
        matrix = without_constants(to_linear_operator(distribution.lazy_covariance_matrix).evaluate_kernel())
        self.networks = networks_of(matrix)
        self.system = _system(matrix)
        self.variances = matrix.variances.double().reshape(1, -1) if isinstance(matrix, NTKLinearOperator) else None
        self.space, self.parameter = self._chosen(matrix, density)

    def _chosen(self, matrix: LinearOperator, density: LogDensity) -> tuple[Space, Tensor]:
        rows = self.mean.numel()
        ranks = len(self.mean) * density.rank
        if self.system is not None and _takes_weight_space(self.system, rows, ranks):
            assert self.variances is not None
            parameters = self.system.num_parameters
            _check_memory(WeightSpace.nbytes_needed(parameters), f"{parameters}×{parameters}", self.mean.device)
            return WeightSpace(self.system), self.variances
        _check_memory(FunctionSpace.nbytes_needed(rows), f"{rows}×{rows}", self.mean.device)
        kernel_matrix = in_double(matrix)
        _check_finite(kernel_matrix.detach(), self.system)
        return FunctionSpace(kernel_matrix.detach(), self.system), kernel_matrix


class LaplaceApproximation:
    """The normal distribution that stands for the posterior of the latent function.

    :param prior: Of the latent function, at the training inputs.
    :param density: Of the labels.
    :param at_prior_mean: Whether log p(y | f) is expanded at the prior mean, which stays the mean, in place of the
        mode.
    :param start: Coordinates to look for the mode from.

    :ivar latent_mean: f̂, (n, C), float64.
    :ivar int steps: How many Newton steps led there.
    :ivar float distance: From the mode, in standard deviations of the posterior; 0 at the prior mean.
    """

    def __init__(
        self, prior: LatentPrior, density: LogDensity, at_prior_mean: bool = False, start: Tensor | None = None
    ):
        must_agree("labels", density.labels)
        self.prior, self.density, self.at_prior_mean = prior, density, at_prior_mean
        mean = prior.mean.detach()
        with torch.no_grad():
            mode = _prior_mean(prior, density) if at_prior_mean else find_mode(prior.space, density, mean, start)
            self.position, self.curvature, self.steps, self.distance = mode
            self.latent_mean = mean + self.position.latent.view_as(mean)

    def log_evidence(self) -> Tensor:
        """log q(y), (), float64; differentiable once with respect to what the prior is made of.

        At the prior mean it is the evidence of the network's own weights around zero, as they were when they were
        trained: the term −½ Σ w₀² / σ² is in it, without which a prior variance of zero would be the likeliest.
        """
        evidence = _Evidence.apply(self, self.prior.mean, self.prior.parameter)
        return evidence - _weights_penalty(self.prior) if self.at_prior_mean else evidence

    def value(self) -> Tensor:
        """That of the latent function, without a graph."""
        penalty = self.prior.space.inner(self.position, self.position) + self.curvature.logdet()
        return self.density.value(self.latent_mean) - penalty / 2

    def derivatives(self) -> tuple[Tensor, Tensor]:
        """Of the same by m, (n, C), and by what K is linear in."""
        covariance = self.curvature.covariance_of_points()
        pull = self.density.curvature_trace_gradient(self.latent_mean, covariance).reshape(-1) / -2
        moved = pull if self.at_prior_mean else self.curvature.solve(pull)
        by_mean = self.density.gradient(self.latent_mean) + moved.view_as(self.latent_mean)
        return by_mean, self.curvature.evidence_by_prior(self.position, pull)


class _Evidence(torch.autograd.Function):
    """log q(y) as a function of m and of what K is linear in."""

    @staticmethod
    def forward(ctx: Any, approximation: LaplaceApproximation, mean: Tensor, parameter: Tensor) -> Tensor:
        ctx.approximation = approximation
        return approximation.value()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        by_mean, by_parameter = ctx.approximation.derivatives()
        return None, grad * by_mean, grad * by_parameter


def _prior_mean(prior: LatentPrior, density: LogDensity) -> Mode:
    """The prior mean, in the place of the mode."""
    mean = prior.mean.detach()
    position = Position(mean.new_zeros(prior.space.num_coordinates), torch.zeros_like(mean).reshape(-1))
    return Mode(position, prior.space.curved(density.curvature_root(mean)), 0, 0.0)


def _weights_penalty(prior: LatentPrior) -> Tensor:
    """½ Σ w₀² / σ² over the trained weights."""
    system, variances = prior.system, prior.variances
    if system is None or variances is None or not _is_network(prior.mean.detach(), system):
        raise TypeError(
            "The evidence at the prior mean is that of the network's own weights: it takes an NTKKernel and a "
            "NetworkMean of one network. Fit with expand_at='mode', or set the hyperparameters."
        )
    function = system.linearization.of_network.jacobian(system.x).function
    weights = torch.cat([tensor.detach().double().reshape(-1) for tensor in function.parameters.values()])
    of_network = function.expand_variances(variances[:, : function.num_groups])[0]
    return (weights.square() / of_network).sum() / 2


def _is_network(mean: Tensor, system: System) -> bool:
    """Whether the prior mean is the network."""
    of_network = system.linearization.of_network
    values = of_network.keep("network values", (system.x,), lambda x: of_network.network(x[0]))
    return torch.allclose(values.reshape(mean.shape), mean, rtol=1e-4, atol=1e-5)


def _system(matrix: LinearOperator) -> System | None:
    """What a neural tangent kernel's matrix is made of; its noise, which the latent function has none of, is zero."""
    if not isinstance(matrix, NTKLinearOperator) or matrix.x1.requires_grad:
        return None
    x = matrix.x1.unsqueeze(0)
    rows = matrix.shape[-1]
    return System(matrix.linearization, x, matrix.variances.reshape(1, -1), x.new_zeros(1, rows))


def _takes_weight_space(system: System, rows: int, ranks: int) -> bool:
    """Whether weight space is cheaper, or all that fits; :class:`ntk_gp.settings.solver` may say so, too."""
    parameters = system.num_parameters
    needed = WeightSpace.nbytes_needed(parameters), FunctionSpace.nbytes_needed(rows)
    chosen = settings.solver.value()
    if chosen == "iterative":
        raise ValueError(
            "ntk_gp.settings.solver is 'iterative', and Laplace's approximation needs a factorisation: set "
            "'function_space', 'weight_space', or None for the cheaper one."
        )
    if not (system.variances > 0).all():  # a group without weight is not in Φ
        return False
    if chosen is not None:
        return chosen == "weight_space"
    in_weights, in_functions = (system.fits(nbytes / 8) for nbytes in needed)
    if in_weights != in_functions:
        return in_weights
    if not in_weights:
        raise MemoryError(
            f"Laplace's approximation needs {readable_bytes(needed[1])} for the {rows} latent values of all points and "
            f"outputs, or {readable_bytes(needed[0])} for the {parameters} parameters: both are more than "
            "ntk_gp.settings.memory_budget. Raise it, linearise fewer parameters (NTKKernel(network, "
            "parameters=['head.*'])), or take fewer points."
        )
    jacobian = system.jacobian
    function_space = jacobian.gram_cost(jacobian) + _STEPS * (ranks**3 / 3 + 4.0 * rows**2)
    return _STEPS * (ranks * parameters**2 + parameters**3 / 3) < function_space


def _check_prior(distribution: MultivariateNormal, density: LogDensity) -> None:
    points, outputs = len(density.labels), density.num_outputs
    expected = (points,) if outputs == 1 else (points, outputs)
    is_multitask = isinstance(distribution, MultitaskMultivariateNormal)
    shape = tuple(distribution.batch_shape + distribution.event_shape)
    if shape != expected or is_multitask != (outputs > 1):
        kind = "MultitaskMultivariateNormal, one task for each class," if outputs > 1 else "MultivariateNormal"
        raise ValueError(
            f"Expected the model's forward to return a {kind} of shape {expected} for {points} labels, got a "
            f"{type(distribution).__name__} of shape {shape}. Several classes take a network with as many outputs: "
            "NetworkMean(network, output='all') and NTKKernel(network, output='all'); two classes one output. There "
            "are no batches of models."
        )
    if is_multitask and not is_interleaved(distribution):
        raise ValueError("Expected a MultitaskMultivariateNormal with interleaved=True, point-major as NTKKernel is.")


def _check_finite(matrix: Tensor, system: System | None) -> None:
    if system is not None:
        system.check_finite(matrix.diagonal())
    if not torch.isfinite(matrix).all():
        raise ValueError("The kernel matrix of the training inputs has NaN or infinite entries. Check the inputs.")


def _check_memory(needed: float, size: str, device: torch.device) -> None:
    if needed > memory.SYSTEM.bytes(device):
        raise MemoryError(
            f"Laplace's approximation needs {readable_bytes(needed)} for its {size} matrices, more than "
            "ntk_gp.settings.memory_budget. Raise it, leave ntk_gp.settings.solver unset, or take fewer points; a "
            "kernel that is an NTKKernel alone, or with GainKernel and ConstantKernel beside it, is solved by its "
            "weights where these are fewer."
        )
