"""The prediction strategy: what is computed once from the training data and serves every prediction."""

from __future__ import annotations

import copy

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy, SGPRPredictionStrategy
from linear_operator import to_dense, to_linear_operator
from linear_operator.operators import LinearOperator, MatmulLinearOperator, ZeroLinearOperator
from linear_operator.utils.memoize import cached, clear_cache_hook
from torch import Size, Tensor

from .._compat import without_diagonal
from ..distributed.replicated import must_agree
from ..jacobian.one_output import is_of_last_layer
from ..network import FrozenNetwork, check_finite, is_finite, normal_tensor
from ..operators import NTKAddedDiagLinearOperator, NTKLinearOperator
from ..operators._batches import FoldedColumns, common_shape
from ..operators._densely_solved import DenselySolved
from ..operators.ntk_posterior_linear_operator import NTKPosteriorLinearOperator
from ..operators.ntk_sum_linear_operator import NTKSumLinearOperator
from ..solvers import FastVariance, Solver, System, choose_fast_variance
from ..solvers.cholesky import cholesky_solve
from .combined_predictions import KeptFactor
from .exactly_solved import exactly_solved, without_constants
from .recognised import networks_of


class NTKPredictionStrategy(DefaultPredictionStrategy):
    r"""Prediction from a vector of weights, whichever solver found them.

    The cache is :math:`\hat w = \Sigma J^\top (K + D)^{-1} (y - m)`, P numbers: the posterior mean at any input is
    :math:`f(x) + J(x) \hat w`, one Jacobian-vector product, however many points were learned from. Variances come from
    the solver's own factor, in function or weight space. What this strategy does not cover (caches with a graph, sums
    and products of kernels) GPyTorch's default does, on exact solves.

    :param train_inputs: The training inputs, one tensor in a list.
    :param train_prior_dist: The prior at them.
    :param train_labels: The training targets.
    :param likelihood: The likelihood.
    """

    def __init__(self, train_inputs, train_prior_dist, train_labels, likelihood, **kwargs):
        _check_targets(train_inputs[0], train_labels)
        self._networks: set[int] = set()  # the states of the networks in K
        self._has_weights = False
        # The test inputs x (1, m, d) seen last, and J(x) ŵ there, (m·C,).
        self._last_shift: tuple[Tensor, Tensor] | None = None
        clear_cache_hook(self)  # made here, since threads that share this could each make their own later
        super().__init__(train_inputs, train_prior_dist, train_labels, likelihood, **kwargs)

    def __reduce__(self):
        """Pickled models come back without one, and prepare their predictions anew: a factor of N² numbers is no part
        of a model."""
        return (_no_strategy, ())

    def __deepcopy__(self, memo: dict) -> NTKPredictionStrategy | None:
        """A copy, or None where there is a graph, which has none: GPyTorch then makes another."""
        new = self.__class__.__new__(self.__class__)
        try:
            new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        except RuntimeError:
            return None
        return new

    @property
    @cached(name="train_system")
    def _train_matrix(self) -> LinearOperator:
        """K + D of the training data; exactly solved also where K is a sum or a product that an NTK is part of, and
        where targets are missing."""
        matrix = self.lik_train_train_covar.evaluate_kernel()
        self._networks = networks_of(matrix)
        if self._missing.any():
            observed = (~self._missing).to(self.train_labels.dtype)
            together = observed.unsqueeze(-1) * observed.unsqueeze(-2) + torch.diag_embed(1 - observed)
            return NTKSumLinearOperator(to_linear_operator(matrix.to_dense() * together))
        return exactly_solved(matrix)

    @property
    @cached(name="constant_train_system")
    def _constant_train_matrix(self) -> LinearOperator:
        """The same without a graph, with its factor from one prediction to the next."""
        with torch.inference_mode(False):
            return self._train_matrix.detach()

    @property
    def _missing(self) -> Tensor:
        """Which targets are NaN, (*batch, N): `gpytorch.settings.observation_nan_policy` takes them for unobserved."""
        return torch.isnan(self.train_labels)

    @property
    @cached(name="solver")
    def solver(self) -> Solver:
        """The solver for K + D, built once."""
        with torch.inference_mode(False):  # predictions with gradients may follow
            return self._train_matrix.solver

    @property
    @cached(name="fast_variance")
    def fast_variance(self) -> FastVariance:
        """The low-rank factor that serves variances when `gpytorch.settings.fast_pred_var` is on, built once."""
        with torch.inference_mode(False):
            return choose_fast_variance(self.solver.system)

    @property
    @cached(name="mean_weights")
    def mean_weights(self) -> Tensor:
        """ŵ, (*batch, P) in float64."""
        with torch.inference_mode(False):
            weights = self._mean_weights(normal_tensor(self.residual))
        self._has_weights = True
        return weights

    def _mean_weights(self, residual: Tensor) -> Tensor:
        batch = residual.shape[:-1]
        if self.solver.system.batch > 1:
            # Targets may have more batches than the system: they are more right-hand sides for it.
            columns = FoldedColumns(residual.unsqueeze(-1), self._train_matrix.batch_shape)
            weights = columns.unfold(self.solver.mean_weights(columns.flat.mT).mT)
            return weights.squeeze(-1)
        weights = self.solver.mean_weights(residual.reshape(1, -1, residual.shape[-1]))
        return weights.reshape(*batch, -1)

    @property
    @cached(name="linear_model")
    def linear_model(self) -> System | None:
        """K + D of all training rows, also of those whose targets are missing, if the posterior is one over weights."""
        with torch.inference_mode(False):
            missing = bool(self._missing.any())
            matrix = exactly_solved(self.lik_train_train_covar.evaluate_kernel()) if missing else self._train_matrix
            if not isinstance(matrix, NTKAddedDiagLinearOperator) or (missing and not self._keeps_factor):
                return None
            return matrix.system if missing else self.solver.system

    def weights_for(self, residual: Tensor) -> Tensor:
        """Σ Jᵀ (K + D)⁻¹ r for every row r, (B, k, N) to (B, k, P), of a linear model; of what was observed alone."""
        if not self._missing.any():
            return self.solver.mean_weights(residual)
        system = self.linear_model
        assert system is not None
        observed = residual.masked_fill(self._missing.unsqueeze(-2), 0.0)
        return system.features(cholesky_solve(self.kept_factor.factor, observed.mT)).mT

    @property
    def residual(self) -> Tensor:
        """Targets less prior mean, (*batch, N) in float64; a constant."""
        return self._residual().detach()

    def _residual(self) -> Tensor:
        mean = self.train_prior_dist.loc
        residual = self.train_labels - mean.reshape(*mean.shape[:-1], self.num_train)
        return residual.double().masked_fill(self._missing, 0.0)

    def _covers(self, test_test_covar: LinearOperator | Tensor) -> bool:
        """Whether this posterior is J(x) ŵ: the kernel is a neural tangent kernel alone, the same as in training, and
        derivatives by hyperparameters are not asked for."""
        return (
            isinstance(test_test_covar, NTKLinearOperator)
            and self._is_linear
            and without_diagonal(self._train_matrix).is_of_one_kernel_with(test_test_covar)
        )

    @property
    def _is_linear(self) -> bool:
        """Whether what was learned is ŵ, and derivatives by hyperparameters are not asked for."""
        return gpytorch_settings.detach_test_caches.on() and self._has_positive_system

    @property
    @cached(name="has_positive_system")
    def _has_positive_system(self) -> bool:
        matrix = self._train_matrix
        return isinstance(matrix, NTKAddedDiagLinearOperator) and matrix._is_positive

    def exact_prediction(self, test_mean, test_test_covar, test_train_covar):
        test_test_covar = without_constants(to_linear_operator(test_test_covar))
        self._check_networks(test_test_covar)
        if self._keeps_factor:
            return self._combined_prediction(test_mean, test_test_covar, to_linear_operator(test_train_covar))
        if not self._covers(test_test_covar):
            return super().exact_prediction(test_mean, test_test_covar, test_train_covar)
        x = test_test_covar.x1
        mean = test_mean + self._mean_shift(x).reshape(*x.shape[:-2], -1)
        if gpytorch_settings.skip_posterior_variances.on():
            return mean, ZeroLinearOperator(*test_test_covar.shape)
        batch_shape = self._train_matrix.batch_shape if self.solver.system.batch > 1 else Size()
        fast = gpytorch_settings.fast_pred_var.on() and self.solver.system.batch == 1
        source = self.fast_variance if fast else self.solver
        return mean, NTKPosteriorLinearOperator(x, x, source=source, batch_shape=batch_shape)

    @property
    def _keeps_factor(self) -> bool:
        """Whether this is a sum or a product that is solved by one dense factor, and derivatives by hyperparameters are
        not asked for."""
        matrix = self._train_matrix
        return isinstance(matrix, DenselySolved) and matrix._is_dense and gpytorch_settings.detach_test_caches.on()

    @property
    @cached(name="kept_factor")
    def kept_factor(self) -> KeptFactor:
        """What predictions of sums and products are made from, built once."""
        with torch.inference_mode(False), torch.no_grad():
            return KeptFactor(self._constant_train_matrix, normal_tensor(self.residual), self._missing)

    def _combined_prediction(
        self, test_mean: Tensor, test_test_covar: LinearOperator, test_train_covar: LinearOperator
    ) -> tuple[Tensor, LinearOperator]:
        if gpytorch_settings.skip_posterior_variances.on():
            return test_mean + self.kept_factor.shift(test_train_covar), ZeroLinearOperator(*test_test_covar.shape)
        shift, covariance = self.kept_factor.prediction(test_test_covar, test_train_covar)
        return test_mean + shift, covariance

    def _check_networks(self, test_test_covar: LinearOperator) -> None:
        """Raises where the network is not the one that the training data were prepared with."""
        self._train_matrix  # noqa: B018 -- prepared now, if it was not
        if self._networks and not networks_of(test_test_covar) <= self._networks:
            raise RuntimeError(
                "The kernel's network has changed since the model's predictions were prepared. Call model.train() and "
                "model.eval() to prepare them anew."
            )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_networks": set()}  # they are others where this is loaded

    def _mean_cache(self, nan_policy: str) -> Tensor:
        return self._alpha if gpytorch_settings.detach_test_caches.on() else self._solved_residual()

    @property
    @cached(name="alpha")
    def _alpha(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return normal_tensor(self._solved_residual())

    def _solved_residual(self) -> Tensor:
        """(K + D)⁻¹ (y - m), (*batch, N)."""
        residual = self._residual().to(self.train_labels.dtype).unsqueeze(-1)
        return self._train_matrix.solve(residual).squeeze(-1)

    def get_fantasy_strategy(self, inputs, targets, full_inputs, full_targets, full_output, **kwargs):
        """The strategy with more data. Its solver starts from this one's, see :func:`ntk_gp.solvers.choose_solver`."""
        likelihood = self.likelihood.get_fantasy_likelihood(**kwargs)
        if isinstance(self._train_matrix, NTKAddedDiagLinearOperator):
            self.solver  # noqa: B018 -- built now, if it was not, to be extended
        return self.__class__(full_inputs, full_output, full_targets, likelihood)

    def exact_predictive_covar(self, test_test_covar, test_train_covar):
        if gpytorch_settings.skip_posterior_variances.on():
            return super().exact_predictive_covar(test_test_covar, test_train_covar)
        constant = gpytorch_settings.detach_test_caches.on()
        matrix = self._constant_train_matrix if constant else self._train_matrix
        cross = to_dense(test_train_covar).masked_fill(self._missing.unsqueeze(-2), 0.0)
        explained = MatmulLinearOperator(cross, -matrix.solve(cross.mT))
        return NTKSumLinearOperator(to_linear_operator(test_test_covar), explained)

    def values_along(self, network: FrozenNetwork, x: Tensor) -> Tensor | None:
        """f(x), (N, C), at test inputs (*batch, m, d), where one pass gives J(x) ŵ as well: that is kept for when it is
        asked for, as is J(x) where it is what the last layer is given. None where it takes two."""
        if not self._is_linear or not (self.solver.is_exact or self._has_weights):
            return None  # GPyTorch sets the tolerance of iterations once it has f(x)
        system, weights = self.solver.system, self.mean_weights
        is_one, linearization = weights.shape[:-1].numel() == 1, system.linearization
        is_present = linearization.has_values_of(network) and system.state == linearization.network.fingerprint()
        if not (is_one and is_present):
            return None
        check_finite(x)
        flat = x.detach().reshape(1, -1, x.shape[-1])
        with torch.no_grad():
            if self._is_of_last_layer:
                jacobian = linearization.jacobian(flat.double(), keep=False)
                system.remember(jacobian)
            else:
                jacobian = linearization.autodiff.linearize(flat)
            found = jacobian.values_and_product(weights.reshape(-1).to(jacobian.x))
        if found is None:
            return None
        values, shift = (part[0].to(x.dtype) for part in found)
        self._last_shift = (flat.clone(), shift)
        return values.clone()

    @property
    @cached(name="is_of_last_layer")
    def _is_of_last_layer(self) -> bool:
        return is_of_last_layer(self.solver.system.jacobian)

    def _mean_shift(self, x: Tensor) -> Tensor:
        """J(x) ŵ: (*batch, m, d) to (*batch, m·C)."""
        known = self._last_shift  # other threads may put another in its place
        if known is not None and not x.requires_grad:
            (seen, shift), flat = known, x.reshape(1, -1, x.shape[-1])
            if seen.dtype == flat.dtype and torch.equal(seen, flat):
                check_shift(shift.unsqueeze(0), x)
                return shift.reshape(*x.shape[:-2], -1)
        linearization = self.solver.system.linearization
        weights = self.mean_weights.to(x.dtype)
        batch = common_shape(x.shape[:-2], weights.shape[:-1])
        if not weights.shape[:-1].numel() > 1:
            flat, tangents = x.reshape(-1, *x.shape[-2:]), weights.reshape(1, 1, -1)
        else:
            flat = x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
            tangents = weights.expand(*batch, weights.shape[-1]).reshape(-1, 1, weights.shape[-1])
        shift = linearization.autodiff.linearize(flat).jvp(tangents)
        check_shift(shift, x)
        return shift.reshape(*batch, -1)


class NTKInducingPointStrategy(SGPRPredictionStrategy):
    """GPyTorch's prediction from inducing points, with a covariance that is exactly solved at any number of points."""

    def exact_predictive_covar(self, test_test_covar, test_train_covar):
        return NTKSumLinearOperator(super().exact_predictive_covar(test_test_covar, test_train_covar))


def _no_strategy() -> None:
    """What a pickled strategy is restored as, and GPyTorch makes one in the place of."""
    return None


def check_shift(shift: Tensor, x: Tensor) -> None:
    """Raises where J(x) ŵ, (k, m·C), is NaN or infinite at some inputs (*batch, m, d)."""
    if is_finite(shift):
        return
    finite = torch.isfinite(shift.detach())
    if not finite.all():
        points = (~finite.reshape(finite.shape[0], x.shape[-2], -1)).any(-1).nonzero()[:3, -1].unique().tolist()
        raise ValueError(
            f"The network's Jacobian is NaN or infinite at some test inputs, of shape {tuple(x.shape)}: first in rows "
            f"{points}. Check the network's weights and the scale of the inputs."
        )


def _check_targets(inputs: Tensor, targets: Tensor) -> None:
    must_agree("training targets", targets)  # before anything that one rank alone may refuse
    if inputs.shape[-2] == 0:
        raise ValueError(
            f"The training set is empty (inputs of shape {tuple(inputs.shape)}). Give at least one point, or predict "
            "in gpytorch.settings.prior_mode()."
        )
    are_integers = not inputs.is_floating_point()  # which the network wants, in the dtype of the targets otherwise
    if (targets.dtype != inputs.dtype and not are_integers) or targets.device != inputs.device:
        raise ValueError(
            f"The training targets are {targets.dtype} on {targets.device}, the inputs {inputs.dtype} on "
            f"{inputs.device}. Convert one of them with .to()."
        )
    if gpytorch_settings.observation_nan_policy.value() == "ignore" and not torch.isfinite(targets).all():
        bad = (~torch.isfinite(targets)).nonzero()[:3].tolist()
        raise ValueError(
            f"Training targets of shape {tuple(targets.shape)} have NaN or infinite values, first at {bad}. Remove "
            "them, or set gpytorch.settings.observation_nan_policy('mask')."
        )
