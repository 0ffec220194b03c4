"""A model's hyperparameters as one vector without constraints, and their log posterior density in it."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.models import ExactGP
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from ..bridge.recognised import contains_ntk
from ..operators import NTKAddedDiagLinearOperator
from ..operators.ntk_sum_linear_operator import NTKSumLinearOperator
from ..priors import check_is_regression
from .coordinates import Coordinate, Coordinates
from .marginal_likelihood import SumOfKernels
from .prior_terms import PriorTerm, in_one_pass, log_slope

# Second differences of a gradient for each; beyond, an approximation of their posterior is another task.
MOST = 200


class Hyperparameters:
    """The trained parameters of an ExactGP and its likelihood as one vector u, (d,) in float64, and their density.

    The density is that of the posterior over u: the exact marginal likelihood, times the densities of the priors. A
    prior on t(θ), be it θ, its logarithm or the raw parameter, is one on u with the density p(t(θ(u))) |dt/du|. What
    has no prior is flat in u, and the posterior is then known up to a constant factor only.

    Setting u writes to the model, which is made for that: see :func:`working_copy`.

    :param model: The model, in train mode from here on.
    :param jacobians: Leave out |dt/du| with False: GPyTorch's objective, times the number of data.
    :raises ValueError: If nothing is trained, or more than is meant by hyperparameters.
    """

    def __init__(self, model: ExactGP, jacobians: bool = True):
        self.model = model.train()
        self.likelihood = model.likelihood.train()
        self._mll = ExactMarginalLogLikelihood(self.likelihood, model)
        self.coordinates = Coordinates(
            [
                Coordinate(name, parameter, model.constraint_for_parameter_name(name))
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            ]
        )
        self.parameters = self.coordinates.parameters
        self.size = sum(self.coordinates.sizes)
        if not 0 < self.size <= MOST:
            raise ValueError(
                f"{type(model).__name__} has {self.size} hyperparameters that are trained; between 1 and {MOST} are "
                "averaged over. Set requires_grad_(False) on those that should stay as they are."
            )
        self.priors = [
            PriorTerm(prior, owner, closure, self.parameters) for _, owner, prior, closure, _ in _priors(model)
        ]
        self._priors_in_one_pass = in_one_pass(self.priors)
        self._jacobians = jacobians

    def present(self) -> Tensor:
        """u as the model has it, (d,)."""
        return self.coordinates.u()

    def values(self) -> dict[str, Tensor]:
        """θ as the model has it, by name."""
        return {coordinate.public_name: coordinate.value().clone() for coordinate in self.coordinates.each}

    def set(self, u: Tensor) -> None:
        """Writes u (d,) into the model."""
        with torch.no_grad():
            self._write(self.coordinates.raw(u.detach()))

    def log_density(self, u: Tensor) -> tuple[float, Tensor]:
        """The log density at u (d,), up to the constant of parameters without a prior, and its gradient (d,).

        -inf, with a gradient of NaN, where the model cannot be evaluated in float64.
        """
        u = u.detach().requires_grad_()
        with torch.inference_mode(False), torch.enable_grad():
            raw = self.coordinates.raw(u)
            self._write([each.detach() for each in raw])
            try:
                of_model = self._of_model() + self._of_priors()
                gradients = torch.autograd.grad(of_model, self.parameters, allow_unused=True)
            except (NanError, NotPSDError, torch.linalg.LinAlgError):
                return -math.inf, torch.full_like(u, math.nan)
            outer = [torch.zeros_like(r) if g is None else g.to(r) for g, r in zip(gradients, raw, strict=True)]
            value = float(of_model.detach())
            if self._jacobians:
                of_raw = self._log_slopes(u, raw)
                value += float(of_raw.detach())
                raw, outer = [*raw, of_raw], [*outer, torch.ones_like(of_raw)]
            (through,) = torch.autograd.grad(raw, u, outer)
        return value if math.isfinite(value) else -math.inf, through

    def value(self, u: Tensor) -> float:
        """The log density alone."""
        self.set(u)
        try:
            with torch.inference_mode(False):
                with torch.set_grad_enabled(self._has_spectrum):
                    value = float(self._of_model().detach())
                with torch.enable_grad():
                    if self._jacobians:
                        u = u.detach().requires_grad_()
                        value += float(self._of_priors(create_graph=False))
                        value += float(self._log_slopes(u, self.coordinates.raw(u)).detach())
        except (NanError, NotPSDError, torch.linalg.LinAlgError):
            return -math.inf
        return value if math.isfinite(value) else -math.inf

    def starts(self) -> list[Tensor]:
        """Where to search for the mode from: the present u, and the priors' means where they have one."""
        present = self.present()
        for _, owner, prior, closure, setting in _priors(self.model):
            try:
                center = prior.mean.expand(closure(owner).shape).detach()
                if setting is not None and center.isfinite().all():
                    setting(owner, center)
            except (RuntimeError, NotImplementedError, AttributeError):
                continue  # not every prior has a mean, in the shape of what it is on
        centers = self.present()
        self.set(present)
        is_other = centers.isfinite().all() and not torch.allclose(centers, present)
        return [present, centers] if is_other else [present]

    def without_proper_prior(self) -> str | None:
        """Why the density has no known constant; None where it has: every parameter has one proper prior."""
        covered = torch.zeros(self.size, dtype=torch.long, device="cpu")
        for prior in self.priors:
            if prior.elements is None:
                return f"the prior {prior.name} is on a function of several parameters that does not determine them"
            covered[prior.elements] += 1
        names = [c.public_name for c in self.coordinates.each for _ in range(c.parameter.numel())]
        for count, why in ((covered == 0, "no prior"), (covered > 1, "more than one prior")):
            if count.any():
                return f"{', '.join(dict.fromkeys(n for n, c in zip(names, count.tolist(), strict=True) if c))}: {why}"
        return None

    def _write(self, raw: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, raw, strict=True):
                parameter.copy_(value)

    @functools.cached_property
    def _has_spectrum(self) -> bool:
        """Whether this is a linear model, the marginal likelihoods of which come from one eigendecomposition where they
        are differentiated."""
        with torch.no_grad():
            inputs = self.model.train_inputs  # noise may depend on them
            matrix = self.likelihood(self.model(*inputs), *inputs).lazy_covariance_matrix.evaluate_kernel()
        return isinstance(matrix, NTKAddedDiagLinearOperator)

    def _of_model(self) -> Tensor:
        """Marginal likelihood times densities of what priors are on."""
        return self._of_any_model() if self._sum_of_kernels is None else self._of_sum(self._sum_of_kernels)

    @functools.cached_property
    def _sum_of_kernels(self) -> SumOfKernels | None:
        """What has the marginal likelihood of a plain sum of kernels sooner than GPyTorch. It is made at the present u
        and compared with GPyTorch's value at another one; None where they differ, or the model is of another form."""
        if self._has_spectrum:
            return None
        before, u = [parameter.detach().clone() for parameter in self.parameters], self.present()
        try:
            sooner = SumOfKernels.of(self.model)
            if sooner is None or not u.isfinite().all():
                return None
            self.set(u + torch.linspace(0.1, 0.3, self.size).to(u))
            with torch.no_grad():
                ours, gpytorchs = self._of_sum(sooner), self._of_any_model()
        except Exception:  # what is wrong with the model, if anything is, GPyTorch says
            return None
        finally:
            self._write(before)
        return sooner if torch.allclose(ours, gpytorchs, rtol=1e-8, atol=1e-8) else None

    def _of_sum(self, likelihood: SumOfKernels) -> Tensor:
        return likelihood() + sum(prior.log_density() for prior in self.priors if not prior.is_constant)

    def _of_any_model(self) -> Tensor:
        """The same as GPyTorch has it."""
        model = self.model
        output = model(*model.train_inputs)
        if not contains_ntk(model):  # where there is one, GPyTorch is exact as it is
            output = type(output)(output.mean, NTKSumLinearOperator(output.lazy_covariance_matrix))
        value = self._mll(output, model.train_targets, *model.train_inputs).double() * output.event_shape.numel()
        return value - sum(float(prior.log_density().detach()) for prior in self.priors if prior.is_constant)

    def _of_priors(self, create_graph: bool = True) -> Tensor:
        """Σ log |det dt/draw|, differentiable in the raw parameters."""
        slopes = [log_slope(priors, create_graph) for priors in self._priors_in_one_pass] if self._jacobians else []
        return torch.stack(slopes).sum() if slopes else self.parameters[0].new_zeros((), dtype=torch.float64)

    def _log_slopes(self, u: Tensor, raw: list[Tensor]) -> Tensor:
        """Σ log |draw/du| over what has a prior."""
        (slopes,) = torch.autograd.grad([each.sum() for each in raw], u, create_graph=True)
        elements = [prior.elements for prior in self.priors if prior.elements is not None]
        if not elements or not slopes.requires_grad:
            return slopes.new_zeros((), requires_grad=True) + 0.0 * u.sum()
        return slopes[torch.cat(elements).to(slopes.device)].abs().log().sum()


def _priors(model: ExactGP) -> list[tuple]:
    """(name, owner, prior, closure, setting_closure) of each registered prior."""
    return [(name, owner, prior, closure, setting) for name, owner, prior, closure, setting in model.named_priors()]


def working_copy(model: ExactGP) -> ExactGP:
    """A copy in float64 to set hyperparameters in, which shares the network's tensors and what was computed from it.

    Neither prediction caches nor graphs are copied: there is nothing of the copy's own in the model afterwards.

    :raises TypeError: If it is no ExactGP with a Gaussian likelihood.
    :raises ValueError: If it has no training data, batches or transforms, or targets are NaN and not masked.
    """
    _check(model)
    strategy = model.prediction_strategy
    memo: dict[int, Any] = {} if strategy is None else {id(strategy): None}
    new = copy.deepcopy(model, memo)
    new.train_inputs = tuple(x.detach().double() for x in model.train_inputs)
    new.train_targets = model.train_targets.detach().double()
    return new.double()


def _check(model: ExactGP) -> None:
    check_is_regression(model)
    ExactMarginalLogLikelihood(model.likelihood, model)  # refuses other likelihoods
    if any(getattr(model, name, None) is not None for name in ("input_transform", "outcome_transform")):
        raise ValueError(
            "The model transforms inputs or outcomes, as BoTorch's do, and its predictions would be of the transformed "
            "ones. Make it with input_transform=None and outcome_transform=None, of data that are transformed already."
        )
    if model.train_inputs is None or model.train_targets is None or model.train_targets.numel() == 0:
        raise ValueError("The model has no training data. Call model.set_train_data() first.")
    if any(x.dim() > 2 for x in model.train_inputs):
        shapes = [tuple(x.shape) for x in model.train_inputs]
        raise ValueError(f"Expected training inputs (n, d), got {shapes}: make a model for each batch.")
    points, targets = len(model.train_inputs[0]), tuple(model.train_targets.shape)
    if targets[0] != points:
        raise ValueError(
            f"Expected targets ({points},) or ({points}, C) at {points} inputs, got {targets}: "
            "make a model for each batch."
        )
    if gpytorch_settings.observation_nan_policy.value() == "ignore" and not model.train_targets.isfinite().all():
        raise ValueError(
            "Training targets are NaN or infinite. Remove them, or set "
            "gpytorch.settings.observation_nan_policy('mask')."
        )
