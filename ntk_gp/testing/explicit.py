"""Explicit Jacobians by plain autograd on the user's own module: what everything else is held against."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def explicit_jacobian(
    network: nn.Module,
    x: Tensor,  # (*batch, n, d)
    *,
    parameters: Selection = None,
    input_shape: tuple[int, ...] | None = None,
    output: int | str | Sequence[int] | None = None,
) -> Tensor:
    """J(x), (*batch, n·C, P), row = point·C + output: one `torch.autograd.grad` for each output of each point.

    Each point goes through a copy of the network in eval mode that no other call has touched, alone. Columns are in the
    order of `network.named_parameters()`, each parameter flattened. It computes in the dtype and on the device of the
    network, and costs n·C backward passes and n·C·P numbers.

    :param network: The network, as it would be given to :class:`~ntk_gp.NTKKernel`. It is not changed.
    :param x: Inputs in the network's dtype.
    :param parameters: As in :class:`~ntk_gp.NTKKernel`.
    :param input_shape: As in :class:`~ntk_gp.NTKKernel`.
    :param output: The index of the one output to take, or those of some; all of them by default, or with `"all"`.
    """
    names = [aliases[0] for aliases in selected_names(network, parameters)]
    network = copy.deepcopy(network).eval()
    shape = (x.shape[-1],) if input_shape is None else tuple(input_shape)
    points = x.detach().reshape(-1, 1, *shape)
    rows = [_rows(copy.deepcopy(network), names, point.clone(), output) for point in points]
    return torch.cat(rows).reshape(*x.shape[:-2], -1, rows[0].shape[-1])


def _rows(network: nn.Module, names: list[str], point: Tensor, output: int | str | Sequence[int] | None) -> Tensor:
    """(C, P), at one point (1, ...)."""
    named = dict(network.named_parameters(remove_duplicate=False))
    with torch.inference_mode(False), torch.enable_grad():
        leaves: list[Tensor] = [named[name].requires_grad_() for name in names]
        outputs = network(point).reshape(-1)
        chosen = outputs if output in (None, "all") else outputs[output].reshape(-1)
        return torch.stack([_gradient(value, leaves) for value in chosen])


def _gradient(value: Tensor, leaves: list[Tensor]) -> Tensor:
    """(P,)."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(leaf).reshape(-1) for leaf in leaves])
    gradients = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in gradients]).detach()


def selected_names(network: nn.Module, parameters: Selection = None) -> list[list[str]]:
    """For each selected parameter, in the order of `named_parameters`, its names: several where it is tied."""
    named = list(network.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in named:
        aliases.setdefault(id(parameter), []).append(name)
    chosen = [p for name, p in named if p.is_floating_point() and p.numel() and _is_selected(name, p, parameters)]
    return [aliases[i] for i in dict.fromkeys(map(id, chosen))]


def _is_selected(name: str, parameter: nn.Parameter, parameters: Selection) -> bool:
    if parameters is None:
        return parameter.requires_grad
    if callable(parameters):
        return parameters(name, parameter)
    patterns = [parameters] if isinstance(parameters, str) else parameters
    return any(fnmatchcase(name, pattern) for pattern in patterns)
