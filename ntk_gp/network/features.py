"""What a layer of a network hands on: features of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import is_finite
from .function import NetworkFunction
from .parameter_sets import layers_with_weights
from .tensors import normal_tensor

PENULTIMATE = "penultimate"


def head_of(function: NetworkFunction, x: Tensor) -> str:
    """The name of the last module with a weight that a call begins to run: what it is given are the penultimate
    features.

    A weight has two dimensions at least: the scale of a norm is none, and a module that only holds others has none.

    :param function: The network, tried at inputs like these.
    :param x: Inputs, (n, d), of which the first is looked at.
    :raises ValueError: If no module has one, or only the network as a whole.
    """
    calls: list[str] = []

    @contextmanager
    def watch(network: nn.Module) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(lambda _, __, name=name: calls.append(name))
            for name, module in layers_with_weights(network)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    with function.tracing(), torch.no_grad():
        function.watched(function.parameters, normal_tensor(x.detach())[:1], watch)
    if not calls or not calls[-1]:
        raise ValueError(
            "The network has no penultimate layer: no module within it that has a weight is called as such. "
            f"{_layers(function)}"
        )
    return calls[-1]


def layer_features(function: NetworkFunction, x: Tensor, layer: str, of_input: bool = False) -> Tensor:
    """What a layer returns, or is given, at each input: (n, d) to (n, F), in the dtype of x.

    Differentiable with respect to x where it requires a gradient.

    :param function: The network, tried at inputs like these.
    :param layer: The layer's name, as `named_modules()` has it.
    :param of_input: Its input at its last call, in place of its output at its only one.
    :raises ValueError: If there is no such layer, or it is not called, or more than once, or does not treat each row
        by itself.
    :raises TypeError: If it returns something else than a tensor.
    """
    evaluate = partial(_at_once, function, layer, of_input)
    with function.tracing():
        pieces = [evaluate(chunk) for chunk in normal_tensor(x).split(function.points_per_pass())]
        features = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        _check(features, x, layer, evaluate)
    return features


def _at_once(function: NetworkFunction, layer: str, of_input: bool, x: Tensor) -> Tensor:
    found: list[Any] = []

    @contextmanager
    def watch(network: nn.Module) -> Iterator[None]:
        module = dict(network.named_modules()).get(layer)
        if module is None:
            raise ValueError(f"The network has no layer {layer!r}. {_layers(function)}")
        if of_input:
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs: found.append(next(iter((*args, *kwargs.values())), None)), with_kwargs=True
            )
        else:
            handle = module.register_forward_hook(lambda _, __, output: found.append(output))
        try:
            yield
        finally:
            handle.remove()

    function.watched(function.parameters, x, watch)
    if not found or (len(found) > 1 and not of_input):
        often = f"is called {len(found)} times" if found else "is not called at these inputs"
        raise ValueError(f"Layer {layer!r} {often}, so it has no features. {_layers(function)}")
    return _as_rows(found[-1], x, layer)


def _as_rows(value: Any, x: Tensor, layer: str) -> Tensor:
    """Whatever came out, as (n, F)."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(
            f"Layer {layer!r} hands on {what}, where features must be one tensor of real numbers. Name another layer."
        )
    if value.dim() == 0 or len(value) != len(x):
        raise ValueError(
            f"Layer {layer!r} hands on a tensor of shape {tuple(value.shape)} at {len(x)} inputs, where the first "
            f"dimension must be {len(x)}. Name a layer that keeps it, such as one after a pooling."
        )
    return value.reshape(len(x), -1).to(x.dtype)


def _check(features: Tensor, x: Tensor, layer: str, evaluate: Any) -> None:
    """Raises for what is not finite, and where two rows have other features by themselves than among the others."""
    if not is_finite(features) and not torch.isfinite(features).all():
        rows = (~torch.isfinite(features)).any(-1).nonzero()[:3, 0].tolist()
        raise ValueError(f"The features of layer {layer!r} are NaN or infinite at some inputs, first in rows {rows}.")
    if len(x) < 3:
        return
    places = [len(x) // 3, len(x) - 1]
    with torch.no_grad():
        alone = evaluate(normal_tensor(x.detach())[places])
    tolerance = torch.finfo(x.dtype).eps ** 0.5 * float(features.detach().abs().max())
    if not torch.allclose(features.detach()[places], alone, rtol=0.0, atol=tolerance):
        raise ValueError(
            f"The features of layer {layer!r} change with the other rows of the batch. Name a layer that treats each "
            "row by itself."
        )


def _layers(function: NetworkFunction) -> str:
    names = function.skeletons.layer_names()
    if not names:
        return "It has no layers at all: give it some as modules, or use a kernel on the inputs."
    return f"Its layers are: {', '.join(names)}."
