"""Starting values and weak priors from the data, on the logarithms of what they scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpytorch import Module
from gpytorch import settings as gpytorch_settings
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from gpytorch.models import ExactGP
from gpytorch.priors import NormalPrior
from torch import Tensor, nn

from .kernels import GainKernel, NTKKernel

# The part of a point with the variance of the whole residual that counts where gain and offset are taken out.
_FURTHER_POINT = 0.5

# What scales a kernel, of GPyTorch's kernels and of this package's: each a factor of a part of its diagonal.
SCALES = ("outputscale", "variance", "gain_variance", "offset_variance", "constant")


def register_log_prior(module: Module, name: str, value: float | Tensor, width: float | Tensor) -> None:
    r"""Sets a positive parameter θ to a value, and registers the prior :math:`\log θ \sim N(\log v, w^2)`.

    The density that GPyTorch adds to its objective is that of log θ, so that its mode is the value in whatever way θ is
    parametrised, and so is the median of θ. (:class:`~gpytorch.priors.LogNormalPrior` has its mode at
    :math:`v e^{-w^2}` instead.) The prior is kept, saved and sampled from as every other of GPyTorch's, under the name
    `log_{name}_prior`; a former one of this name is replaced.

    :param module: What has the parameter: a kernel, a likelihood, a mean.
    :param name: Of the parameter, without `raw_`: `"outputscale"`, `"lengthscale"`, `"noise"`, `"variance"`, ...
    :param value: The value v, one number or what broadcasts to the parameter's shape.
    :param width: The standard deviation w of log θ, in e-folds; the same shapes.
    :raises AttributeError: If the module has no such parameter.
    :raises ValueError: If value or width are not positive and finite, the value is outside the parameter's constraint,
        or the parameter has another prior already.

    Example:
        >>> from gpytorch.kernels import RBFKernel, ScaleKernel
        >>> kernel = ScaleKernel(RBFKernel())
        >>> register_log_prior(kernel, "outputscale", 0.5, width=2.0)
        >>> round(kernel.outputscale.item(), 6)
        0.5
    """
    _register(module, name, value, width, NormalPrior)


def _register(module: Module, name: str, value: float | Tensor, width: float | Tensor, kind: type[NormalPrior]) -> None:
    if not isinstance(module, Module) or not isinstance(getattr(module, name, None), Tensor):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r} to have a prior.")
    prior_name = _prior_name(name)
    _check_has_no_prior(module, name, except_for=prior_name)
    present = getattr(module, name).detach()
    values, widths = (_positive(each, what, name, present) for each, what in ((value, "value"), (width, "width")))
    _set_within_constraint(module, name, values.expand_as(present))
    # One number stays one: it is easier to read, and serves the parameter in every shape.
    prior = kind(values.log(), widths.expand_as(values) if values.dim() else widths)
    module.register_prior(prior_name, prior, functools.partial(_log_of, name), functools.partial(_set_by_log, name))


def scale_to_data(
    model: ExactGP,
    *,
    noise: float = 0.01,
    shares: Sequence[float] | None = None,
    width: float = 2.0,
    lengthscale_width: float = 1.0,
) -> float:
    r"""Gives a model of your own starting values in the scale of its data, and weak log-normal priors around them.

    With :math:`v_0 = \operatorname{mean}\,(y - m(x))^2`, what the mean leaves unexplained:

    * the noise starts at 1 % of :math:`v_0`;
    * the scale of each term of the kernel starts at the term's share of :math:`v_0` over the mean of the term's
      diagonal at the training inputs, so that the terms contribute their shares whatever their own units are. A scale
      is the outputscale of a :class:`~gpytorch.kernels.ScaleKernel`, or another one in
      :data:`ntk_gp.priors.SCALES`; where a term has several, such as gain and offset, they have equal parts. So have
      the groups of an :class:`~ntk_gp.NTKKernel` with `variance_groups`: the variance of each of its G groups starts
      where the group contributes a G-th of what the kernel does, and has a prior of its own. A group on which the
      outputs do not depend at these inputs, such as a dead layer, says nothing; it has the one value that would
      serve all groups, and the others the share;
    * each lengthscale starts at half the spread of what the kernel sees: the median distance between the training
      inputs where the kernel has a metric of its own (a method `median_distance(x)`), else half the diagonal
      of the box around them; with ARD √d/2 times the range of each column, which is the same for columns alike.

    A :class:`~ntk_gp.GainKernel` in the sum comes first: the other terms and the noise start at their shares of what
    gain and offset leave, :math:`v_1`. That is the residual sum of squares beside their least-squares fit, over the
    degrees of freedom that are left, with half a further point of :math:`v_0` for where there are few; at most
    :math:`v_0`. An offset alone may be most of :math:`v_0`, and says nothing of the size of the rest.

    All of them as by :func:`register_log_prior`. A parameter that has a prior already, but for one of an earlier call,
    or is not trained, stays as it is. The mean counts as it is: give a constant one its constant first.

    :param model: An ExactGP with training data, a `mean_module` and a `covar_module`: one scaled term, or a sum of
        them.
    :param noise: The noise variance as a part of v₀ (v₁ beside a gain).
    :param shares: The share of v₀ (v₁) of each term, in the order of the sum. (Default: equal ones that add up to one.)
    :param width: Of the priors on scales and noise, in e-folds.
    :param lengthscale_width: Of the priors on lengthscales, in e-folds.
    :return: v₀.
    :raises TypeError: If the model is of another kind.
    :raises ValueError: If it has no training data, batches, or a term without a scale, if targets are missing or the
        mean explains them all, or where a value is outside its parameter's constraint.

    Example:
        >>> import gpytorch
        >>> from ntk_gp import NetworkMean, NTKKernel
        >>> class AdaptedGP(gpytorch.models.ExactGP):
        ...     def __init__(self, x, y, network):
        ...         super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        ...         self.mean_module = NetworkMean(network)
        ...         self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network))
        ...     def forward(self, x):
        ...         return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 10), torch.nn.Tanh(), torch.nn.Linear(10, 1))
        >>> gp = AdaptedGP(torch.randn(20, 2), torch.randn(20), network)
        >>> unexplained = scale_to_data(gp)
        >>> bool(torch.isclose(gp.likelihood.noise, torch.tensor(0.01 * unexplained)))
        True
    """
    x = _training_inputs(model)
    unexplained = unexplained_variance(model)
    terms = list(_terms(model.covar_module))
    gains = [_gain_in(term) for term in terms]
    beyond = _beyond_gain(model, next(filter(None, gains), None), unexplained)
    scales = [_scales(term) for term in terms]
    portions = _portions(shares, terms)
    for term, of, portion, gain in zip(terms, scales, portions, gains, strict=True):
        variance = portion * (beyond if gain is None else unexplained) / len(of)
        for (kernel, name), diagonals in zip(of, _diagonals_per_scale(term, of, x), strict=True):
            _register_if_free(kernel, name, _in_equal_parts(variance, diagonals), width)
    for kernel, value in _lengthscales(model.covar_module, x, None):
        _register_if_free(kernel, "lengthscale", value, lengthscale_width)
    kinds = [name for name in ("noise", "task_noises") if _is_free(model.likelihood, name)]
    for name in kinds:
        _register_if_free(model.likelihood, name, noise * beyond / len(kinds), width)
    return unexplained


def _gain_in(term: Kernel) -> GainKernel | None:
    while isinstance(term, ScaleKernel):
        term = term.base_kernel
    return term if isinstance(term, GainKernel) else None


def _beyond_gain(model: ExactGP, gain: GainKernel | None, unexplained: float) -> float:
    """v₁, what the mean leaves unexplained beside the best multiple of the network and the best level; v₀ without."""
    if gain is None:
        return unexplained
    with torch.no_grad():
        x, y = _training_inputs(model), model.train_targets
        residual = (y - model.mean_module(x)).double().reshape(-1, 1)
        seen = ~residual.isnan().squeeze(-1)
        columns = gain.features(x).double()[seen]
        fitted = torch.linalg.lstsq(columns, residual[seen], driver="gelsd" if columns.device.type == "cpu" else None)
        squares = float((residual[seen] - columns @ fitted.solution).square().sum())
    freedom = max(len(columns) - columns.shape[-1], 0)
    return min(unexplained, (squares + _FURTHER_POINT * unexplained) / (freedom + _FURTHER_POINT))


def unexplained_variance(model: ExactGP) -> float:
    """v₀, the mean of (y - m(x))² over the training data.

    :raises ValueError: If it is zero, up to rounding, or not a finite number.
    """
    with torch.no_grad():
        mean, y = model.mean_module(_training_inputs(model)), model.train_targets
        squares = (y - mean).double().square()
        missing = y.isnan() if gpytorch_settings.observation_nan_policy.value() != "ignore" else torch.zeros_like(y) > 0
        v0 = float(squares[~missing].mean())
        size = float(y[~missing].double().square().mean())
    if not math.isfinite(v0):
        raise ValueError(
            f"What the mean leaves unexplained, mean (y - m(x))², is {v0}: targets or mean are NaN or infinite, or all "
            "targets are missing. Remove such points, or set gpytorch.settings.observation_nan_policy('mask')."
        )
    if v0 <= torch.finfo(y.dtype).eps ** 2 * max(size, torch.finfo(y.dtype).tiny):
        raise ValueError(
            "The mean explains the targets exactly, mean (y - m(x))² = 0: there is nothing that scales could be taken "
            "from. Use targets that the network was not trained on, or set the scales yourself."
        )
    return v0


def check_is_regression(model: Any) -> None:
    """Raises where a model is no ExactGP: there are no residuals to take scales from, and no Gaussian likelihood to
    average by."""
    if isinstance(model, ExactGP):
        return
    targets = getattr(model, "train_targets", None)
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        way_out = (
            "Labels have no residuals: give its scales weak priors with register_log_prior(kernel, 'outputscale', "
            "10.0, width=1.5), and fit them by LaplaceMarginalLogLikelihood or compare them by "
            "model.leave_one_out_proba()."
        )
    else:
        way_out = "Of a list of models, give each."
    raise TypeError(f"Expected a gpytorch.models.ExactGP, got {type(model).__name__}. {way_out}")


def _training_inputs(model: ExactGP) -> Tensor:
    check_is_regression(model)
    for name in ("mean_module", "covar_module"):
        if not isinstance(getattr(model, name, None), nn.Module):
            raise TypeError(
                f"{type(model).__name__} has no {name}: scales are those of its covar_module, where its mean_module "
                "leaves something unexplained. Name them so, or call register_log_prior for each parameter."
            )
    if model.train_inputs is None or model.train_targets is None or model.train_targets.numel() == 0:
        raise ValueError("The model has no training data to take scales from. Call model.set_train_data() first.")
    (x,) = model.train_inputs
    if x.dim() > 2 or getattr(model.covar_module, "batch_shape", ()):
        raise ValueError(
            f"Expected training inputs (n, d) and a kernel without batches, got {tuple(x.shape)} and "
            f"{tuple(model.covar_module.batch_shape)}. Scale one model after the other, or call register_log_prior."
        )
    return x


# Terms and their scales.


def _terms(kernel: Kernel) -> Iterator[Kernel]:
    if isinstance(kernel, AdditiveKernel):
        for each in kernel.kernels:
            yield from _terms(each)
    else:
        yield kernel


def _scales(term: Kernel) -> list[tuple[Kernel, str]]:
    """The kernels in it that have scales, and these scales' names."""
    scales = [(term, name) for name in SCALES if _parameters_behind(term, name)]
    kind = type(term).__name__
    if not scales and not isinstance(term, ScaleKernel):  # such as a product with one scaled factor
        scales = [each for kernel in term.sub_kernels() if kernel is not term for each in _own_scales(kernel)]
        if len(scales) > 1:
            raise ValueError(
                f"The term {kind} has {len(scales)} scales inside of it. Leave one of them, around the whole term."
            )
    elif isinstance(term, ScaleKernel) and any(
        _own_scales(kernel) for kernel in term.sub_kernels() if kernel is not term
    ):
        raise ValueError(
            f"Inside the {kind} there is another scale, and of two that are multiplied neither is known. Leave one of "
            "them: ScaleKernel(a) + ScaleKernel(b) in place of ScaleKernel(ScaleKernel(a) + ScaleKernel(b))."
        )
    if not scales:
        raise ValueError(
            f"The term {kind} has no scale that is trained. Put it in a gpytorch.kernels.ScaleKernel, or give an "
            "NTKKernel its variance_groups."
        )
    return scales


def _own_scales(kernel: Kernel) -> list[tuple[Kernel, str]]:
    return [(kernel, name) for name in SCALES if _parameters_behind(kernel, name)]


def _portions(shares: Sequence[float] | None, terms: list[Kernel]) -> list[float]:
    if shares is None:
        return [1 / len(terms)] * len(terms)
    if len(shares) != len(terms) or not all(share > 0 and math.isfinite(share) for share in shares):
        raise ValueError(
            f"Expected {len(terms)} positive shares, one for each of {', '.join(type(t).__name__ for t in terms)}, "
            f"got {list(shares)}."
        )
    return list(shares)


def _diagonals_per_scale(term: Kernel, scales: list[tuple[Kernel, str]], x: Tensor) -> list[Tensor]:
    """For each of the scales, the mean of its part of the diagonal where it would be one, by a number; of variances of
    groups, those of each group, in the parameter's shape.

    The diagonal is linear in the scales, so that a derivative tells the part of each.
    """
    with torch.enable_grad():
        diagonal = term(x, diag=True).double().mean()
        parts = []
        for kernel, name in scales:
            (raw,) = _parameters_behind(kernel, name)
            (of_diagonal,) = torch.autograd.grad(diagonal, raw, retain_graph=True, allow_unused=True)
            (of_scale,) = torch.autograd.grad(getattr(kernel, name).sum(), raw)
            part = torch.zeros_like(raw) if of_diagonal is None else of_diagonal.double() / of_scale.double()
            parts.append(part if _has_groups(kernel, name) else part.sum())
    if not all(bool((part >= 0).all()) and 0 < float(part.sum()) < math.inf for part in parts):
        raise ValueError(
            f"The diagonal of the term {type(term).__name__} at the training inputs is zero, or not finite, on "
            "average: no scale makes it what the mean leaves unexplained. Leave the term out, or scale it yourself."
        )
    return parts


def _has_groups(kernel: Kernel, name: str) -> bool:
    return isinstance(kernel, NTKKernel) and name == "variance"


def _in_equal_parts(variance: float, diagonals: Tensor) -> Tensor:
    """The scales for which each part of a diagonal is an equal part of this variance, for the means of these parts of
    the diagonal where the scales are one; parts without a diagonal have the one scale that would serve all."""
    contribute = diagonals > 0
    equal = variance / contribute.sum() / diagonals.where(contribute, 1.0)
    return torch.where(contribute, equal, variance / diagonals.sum())


# Lengthscales.


def _lengthscales(kernel: nn.Module, x: Tensor, metric: Any) -> Iterator[tuple[Kernel, Tensor]]:
    """Each kernel with a lengthscale, and what half the spread of its inputs is, in the lengthscale's shape."""
    metric = getattr(kernel, "median_distance", metric)
    if isinstance(kernel, Kernel) and kernel.has_lengthscale:
        half = _half_spread(kernel, x) if metric is None else x.new_tensor(_median(metric, x))
        present = kernel.lengthscale.detach()
        half = half.to(present)
        # Where inputs do not differ, as one alone does not, they say nothing of a lengthscale.
        yield kernel, torch.where(half > 0, half, present)
    for child in kernel.children():
        yield from _lengthscales(child, x, metric)


def _median(metric: Any, x: Tensor) -> float:
    try:
        return float(metric(x))
    except ValueError:  # no two inputs are apart
        return 0.0


def _half_spread(kernel: Kernel, x: Tensor) -> Tensor:
    columns = x if kernel.active_dims is None else x.index_select(-1, kernel.active_dims)
    spread = (columns.amax(-2) - columns.amin(-2)).detach()
    if kernel.ard_num_dims is None:
        return spread.square().sum().sqrt() / 2
    return math.sqrt(spread.shape[-1]) / 2 * spread


# Parameters.


def _prior_name(name: str) -> str:
    return f"log_{name}_prior"


def _log_of(name: str, module: Module) -> Tensor:
    return getattr(module, name).log()


def _set_by_log(name: str, module: Module, value: float | Tensor) -> None:
    present = getattr(module, name)
    value = torch.as_tensor(value, dtype=present.dtype, device=present.device)
    setattr(module, name, value.exp().expand_as(present))


def _parameters_behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """The trained parameters that an attribute of a module is computed from; none where there is no such attribute."""
    with torch.enable_grad():
        value = getattr(module, name, None)
        return _parameters_in(value, module) if isinstance(value, Tensor) and value.requires_grad else []


def _parameters_in(value: Tensor, module: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value.sum(), parameters, allow_unused=True) if parameters else ()
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _prior_on(module: Module, name: str, except_for: str | None = None) -> str | None:
    """The name of a prior on what this parameter is computed from."""
    parameters = {id(parameter) for parameter in _parameters_behind(module, name)}
    with torch.enable_grad():
        for prior_name, owner, _, closure, _ in module.named_priors():
            value = closure(owner)
            behind = _parameters_in(value, owner) if value.requires_grad else []
            if prior_name != except_for and parameters & {id(parameter) for parameter in behind}:
                return prior_name
    return None


def _check_has_no_prior(module: Module, name: str, except_for: str) -> None:
    other = _prior_on(module, name, except_for)
    if other is not None:
        raise ValueError(
            f"{type(module).__name__}.{name} has the prior {other!r} already, and with both the mode would be at "
            f"neither. Make the {type(module).__name__} without it."
        )


class _PriorFromData(NormalPrior):
    """One that `scale_to_data` has made, and may make again for other data."""


def _is_free(module: Module, name: str) -> bool:
    own = getattr(module, _prior_name(name), None)
    is_chosen = own is not None and not isinstance(own, _PriorFromData)
    return (
        bool(_parameters_behind(module, name)) and not is_chosen and _prior_on(module, name, _prior_name(name)) is None
    )


def _register_if_free(module: Module, name: str, value: float | Tensor, width: float) -> None:
    if _is_free(module, name):
        _register(module, name, value, width, _PriorFromData)


def _positive(value: float | Tensor, what: str, name: str, like: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if not ((tensor > 0) & (tensor < math.inf)).all():
        raise ValueError(f"The {what} for {name} must be positive and finite, got {value}.")
    try:
        tensor.expand_as(like)
    except RuntimeError as error:
        raise ValueError(
            f"The {what} for {name} has the shape {tuple(tensor.shape)}, which does not broadcast to the parameter's, "
            f"{tuple(like.shape)}."
        ) from error
    return tensor


def _set_within_constraint(module: Module, name: str, value: Tensor) -> None:
    before = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    try:
        setattr(module, name, value)
        is_set = torch.allclose(getattr(module, name).detach(), value, rtol=1e-3, atol=0.0)
    except RuntimeError:
        is_set = False
    if is_set:
        return
    with torch.no_grad():
        for parameter, old in before:
            parameter.copy_(old)
    limits = [
        str(constraint) for key, constraint in module.named_constraints() if key.endswith(f"raw_{name}_constraint")
    ]
    raise ValueError(
        f"{type(module).__name__}.{name} cannot be {value.flatten().tolist()}: its constraint is "
        f"{', '.join(limits) or 'another'}. Make the {type(module).__name__} with a wider one, such as "
        f"{name}_constraint=gpytorch.constraints.Positive(), or scale the data."
    )
