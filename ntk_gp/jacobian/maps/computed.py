"""A tensor that was computed from parameters alone, and its derivatives by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..terms import DenseDerivative, GraphDerivative, LocalDerivative, ParameterView
from ..terms.view import contiguous_strides

# Numbers of a derivative that is kept as a matrix.
_DENSE = 1 << 22
# What is zero but for rounding, in units of it.
_ROUNDING = 64.0


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor among the arguments of a call that computed another one.

    :param value: The tensor, without its graph.
    :param view: Where it is, if it depends on parameters: all of a parameter or of a computed tensor, or a part of it.
    """

    value: Tensor
    view: ParameterView | None


@dataclass(eq=False)
class Computed:
    """A tensor θ that a network computed from parameters, and by which call of which function.

    :param name: Which of them it is. Its elements are a vector of their own, in the order of a contiguous tensor's.
    :param value: The tensor, with autograd's graph to the parameters.
    :param function: The function.
    :param args: Of the call, with an :class:`Operand` in place of each tensor.
    :param kwargs: The same.
    :param leaves: The parameters that it may depend on, by name: where they are, and what is in the graph.
    """

    name: str
    value: Tensor
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    leaves: Mapping[str, tuple[ParameterView, Tensor]]
    _locals: dict[str, LocalDerivative | None] = field(default_factory=dict)
    _denses: dict[str, DenseDerivative | None] = field(default_factory=dict)

    @property
    def view(self) -> ParameterView:
        """All of it."""
        shape = tuple(self.value.shape)
        return ParameterView(self.name, 0, 0, shape, contiguous_strides(shape))

    @property
    def sources(self) -> list[str]:
        """The names of the parameters and computed tensors among the arguments."""
        return [operand.view.name for operand in _operands((self.args, self.kwargs)) if operand.view is not None]

    @property
    def size(self) -> int:
        """q, the number of its elements."""
        return self.value.numel()

    def local(self, name: str) -> LocalDerivative | None:
        """The derivative by a parameter, where element i depends on row i of it alone.

        Two passes through the graph tell: Hᵀ1 has in row i what only the derivative of θ_i can have put there if, for
        random numbers z, Hᵀz is the same, row by row times z.
        """
        if name not in self._locals:
            self._locals[name] = self._find_local(*self.leaves[name])
        return self._locals[name]

    def _find_local(self, view: ParameterView, leaf: Tensor) -> LocalDerivative | None:
        if not self.size or leaf.numel() % self.size:
            return None
        generator = torch.Generator(device="cpu").manual_seed(0)
        z = torch.rand(self.size, generator=generator, dtype=torch.float64, device="cpu").add(1).to(self.value)
        graph = self.graph(view.name)
        ones, rows = (graph.pulled(vector[None])[0].view(self.size, -1) for vector in (torch.ones_like(z), z))
        rounding = _ROUNDING * torch.finfo(rows.dtype).eps
        if not (rows - z.unsqueeze(1) * ones).norm() <= rounding * rows.norm():
            return None
        return LocalDerivative(view, ones)

    def dense(self, name: str) -> DenseDerivative | None:
        """The derivative by a parameter as a matrix, (q, p), where it is not too large."""
        if name not in self._denses:
            self._denses[name] = self._find_dense(name, *self.leaves[name])
        return self._denses[name]

    def _find_dense(self, name: str, view: ParameterView, leaf: Tensor) -> DenseDerivative | None:
        if self.size * leaf.numel() > _DENSE:
            return None
        eye = torch.eye(self.size, dtype=self.value.dtype, device=self.value.device)
        return DenseDerivative(view, self.graph(name).pulled(eye)[0].flatten(1))

    def graph(self, *names: str) -> GraphDerivative:
        """The derivative by some of the parameters, by autograd."""
        views, leaves = zip(*(self.leaves[name] for name in names), strict=True)
        return GraphDerivative(self.value, leaves, views)


def _operands(value: Any) -> Iterator[Operand]:
    if isinstance(value, Operand):
        yield value
    elif isinstance(value, (tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _operands(each)
