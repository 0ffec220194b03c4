"""The linearised network while it is trained, in closed form."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.means import Mean
from linear_operator import to_linear_operator
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from .. import memory
from ..distributed.replicated import same_on_all_ranks
from ..sampling import LinearizedFunctions, LinearizedNetwork
from .expansions import Eigenvectors, Expansion, KrylovExpansion
from .filters import Descent, Filter, Flow
from .problem import Inputs, Problem
from .ridge import best_ridge

Times = float | int | Sequence[float] | Tensor

# More rows than this are left to Lanczos' process: finding all eigenvectors would take minutes.
_MOST_ROWS = 4000
_METHODS = ("spectrum", "krylov")


class LinearizedTraining(ABC):
    """What :class:`GradientFlow` and :class:`GradientDescent` have in common; see there."""

    def __init__(
        self,
        source: nn.Module,
        train_x: Tensor,
        train_y: Tensor,
        *,
        loss: str = "half_sum",
        mean: Mean | None = None,
        initial_kernel: Kernel | None = None,
        method: str | None = None,
        tolerance: float = 1e-6,
        max_steps: int = 1000,
    ):
        if method not in (None, *_METHODS):
            raise ValueError(f"method must be 'spectrum', 'krylov' or None, got {method!r}.")
        if initial_kernel is not None and not isinstance(initial_kernel, Kernel):
            raise TypeError(f"initial_kernel must be a gpytorch.kernels.Kernel, got {type(initial_kernel).__name__}.")
        self._problem = Problem(source, train_x, train_y, loss, mean)
        self.loss = loss
        self.method = method or self._cheaper()
        self.tolerance, self.max_steps = tolerance, max_steps
        self._initial = None if initial_kernel is None else self._checked_initial(initial_kernel, train_x)
        self._eigenvectors: Eigenvectors | None = None
        self._expansion: Expansion | None = None

    @abstractmethod
    def _filter(self, times: Tensor) -> Filter:
        """Of times (T,), float64, as the user gives them."""

    def predict(self, x: Tensor, times: Times) -> Tensor:
        """f at inputs x (m, d), at all times: (*times, m), or (*times, m, C) for several outputs.

        In the dtype of x, and differentiable with respect to it.
        """
        rows = self._problem.test_rows(x)
        filter, shape = self._filter_at(times)
        change = self._problem.between(rows.double(), self._problem.x) @ self._duals(filter).mT
        values = self._problem.initial(rows.double()) + change.mT
        return self._shaped(values, shape).to(rows.dtype)

    def distribution(self, x: Tensor, time: float) -> MultivariateNormal:
        r"""The distribution of f at inputs x (m, d), over where training begins: over an ensemble of such networks.

        Its mean is what :meth:`predict` gives. With f₀ ~ N(f₀, K), that is initial weights ~ N(w₀, Σ), the covariance
        is :math:`K_{**} - K_{*X}\, \phi_{2t}(K)\, K_{X*}`, that of the prior at t = 0, and of a Gaussian process
        without noise as t → ∞. With an `initial_kernel` 𝒦 it is
        :math:`\mathcal K_{**} - A \mathcal K_{X*} - \mathcal K_{*X} A^\top + A \mathcal K_{XX} A^\top` for
        :math:`A = K_{*X} \phi_t(K)` (Lee et al. 2019, equation 16).

        :return: A :class:`~gpytorch.distributions.MultivariateNormal`, or an interleaved
            :class:`~gpytorch.distributions.MultitaskMultivariateNormal` for several outputs.
        """
        problem, rows = self._problem, self._problem.test_rows(x)
        filter, shape = self._filter_at(time)
        if shape:
            raise ValueError(f"distribution() is for one time, got {tuple(shape)}. Call it for each.")
        mean = self.predict(x, time)
        at = rows.double()
        cross = problem.between(problem.x, at).to_dense()
        if self._initial is None:
            learned = self._learned(cross, filter.twice())
            covariance = problem.between(at, at).to_dense() - cross.mT @ learned
        else:
            initial = self._initial
            learned = self._learned(cross, filter)
            forgotten = initial.between(at, initial.x).to_dense() @ learned
            kept = learned.mT @ (initial.matrix @ learned)
            covariance = initial.between(at, at).to_dense() - forgotten - forgotten.mT + kept
        covariance = (covariance + covariance.mT) / 2
        rounding = (-covariance.diagonal()).clamp_min(0.0)
        matrix = to_linear_operator((covariance + rounding.diag_embed()).to(rows.dtype))
        if problem.num_outputs == 1:
            return MultivariateNormal(mean, matrix)
        return MultitaskMultivariateNormal(mean, matrix, interleaved=True)

    def training_loss(self, times: Times) -> Tensor:
        """The loss on the training data, (*times), float64: Σ (qᵢᵀr)² g(λᵢ)² / 2 in units of half the sum of squares,
        where g is what is left of an error along an eigenvector."""
        filter, shape = self._filter_at(times)
        values, squares = self._of_residual().measure(filter)
        left = filter.left(values[0]).square()
        return _finite(self._problem.factor / 2 * (left * squares[0]).sum(-1)).reshape(shape)

    def weights(self, times: Times) -> Tensor:
        """w_t − w₀ = ΣJᵀ φₜ(K)(y − f₀), (*times, P), float64, for the parameters in the order of
        `kernel.network.parameter_names`, each flattened.

        :raises TypeError: For kernels other than an NTKKernel, scaled or not.
        """
        self._problem.tangent_kernel("weights()")
        filter, shape = self._filter_at(times)
        return self._problem.weights_of(self._duals(filter)).reshape(*shape, -1)

    def network(self, time: float) -> LinearizedNetwork:
        """The linearised network as it is at a time, as a module of its own; see :func:`~ntk_gp.adapted_network`.

        :raises TypeError: For kernels other than an NTKKernel, scaled or not.
        :raises ValueError: If training begins at another function than the network, or the kernel has `active_dims`.
        """
        kernel = self._problem.tangent_kernel("network()")
        if self._problem.mean is not None or self._problem.seen(self._problem.x) is not self._problem.x:
            raise ValueError(
                "With a mean of its own, or a kernel with active_dims, the trained function is more than the network: "
                "use predict(x, times)."
            )
        self._single(time)
        trained = LinearizedNetwork(kernel.network, self.weights(time).to(self._problem.dtype))
        trained.try_at(self._problem.x[:2].to(self._problem.dtype))
        return trained

    def ensemble(
        self, time: float, num_functions: int, *, generator: torch.Generator | None = None
    ) -> LinearizedFunctions:
        """Functions from prior weights w ~ N(w₀, Σ), each trained until a time: draws from :meth:`distribution`.

        :param num_functions: How many, k.
        :param generator: The source of randomness. (Default: torch's own, on the CPU.)
        :return: A module that maps (*batch, m, d) to (k, *batch, m), or (k, *batch, m, C).
        :raises TypeError: For kernels other than an NTKKernel, scaled or not.
        :raises ValueError: With an `initial_kernel`, of which there are no weights.
        """
        problem, kernel = self._problem, self._problem.tangent_kernel("ensemble()")
        if self._initial is not None:
            raise ValueError("An initial_kernel has functions without weights: sample from distribution(x, time).")
        filter = self._filter_at(self._single(time))[0]
        source = torch.device("cpu") if generator is None else generator.device
        drawn = torch.randn(
            num_functions, len(problem.variances), dtype=torch.float64, generator=generator, device=source
        )
        start = same_on_all_ranks(drawn).to(problem.x) * problem.variances.sqrt()
        with torch.no_grad():
            residuals = problem.residual.unsqueeze(-1) - problem.jacobian() @ start.mT
        weights = start + problem.weights_of(self._learned(residuals, filter).mT)
        identity = torch.arange(problem.x.shape[-1], device=problem.x.device)
        seen = problem.seen(identity.unsqueeze(0))[0]
        dims = None if seen.equal(identity) else seen
        functions = LinearizedFunctions(kernel.network, weights, problem.mean, dims)
        functions.try_at(problem.seen(problem.x)[:2].to(problem.dtype))
        return functions

    def ridge(self, time: float) -> float:
        r"""The noise σ² with which Gaussian process regression comes closest to training stopped at a time.

        It is the one with the least mean square distance of :math:`K \phi_t(K) r` and
        :math:`K (K + \sigma^2 I)^{-1} r`, what either has learned at the training inputs, for the eigenvalues of K and
        this residual. The rule of thumb is σ² = 1/t, in units of half the sum of squares: with it both agree to first
        order in λt, and where λt is large. Gradient flow has learned more than that everywhere between, so that this
        is below 1/t.

        :return: ∞ at t = 0, 0 as t → ∞.
        """
        filter = self._filter_at(self._single(time))[0]
        elapsed = float(filter.elapsed)
        if elapsed == 0:
            return math.inf
        if elapsed == math.inf:
            return 0.0
        values, squares = self._of_residual().measure(filter)
        return best_ridge(filter, values[0], squares[0])

    def _cheaper(self) -> str:
        problem = self._problem
        return "spectrum" if problem.num_rows <= _MOST_ROWS and problem.has_room_for_eigenvectors() else "krylov"

    def _checked_initial(self, kernel: Kernel, train_x: Tensor) -> Inputs:
        initial = Inputs(kernel, train_x)
        if initial.num_rows != self._problem.num_rows:
            raise ValueError(
                f"initial_kernel has a matrix of {initial.num_rows} rows at the training inputs, and the kernel one of "
                f"{self._problem.num_rows}: both need the same outputs."
            )
        return initial

    def _filter_at(self, times: Times) -> tuple[Filter, torch.Size]:
        given = torch.as_tensor(times, dtype=torch.float64, device=self._problem.x.device).detach()
        if not bool((given >= 0).all()):
            raise ValueError(f"Times must not be negative, nor NaN; got {times!r}.")
        filter = self._filter(given.reshape(-1))
        if self.method == "krylov" and not bool(filter.elapsed.isfinite().all()):
            raise ValueError(
                "The limit t → ∞ needs method='spectrum'. It is Gaussian process regression without noise."
            )
        return filter, given.shape

    def _single(self, time: Any) -> float:
        if torch.as_tensor(time).dim():
            raise ValueError(f"Expected one time, got {tuple(torch.as_tensor(time).shape)}. Call it for each.")
        return float(time)

    def _duals(self, filter: Filter) -> Tensor:
        """φ(K)(y − f₀), (T, N)."""
        return _finite(self._of_residual().apply(filter).squeeze(-1))

    def _of_residual(self) -> Expansion:
        if self._expansion is None:
            self._expansion = self._expand(self._problem.residual.unsqueeze(-1))
        return self._expansion

    def _learned(self, columns: Tensor, filter: Filter) -> Tensor:
        """φ(K) V at one time, (N, r); some columns at a time where each has a Krylov space to itself."""
        block = columns.shape[1]
        if self.method == "krylov":
            block = max(1, self._room_for_vectors() // min(self.max_steps, self._problem.num_rows))
        pieces = [self._expand(some).apply(filter)[0] for some in columns.split(max(1, block), dim=1)]
        return _finite(torch.cat(pieces, dim=1))

    def _room_for_vectors(self) -> int:
        """How many of N numbers the memory budget has room for, and for a copy of them."""
        return memory.SYSTEM.bytes(self._problem.x.device) // (2 * 8 * self._problem.num_rows)

    def _expand(self, columns: Tensor) -> Expansion:
        if self.method == "krylov":
            most = max(1, min(self.max_steps, self._problem.num_rows, self._room_for_vectors() // columns.shape[1]))
            return KrylovExpansion(self._problem.product, columns.detach(), self.tolerance, most)
        if self._eigenvectors is None:
            if not self._problem.has_room_for_eigenvectors():
                raise RuntimeError(
                    f"The eigenvectors of {self._problem.num_rows} rows do not fit in ntk_gp.settings.memory_budget. "
                    "Raise it, or take method='krylov'."
                )
            self._eigenvectors = Eigenvectors(self._problem.dense())
        return self._eigenvectors.expand(columns)

    def _shaped(self, rows: Tensor, times: torch.Size) -> Tensor:
        """(T, m·C) to (*times, m), or (*times, m, C)."""
        return self._problem.shaped(rows.reshape(*times, rows.shape[-1]))


class GradientFlow(LinearizedTraining):
    r"""A linearised network under gradient flow on squared loss: any function value at any time, in closed form.

    With :math:`f(x; w) = f_0(x) + J(x)(w - w_0)`, the flow :math:`\dot w = -\Sigma \nabla_w L` from w₀, and
    L = ½‖f(X) − y‖², a network with the tangent kernel K = JΣJᵀ has at time t

    .. math::

        f_t(x) = f_0(x) + K(x, X)\, \phi_t(K)\, (y - f_0(X)), \qquad
        \phi_t(\lambda) = \frac{1 - e^{-\lambda t}}{\lambda}

    (Lee et al., "Wide neural networks of any depth evolve as linear models under gradient descent", NeurIPS 2019). No
    inverse of K is taken: it may be singular, and t infinite. Prior variances act as learning rates: with Σ = I, it is
    plain gradient flow. Computation is in float64, whatever the inputs' dtype.

    Up to 4,000 rows N = n·C that fit in the memory budget, all eigenvectors of K are found once, O(N³), and serve every
    time. Beyond, only products with K are formed (`method="krylov"`): one Krylov space serves all times, and it grows
    until the error is within a tolerance, by a bound that is proven; a warning says where it does not get there.

    :param source: The network, or its kernel: an :class:`~ntk_gp.NTKKernel`, in a
        :class:`~gpytorch.kernels.ScaleKernel` or not. Any other kernel of GPyTorch's is trained in function space. It
        is copied: what becomes of it later has no effect here.
    :param train_x: The training inputs, (n, d), or (n, *input_shape).
    :param train_y: Their targets, (n,) or (n, 1); (n, C) for all outputs of a network.
    :param loss: What time is measured by: `"half_sum"` of squares; `"sum"` makes it pass twice as fast, `"half_mse"`
        N times as slowly, and `"mse"`, which is :class:`torch.nn.MSELoss`, by 2/N.
    :param mean: The function that training begins at. (Default: the network; zero for other kernels.)
    :param initial_kernel: The covariance of the function that training begins at, for
        :meth:`~ntk_gp.dynamics.LinearizedTraining.distribution`. (Default: K itself, initial weights ~ N(w₀, Σ).)
    :param method: `"spectrum"` or `"krylov"`. (Default: by the number of rows.)
    :param tolerance: Of Krylov's method: the error of w_t − w₀, relative to it, as the prior measures weights.
    :param max_steps: Of Krylov's method: how many products with K.

    :ivar str method: The one that is taken.

    :raises TypeError: For other kinds of arguments.
    :raises ValueError: For targets of another shape than n·C, batches, NaN, unknown losses and methods.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(20, 2)
        >>> flow = GradientFlow(network, x, x.prod(-1), loss="mse")
        >>> flow.predict(torch.randn(5, 2), times=[0.0, 1.0, 10.0]).shape
        torch.Size([3, 5])
        >>> flow.distribution(torch.randn(5, 2), time=10.0).stddev.shape
        torch.Size([5])
    """

    def _filter(self, times: Tensor) -> Flow:
        return Flow(times * self._problem.factor)


class GradientDescent(LinearizedTraining):
    r"""A linearised network under gradient descent, :math:`w_{k+1} = w_k - \eta \Sigma \nabla_w L`, on squared loss.

    As :class:`GradientFlow`, with the number of steps k for the time, and
    :math:`\phi_k(\lambda) = (1 - (1 - \eta\lambda)^k) / \lambda`.

    :param rate: The learning rate η, for the gradient of the loss that is chosen. Above :func:`largest_stable_rate`
        training diverges: so does what is computed, under a warning.
    :param options: As for :class:`GradientFlow`.

    :raises OverflowError: Where training has diverged beyond all numbers.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(20, 2)
        >>> from ntk_gp import largest_stable_rate
        >>> rate = 0.5 * largest_stable_rate(network, x, loss="mse")
        >>> descent = GradientDescent(network, x, x.prod(-1), rate=rate, loss="mse")
        >>> descent.predict(torch.randn(5, 2), times=[0, 10, 1000]).shape
        torch.Size([3, 5])
    """

    def __init__(self, source: nn.Module, train_x: Tensor, train_y: Tensor, *, rate: float, **options: Any):
        if not 0 < rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {rate!r}.")
        super().__init__(source, train_x, train_y, **options)
        self.rate = float(rate)
        self._is_known_to_be_stable = False

    def _filter(self, times: Tensor) -> Descent:
        if bool((times != times.round()).any()) or not bool(times.isfinite().all()):
            raise ValueError(f"Steps of gradient descent are whole numbers, got {times.tolist()[:5]}.")
        if not self._is_known_to_be_stable:
            self._warn_where_unstable(times.new_ones(1))
        return Descent(times, self.rate * self._problem.factor)

    def _warn_where_unstable(self, step: Tensor) -> None:
        """By the largest eigenvalue as far as it is known, which with Krylov's method is a little less."""
        rate = self.rate * self._problem.factor
        largest = float(self._of_residual().measure(Descent(step, rate))[0].max())
        self._is_known_to_be_stable = rate * largest <= 2
        if not self._is_known_to_be_stable:
            warnings.warn(
                f"Gradient descent with rate={self.rate:.4g} diverges: the largest stable rate is "
                f"{self.rate * 2 / (rate * largest):.4g}. See ntk_gp.largest_stable_rate.",
                NumericalWarning,
                stacklevel=5,
            )


def _finite(learned: Tensor) -> Tensor:
    if not learned.isfinite().all():
        raise OverflowError(
            "Training has diverged beyond all numbers at these times: the rate is far above "
            "largest_stable_rate(network, train_x)."
        )
    return learned
