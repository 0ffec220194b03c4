"""Scale and shift of normalisation layers: their gradients are the normalised input times g, and g."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..terms import ParameterView, Term
from ..terms.base import split_points
from .registry import UnsupportedUse, Use, register_rule

Parameter = ParameterView | None


def layer_norm(
    use: Use,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Iterable[Term]:
    use.decline_points_in_last(len(normalized_shape))
    return _by_element(use, input, lambda x: F.layer_norm(x, normalized_shape, None, None, eps), weight, bias)


def rms_norm(
    use: Use, input: Tensor, normalized_shape: Sequence[int], weight: Parameter = None, eps: float | None = None
) -> Iterable[Term]:
    use.decline_points_in_last(len(normalized_shape))
    return _by_element(use, input, lambda x: F.rms_norm(x, normalized_shape, None, eps), weight, None)


def group_norm(
    use: Use, input: Tensor, num_groups: int, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5
) -> Iterable[Term]:
    return _by_channel(use, input, lambda x: F.group_norm(x, num_groups, None, None, eps), weight, bias)


def batch_norm(
    use: Use,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Parameter = None,
    bias: Parameter = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterable[Term]:
    if training or running_mean is None or running_var is None:
        raise UnsupportedUse("statistics of the batch")
    use.decline_points_not_first()
    shift = use.features(bias, _sum_by_channel(use, use.gradients))
    if not isinstance(weight, ParameterView):
        return shift
    # Normalising the sums over positions, not each of these, is exact for statistics that are constants.
    gradients = shift[0].gradients[0] if shift else _sum_by_channel(use, use.gradients)
    slices = split_points(len(input), use.gradients[0].numel(), input.device)
    products = [_sum_by_channel(use, use.gradients[points] * input[points].unsqueeze(1)) for points in slices]
    normalised = (torch.cat(products) - running_mean * gradients) * (running_var + eps).rsqrt()
    return [*shift, *use.features(weight, normalised)]


def instance_norm(
    use: Use,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Parameter = None,
    bias: Parameter = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Iterable[Term]:
    def normalise(x: Tensor) -> Tensor:
        return F.instance_norm(x, running_mean, running_var, None, None, use_input_stats, momentum, eps)

    return _by_channel(use, input, normalise, weight, bias)


Normalise = Callable[[Tensor], Tensor]


def _by_element(use: Use, input: Tensor, normalise: Normalise, weight: Parameter, bias: Parameter) -> Iterable[Term]:
    """Layers whose parameters belong to the last dimensions' elements."""
    terms = list(use.features(bias, use.sum_to(bias, use.gradients)))
    if isinstance(weight, ParameterView):
        terms += use.features(weight, _scaled(use, input, normalise, lambda values: use.sum_to(weight, values)))
    return terms


def _by_channel(use: Use, input: Tensor, normalise: Normalise, weight: Parameter, bias: Parameter) -> Iterable[Term]:
    """Layers whose parameters belong to channels, the dimension after the points (and windows)."""
    use.decline_points_not_first()

    def by_channel(values: Tensor) -> Tensor:
        return _sum_by_channel(use, values)

    def flat(x: Tensor) -> Tensor:
        return normalise(x.flatten(0, 1)).view_as(x) if use.split else normalise(x)

    terms = list(use.features(bias, by_channel(use.gradients)))
    if isinstance(weight, ParameterView):
        terms += use.features(weight, _scaled(use, input, flat, by_channel))
    return terms


def _sum_by_channel(use: Use, values: Tensor) -> Tensor:
    """Sums (n, C, *rest) over everything but points, outputs and channels."""
    channel_dim = 2 + use.split
    others = [dim for dim in range(2, values.dim()) if dim != channel_dim]
    return values.sum(others) if others else values


def _scaled(use: Use, input: Tensor, normalise: Normalise, total: Callable[[Tensor], Tensor]) -> Tensor:
    """The sums of g times the normalised input, for slices of points that stay in cache."""
    slices = split_points(len(input), use.gradients[0].numel(), input.device)
    return torch.cat([total(use.gradients[points] * normalise(input[points]).unsqueeze(1)) for points in slices])


register_rule(F.layer_norm, layer_norm)
register_rule(torch.layer_norm, layer_norm)
register_rule(F.group_norm, group_norm)
register_rule(F.batch_norm, batch_norm)
register_rule(F.instance_norm, instance_norm)
if hasattr(F, "rms_norm"):  # torch 2.4
    register_rule(F.rms_norm, rms_norm, parameters=("weight",))
