"""What the comparisons return: a table each, with a row for the whole network and one for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

from ..tables import Table
from .resampling import Estimate


class LayerOfTasks(NamedTuple):
    """How alike two tasks are to a layer.

    :ivar name: Of the layer; `"whole"` for all parameters together.
    :ivar parameters: How many it has.
    :ivar fisher: The cosine between the diagonals of the two Fisher information matrices.
    :ivar overlap: The mean squared cosine of the angles.
    :ivar angles: The principal angles between the leading right singular subspaces of the Jacobians, (k,), in radians,
        the smallest first. There are fewer than were asked for where a Jacobian's rank is lower.
    """

    name: str
    parameters: int
    fisher: Estimate
    overlap: Estimate
    angles: Tensor

    @property
    def chance(self) -> float:
        """The overlap of two random subspaces of this dimension, on average: k / P."""
        return len(self.angles) / self.parameters


class LayerOfNetworks(NamedTuple):
    """How alike two networks' layers are on a set of inputs.

    :ivar name: Of the layer; `"whole"` for all parameters together.
    :ivar parameters: How many it has, in either network.
    :ivar alignment: The centred alignment of the tangent kernels (linear CKA).
    :ivar overlap: The mean squared cosine of the angles.
    :ivar angles: The principal angles between the leading left singular subspaces of the Jacobians, (k,), in radians,
        the smallest first.
    """

    name: str
    parameters: tuple[int, int]
    alignment: Estimate
    overlap: Estimate
    angles: Tensor


class LayerOfTargets(NamedTuple):
    """How alike a layer's tangent kernel and the targets are.

    :ivar name: Of the layer; `"whole"` for all parameters together.
    :ivar parameters: How many it has.
    :ivar alignment: The centred alignment of the kernel with y yᵀ.
    """

    name: str
    parameters: int
    alignment: Estimate


Layer = TypeVar("Layer", bound=LayerOfTasks | LayerOfNetworks | LayerOfTargets)


class Similarity(Table[Layer], Generic[Layer]):
    """The whole network's row, and one for each layer; `print` shows a table.

    `similarity[0]` and `similarity.whole` are the whole network's, `similarity.layer(name)` is a layer's.
    """

    rows: list[Layer]

    def __init__(self, rows: Sequence[Layer]):
        self.rows = list(rows)

    @property
    def whole(self) -> Layer:
        """The row of all parameters together."""
        return self.rows[0]

    @property
    def layers(self) -> list[Layer]:
        """The rows of the layers."""
        return self.rows[1:]

    def layer(self, name: str) -> Layer:
        """The row of a layer.

        :raises KeyError: If there is no such layer.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"There is no layer {name!r}: they are {', '.join(repr(row.name) for row in self.rows)}.")

    def _cells(self) -> Sequence[tuple[str, ...]]:
        columns = [name for name in _HEADS if hasattr(self.rows[0], name)]
        head = ("layer", "parameters", *(_HEADS[name] for name in columns))
        return [head] + [
            (row.name, _sizes(row.parameters), *(_shown(getattr(row, name)) for name in columns)) for row in self.rows
        ]


_HEADS = {"fisher": "Fisher cosine", "alignment": "alignment", "overlap": "subspace overlap", "angles": "angles"}


def _sizes(parameters: int | tuple[int, int]) -> str:
    sizes = (parameters,) if isinstance(parameters, int) else tuple(dict.fromkeys(parameters))
    return " / ".join(map(str, sizes))


def _shown(value: Estimate | Tensor) -> str:
    if isinstance(value, Estimate):
        return str(value)
    if not len(value):
        return "–"
    degrees = value.rad2deg()
    return f"{degrees[0]:.0f}°" if len(degrees) == 1 else f"{degrees[0]:.0f}° to {degrees[-1]:.0f}°"
