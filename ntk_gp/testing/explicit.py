"""Explicit Jacobians by plain autograd on the user's own module: what everything else is held against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

Selection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None


def explicit_jacobian(
    network: nn.Module,
    x: Tensor,  # (*batch, n, d)
    *,
    parameters: Selection = None,
    input_shape: Any = None,
    input_dtype: Any = None,
    output: Any = None,
) -> Tensor:
    """J(x), (*batch, n·C, P), row = point·C + output: one `torch.autograd.grad` for each output of each point.

    Each point goes through a copy of the network in eval mode that no other call has touched, alone. Columns are in the
    order of `network.named_parameters()`, each parameter flattened. It computes in the dtype and on the device of the
    network, and costs n·C backward passes and n·C·P numbers.

    :param network: The network, as it would be given to :class:`~ntk_gp.NTKKernel`. It is not changed.
    :param x: Inputs in the network's dtype.
    :param parameters: As in :class:`~ntk_gp.NTKKernel`, but for the sets by name: give their patterns.
    :param input_shape: As in :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: As in :class:`~ntk_gp.NTKKernel`.
    :param output: The index of the one output to take; all of them by default, or with `"all"`. Otherwise as in
        :class:`~ntk_gp.NTKKernel`.
    """
    names = [aliases[0] for aliases in selected_names(network, parameters)]
    network = copy.deepcopy(network).eval()
    rows = [
        _rows(copy.deepcopy(network), names, _arguments(point, input_shape, input_dtype), output)
        for point in x.detach().reshape(-1, x.shape[-1])
    ]
    return torch.cat(rows).reshape(*x.shape[:-2], -1, rows[0].shape[-1])


def _arguments(point: Tensor, input_shape: Any, input_dtype: Any) -> dict[str, Tensor] | Tensor:
    """What the network is called with at one point (d,): one tensor, or several by name."""
    if not isinstance(input_shape, dict):
        shape = point.shape if input_shape is None else input_shape
        return point.clone().reshape(1, *shape).to(input_dtype or point.dtype)
    arguments, start = {}, 0
    for name, shape in input_shape.items():
        dtype = input_dtype.get(name) if isinstance(input_dtype, dict) else input_dtype
        size = math.prod(shape)
        arguments[name] = point[start : start + size].clone().reshape(1, *shape).to(dtype or point.dtype)
        start += size
    return arguments


def _outputs(returned: Any, output: Any) -> Tensor:
    """Those that were chosen, one after the other."""
    *way, last = output if isinstance(output, tuple) else (output,)
    if callable(last) or (isinstance(last, str) and last != "all"):
        way, last = [*way, last], None
    for step in way:
        if callable(step):
            returned = step(returned)
        elif isinstance(returned, Tensor):
            returned = returned[:, step]
        else:
            returned = getattr(returned, step) if hasattr(returned, str(step)) else returned[step]
    outputs = returned.reshape(-1)
    return outputs if last in (None, "all") else outputs[last].reshape(1)


def _rows(network: nn.Module, names: list[str], given: dict[str, Tensor] | Tensor, output: Any) -> Tensor:
    """(C, P), at one point."""
    named = dict(network.named_parameters(remove_duplicate=False))
    with torch.inference_mode(False), torch.enable_grad():
        leaves: list[Tensor] = [named[name].requires_grad_() for name in names]
        returned = network(**given) if isinstance(given, dict) else network(given)
        chosen = _outputs(returned, output)
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
