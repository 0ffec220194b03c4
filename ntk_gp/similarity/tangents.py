"""A network's Jacobian at some inputs, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..jacobian.base import Jacobian
from ..jacobian.linearization import Linearization
from ..jacobian.shared import linearization_of
from ..kernels.ntk import group_function
from ..network import InputDtype, InputShape, Output, ParameterSelection, full_precision

WHOLE = "whole"

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_graph(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Of a function whose results are numbers: outside of the user's inference mode and autocast, without gradients."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with torch.inference_mode(False), torch.no_grad(), full_precision("cuda"), full_precision("cpu"):
            return function(*args, **kwargs)

    return wrapped


class Layered:
    """A network whose parameters are told apart by layer.

    :param network: The trained network.
    :param parameters: Those that take part, see :class:`~ntk_gp.NTKKernel`.
    :param inputs: `input_shape` and `input_dtype`, as for :class:`~ntk_gp.NTKKernel`.
    :param output: The index of an output, or `"all"` of them, likewise.
    :param by: What is a layer: `"layer"`, `"parameter"`, a function of a parameter's name, or None for one of all.
    """

    def __init__(
        self,
        network: nn.Module,
        parameters: ParameterSelection,
        inputs: tuple[InputShape, InputDtype],
        output: Output,
        by: str | Callable[[str], str] | None,
    ):
        self.linearization: Linearization = linearization_of(
            network,
            parameters=parameters,
            input_shape=inputs[0],
            input_dtype=inputs[1],
            output=output,
            group_by=group_function(by),
        )
        names = () if by is None else self.linearization.network.group_names
        self.layers = tuple(name or "(network)" for name in names)  # parameters of the network itself
        if WHOLE in self.layers:
            raise ValueError(
                f"A layer is called {WHOLE!r}, as all of them together are. Pass by=, and call it otherwise."
            )

    def at(self, x: Tensor, what: str) -> Tangents:
        """The Jacobian there.

        :param x: Inputs (n, d), or (n, *input_shape).
        :param what: How the user calls them.
        """
        network = self.linearization.network
        x = network.flattened(x)
        x = x.unsqueeze(-1) if x.dim() == 1 else x
        if x.dim() != 2 or not x.numel():
            raise ValueError(
                f"Expected inputs (n, d) with n > 0 as {what}, got {tuple(x.shape)}. Flatten batches of them to one; a "
                "network of inputs with several dimensions needs input_shape=."
            )
        x = x.detach().double() if x.is_floating_point() else x
        network.bind(x)
        return Tangents(self, x, what)


class Tangents:
    """J(X) in float64, and the parts of it that belong to each layer.

    With C outputs, N = n·C rows; G layers. A layer's number is -1 for all parameters together.

    :ivar layers: The layers' names, and how many parameters each has, beginning with the whole network.
    """

    def __init__(self, layered: Layered, x: Tensor, what: str):
        self.x = x
        self.what = what
        self.linearization = layered.linearization
        self.jacobian: Jacobian = self.linearization.jacobian(x.unsqueeze(0))
        self.function = self.jacobian.function
        self.num_points, self.num_rows = self.jacobian.num_points, self.jacobian.num_rows
        self.num_outputs = self.function.num_outputs
        sizes = [0] * self.function.num_groups
        for size, group in zip(self.function.sizes, self.function.group_indices, strict=True):
            sizes[group] += size
        self.layers = {WHOLE: self.function.num_parameters}
        self.layers |= dict(zip(layered.layers, sizes, strict=False))
        self._check_finite()

    @property
    def numbers(self) -> range:
        """The layers' numbers, the whole network's first."""
        return range(-1, len(self.layers) - 1)

    def variances(self, layer: int) -> Tensor:
        """What leaves only a layer's parameters in J Σ J'ᵀ, (1, G)."""
        out = self.x.new_zeros(1, self.function.num_groups)
        out[0, slice(None) if layer < 0 else layer] = 1.0
        return out

    def columns(self, layer: int) -> Tensor:
        """Which parameters are a layer's, (P,)."""
        return self.function.expand_variances(self.variances(layer))[0].bool()

    def gram(self, points: slice, layer: int) -> Tensor:
        """Rows of the layer's K, for some of the points: (m, C, n, C)."""
        some = self.jacobian if points == slice(0, self.num_points) else self.jacobian[points]
        block = some.gram(self.jacobian, self.variances(layer))[0]
        return block.unflatten(0, (-1, self.num_outputs)).unflatten(2, (-1, self.num_outputs))

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        """The mean over the points of the layer's K, in the second point (n, C, C), and in both (C, C)."""
        outputs = torch.eye(self.num_outputs, dtype=self.x.dtype, device=self.x.device)
        average = self.jacobian.vjp(outputs.repeat(1, self.num_points).unsqueeze(0) / self.num_points)
        average = average * self.columns(layer)
        mean = self.jacobian.jvp(average)[0].unflatten(1, (-1, self.num_outputs))  # (C, n, C)
        return mean.permute(1, 2, 0), average[0] @ average[0].mT

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Some points at a time, and their rows of J, (m, C, P)."""
        for points, rows in self.jacobian.row_blocks():
            yield points, rows[0].unflatten(0, (-1, self.num_outputs))

    def residuals(self, y: Tensor, what: str) -> Tensor:
        """y - f(x), (n, C)."""
        network = self.linearization.network
        return self.targets(y, what) - network.values(self.x, network.fingerprint())

    def targets(self, y: Tensor, what: str) -> Tensor:
        """Targets as the user gave them, as (n, C)."""
        if not isinstance(y, Tensor):
            raise TypeError(f"Expected {what} as a torch.Tensor, got {type(y).__name__}.")
        shapes = [(self.num_points, self.num_outputs)] + [(self.num_points,)] * (self.num_outputs == 1)
        if tuple(y.shape) not in shapes:
            expected = " or ".join(map(str, reversed(shapes)))
            raise ValueError(
                f"Expected {what} of shape {expected}, got {tuple(y.shape)}. Of a network with several outputs, "
                "output=index takes one."
            )
        if not torch.isfinite(y).all():
            rows = (~torch.isfinite(y.reshape(len(y), -1))).any(-1).nonzero()[:3, 0].tolist()
            raise ValueError(f"{what} is NaN or infinite, first in rows {rows}. Leave these points out.")
        return y.detach().to(self.x).reshape(self.num_points, self.num_outputs)

    def _check_finite(self) -> None:
        squares = self.linearization.diagonal(self.jacobian, self.jacobian, self.variances(-1))[0]
        if not torch.isfinite(squares).all():
            points = (~torch.isfinite(squares)).nonzero()[:3, 0] // self.num_outputs
            raise ValueError(
                f"The network's Jacobian is NaN or infinite at {self.what}, first in rows {points.tolist()}. Leave "
                "these points out, or look for a division by zero or a root of zero in the network."
            )
