"""A network of which each row asks for one output: the rows carry its number, as one more column.

So C kernels of one network, one for each output, are a batch of kernels of one function: rows [x, c] give f(x)_c, and
whatever takes inputs and a function of one output takes these. The last column is put there by kernels
(:func:`numbered`), and no user sees it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .frozen import FrozenNetwork, preserved_random_state
from .function import NO_MODE, NetworkFunction


def numbered(x: Tensor, numbers: Tensor) -> Tensor:
    """Rows that carry the number of an output: (*b, n, d) and (*c, 1, 1) to (*batch, n, d + 1), b and c broadcast."""
    try:
        shape = torch.broadcast_shapes(x.shape[:-2], numbers.shape[:-2])
    except RuntimeError:
        raise RuntimeError(
            f"The batches of the inputs, {tuple(x.shape)}, do not broadcast with those of the outputs, "
            f"{tuple(numbers.shape[:-2])}. Give inputs (n, d) or (*batch, 1, n, d), the same for all outputs: "
            "x.unsqueeze(-3); or (*batch, C, n, d)."
        ) from None
    column = numbers.to(x.device, x.dtype).expand(*shape, x.shape[-2], 1)
    return torch.cat([x.expand(*shape, *x.shape[-2:]), column], dim=-1)


class FunctionByOutput(NetworkFunction):
    """The output of a network that each row asks for, (n, d + 1) to (n, 1)."""

    @classmethod
    def of(cls, function: NetworkFunction) -> FunctionByOutput:
        """That of a function of all outputs which was tried."""
        new = cls.__new__(cls)
        new.__dict__.update(function.__dict__, num_outputs=1)
        return new

    def __call__(
        self, parameters: Mapping[str, Tensor], x: Tensor, mode: AbstractContextManager[object] = NO_MODE
    ) -> Tensor:
        return super().__call__(parameters, x[:, :-1], mode).gather(1, x[:, -1:].detach().long())


class NetworkByOutput:
    """What engines and operators ask a frozen network for, of one whose rows carry the number of an output.

    :param base: The network, with all its outputs.
    """

    def __init__(self, base: FrozenNetwork):
        self.base = base
        self._clear()

    def _clear(self) -> None:
        self._functions: WeakKeyDictionary[NetworkFunction, FunctionByOutput] = WeakKeyDictionary()
        self._lock = threading.Lock()  # of the dictionary

    @property
    def num_groups(self) -> int:
        """G."""
        return self.base.num_groups

    def fingerprint(self) -> int:
        """The state of the network."""
        return self.base.fingerprint()

    def num_outputs(self, x: Tensor) -> int:
        """One for each row."""
        return 1

    def function(self, dtype: torch.dtype, device: torch.device) -> NetworkFunction:
        """The network in this dtype and on this device, for its parameters."""
        return self.base.function(dtype, device)

    def at(self, x: Tensor) -> FunctionByOutput:
        """The network as a function for rows like x (*batch, n, d + 1), tried there."""
        first = x[(0,) * (x.dim() - 2)] if x.numel() else x.reshape(-1, x.shape[-1])
        return self.by_output(self.base.at(first[:, :-1]))

    def exact(self, rows: Tensor) -> FunctionByOutput:
        """The same in float64, for rows (m, d + 1)."""
        return self.by_output(self.base.exact(rows[:, :-1]))

    def values(self, x: Tensor, state: int) -> Tensor:
        """f(x) at rows (*batch, n, d + 1): (N, 1).

        :param state: The present fingerprint.
        """
        flat = x.reshape(-1, *x.shape[-2:])
        points = flat[..., :-1]
        if len(flat) > 1 and not x.requires_grad and torch.equal(points, points[:1].expand_as(points)):
            points = points[:1]
        values = self.base.values(points, state)
        values = values.unflatten(0, (-1, flat.shape[1])).expand(*flat.shape[:2], -1)
        return values.gather(2, flat[..., -1:].detach().long()).flatten(0, 1)

    def by_output(self, function: NetworkFunction) -> FunctionByOutput:
        """The function of one output for each row that belongs to one of all outputs: always the same one."""
        with self._lock:
            known = self._functions.get(function)
            if known is None:
                known = self._functions[function] = FunctionByOutput.of(function)
            return known

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def __deepcopy__(self, memo: dict) -> NetworkByOutput:
        new = memo[id(self)] = NetworkByOutput(copy.deepcopy(self.base, memo))
        return new


def count_outputs(network: FrozenNetwork) -> int | None:
    """C, by evaluating a network at zeros of its `input_shape`, or of its first layer's width; None where that is not
    known, or the network does not take them."""
    width = network.inputs.width or _first_width(network._skeleton[0])
    if width is None:
        return None
    function = network.function(network.dtype, network.device)
    zeros = torch.zeros(1, width, dtype=network.dtype, device=network.device)
    try:
        with function.tracing(), torch.no_grad(), preserved_random_state(network.device):
            return function(function.parameters, zeros).shape[1]
    except Exception:  # whatever it wants instead
        return None


def _first_width(module: nn.Module) -> int | None:
    """The width of what the first layer that has one takes."""
    widths = (getattr(layer, "in_features", None) for layer in module.modules())
    return next((width for width in widths if isinstance(width, int)), None)
