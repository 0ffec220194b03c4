"""Which layer of a network is the last: found where the network is first called.

Modules say in what order they were registered, not in what order they are called, so that a snapshot presumes the last
one registered, and looks at its first inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .function import NetworkFunction
from .graph import leaves_below
from .parameter_sets import PARAMETRIZATIONS, layers_with_weights, within
from .tensors import normal_tensor


@dataclass(frozen=True)
class Presumed:
    """What a snapshot takes for the last layer until it is called.

    :param layer: Its name.
    :param names: All parameters of the network, by all of their names.
    :param others: The parameters that were chosen beside those of the last layer.
    :param is_fixed: Whether something was made that depends on which it is.
    :param is_settled: Whether it is known: what was computed since depends on it.
    """

    layer: str
    names: tuple[str, ...]
    others: frozenset[str]
    is_fixed: bool = False
    is_settled: bool = field(default=False, compare=False)

    def refuse(self, layer: str) -> None:
        raise ValueError(
            f"The network's last layer is {layer!r}, which nothing could tell before it was called: {self.layer!r} was "
            f'registered last. Name it by a pattern, "{layer}.*" in place of "last_layer".'
        )


def last_layer_of(function: NetworkFunction, x: Tensor, names: Mapping[str, str]) -> str:
    """The name of the layer with a weight that begins to run last, of those that the output depends on.

    A weight has two dimensions at least: the scale of a norm is none. Where modules around it use weights of their own
    after it, the outermost of these is the layer.

    :param function: The network; its output, where one is chosen, is the one that counts.
    :param x: Inputs, (n, d), of which the first is looked at.
    :param names: Every name of each of the network's parameters, and the canonical one.
    :raises ValueError: If there is none, or only the network as a whole.
    """
    tensors = {**function.constants, **function.parameters}
    leaves = {
        name: tensors[name].detach().requires_grad_()
        for name in dict.fromkeys(names.values())
        if tensors[name].is_floating_point()
    }
    by_name = {name: leaves[owner] for name, owner in names.items() if owner in leaves}
    row = normal_tensor(x.detach())[:1]
    call = _Call(function, leaves, row)
    for layer in reversed(call.layers):
        if not layer or call.depends_on(by_name[name] for name in within(layer, by_name)):
            break
    else:
        layer = ""
    around = [name for name in _outer(layer) if name in call.layers]
    if around:  # do they use their own weights after it?
        after = _Call(function, leaves, row, cut=layer)
        layer = next((name for name in around if after.depends_on(_own(name, by_name))), layer)
    if not layer:
        raise ValueError(
            "The network has no last layer: no module within it that has a weight is called last, or the network uses "
            'weights of its own after it. Name the parameters by patterns, or take all of them, parameters="*". It '
            f"has: {', '.join(names)}."
        )
    return layer


class _Call:
    """What a call shows.

    :param cut: The layer whose output is cut off from what it was computed from.
    :ivar layers: The modules with weights, in the order in which they begin to run.
    """

    def __init__(self, function: NetworkFunction, leaves: dict[str, Tensor], row: Tensor, cut: str | None = None):
        self.layers: list[str] = []
        self._cut = cut
        with function.tracing(), torch.enable_grad():
            output = function.watched(leaves, row, self.watch)
            if isinstance(output, Tensor):
                output = function.outputs.pick(output.reshape(1, -1))
        self._reached = leaves_below(output) if isinstance(output, Tensor) else set()

    def depends_on(self, leaves: Iterable[Tensor]) -> bool:
        """Whether the output was computed from one of these."""
        return any(id(leaf) in self._reached for leaf in leaves)

    @contextmanager
    def watch(self, network: nn.Module) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(lambda _, __, name=name: self.layers.append(name))
            for name, module in layers_with_weights(network)
        ]
        if self._cut:
            handles.append(network.get_submodule(self._cut).register_forward_hook(lambda *args: _detached(args[-1])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_detached, value))
    return value


def _outer(layer: str) -> list[str]:
    """The names of the modules around a layer, from the outermost, which is the network, `""`."""
    parts = layer.split(".") if layer else []
    return [".".join(parts[:i]) for i in range(len(parts))]


def _own(layer: str, by_name: Mapping[str, Tensor]) -> list[Tensor]:
    """The weights of a module itself."""
    prefix = f"{layer}." if layer else ""
    places = {name: name.removeprefix(prefix) for name in by_name if name.startswith(prefix)}
    own = [name for name, rest in places.items() if "." not in rest or rest.startswith(f"{PARAMETRIZATIONS}.")]
    return [by_name[name] for name in own if by_name[name].dim() > 1]
