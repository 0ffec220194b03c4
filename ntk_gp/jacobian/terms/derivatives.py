r"""Derivatives of a tensor that was computed from parameters, with respect to them.

:math:`H = \partial\theta/\partial w`, of θ with q numbers by parameters with p: the same at all inputs. A block J_θ of
Jacobian columns for θ is one for w by H: :math:`J_w = J_\theta H`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...network.tensors import full_precision, normal_tensor
from .base import cached_elements
from .view import ParameterView


class Derivative(ABC):
    """H, (q, p), by one parameter or several."""

    @property
    @abstractmethod
    def views(self) -> tuple[ParameterView, ...]:
        """The parameters, whole."""

    @property
    @abstractmethod
    def size(self) -> int:
        """q."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What is held, whatever the number of points."""

    @abstractmethod
    def pull(self, vectors: Tensor, out: Tensor) -> None:
        """Adds Hᵀ v, for `vectors` (..., q), to parameter vectors `out` (..., P)."""

    @abstractmethod
    def push(self, tangents: Tensor) -> Tensor:
        """H u: parameter vectors (..., P) to (..., q)."""

    @abstractmethod
    def squared(self) -> Derivative:
        """With the squares of what is summed in products, as far as can be told."""

    @abstractmethod
    def relocate(self, shifts: Mapping[str, int]) -> Derivative:
        """In a parameter vector where each parameter has moved by so many elements."""

    def key(self) -> Hashable:
        """Equal for the same derivative of two recordings."""
        return (type(self).__name__, self.views)


@dataclass(frozen=True, eq=False)
class OfOne(Derivative):
    """By one parameter.

    :param view: The parameter.
    :param matrix: What H is made of.
    """

    view: ParameterView
    matrix: Tensor

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return (self.view,)

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    def squared(self) -> OfOne:
        return replace(self, matrix=self.matrix.square())

    def relocate(self, shifts: Mapping[str, int]) -> OfOne:
        return replace(self, view=self.view.shift(shifts[self.view.name]))


class LocalDerivative(OfOne):
    """Where θ_i depends on row i of the parameter, (q, p / q), alone: that row of `matrix`, of the same shape.

    With one column this is an elementwise function's.
    """

    @property
    def is_elementwise(self) -> bool:
        return self.matrix.shape[1] == 1

    def pull(self, vectors: Tensor, out: Tensor) -> None:
        self.view.add_to(out, vectors.unsqueeze(-1) * self.matrix)

    def push(self, tangents: Tensor) -> Tensor:
        rows = self.view.read(tangents).reshape(*tangents.shape[:-1], *self.matrix.shape)
        return (rows * self.matrix).sum(-1)

    @cached_property
    def covariance(self) -> Tensor:
        """The diagonal of H Hᵀ, (q,), which has nothing else."""
        return self.matrix.square().sum(-1)


class DenseDerivative(OfOne):
    """H as it is: `matrix` (q, p)."""

    def pull(self, vectors: Tensor, out: Tensor) -> None:
        self.view.add_to(out, vectors @ self.matrix)

    def push(self, tangents: Tensor) -> Tensor:
        return self.view.read(tangents).reshape(*tangents.shape[:-1], -1) @ self.matrix.mT

    @cached_property
    def covariance(self) -> Tensor:
        """H Hᵀ, (q, q)."""
        return self.matrix @ self.matrix.mT


@dataclass(frozen=True, eq=False)
class GraphDerivative(Derivative):
    """H by autograd, from the graph that the network's own call has left: a pass through it for each vector.

    :param value: θ, with its graph.
    :param leaves: The parameters in that graph.
    :param parameters: The same in the parameter vector.
    :param of_squares: Of sums of squares: see :meth:`squared`.
    """

    value: Tensor
    leaves: tuple[Tensor, ...]
    parameters: tuple[ParameterView, ...]
    of_squares: bool = False

    @property
    def views(self) -> tuple[ParameterView, ...]:
        return self.parameters

    @property
    def size(self) -> int:
        return self.value.numel()

    @property
    def nbytes(self) -> int:
        """At least: what the graph keeps beside θ is not known."""
        return self.value.nbytes

    def pull(self, vectors: Tensor, out: Tensor) -> None:
        if self.of_squares:
            vectors = vectors.sqrt() * random_signs(vectors)
        for view, values in zip(self.parameters, self.pulled(vectors), strict=True):
            view.add_to(out, values.square() if self.of_squares else values)

    def pulled(self, vectors: Tensor) -> list[Tensor]:
        """Hᵀ v of each of the parameters, (..., *shape)."""

        def pull(some: Tensor) -> list[Tensor]:
            return _grad([self.value], self.leaves, [some.reshape(len(some), *self.value.shape)])

        with _recordable(vectors):
            parts = _in_blocks(pull, _plain(vectors).flatten(0, -2), self._vectors_at_once)
        return [part.unflatten(0, vectors.shape[:-1]) for part in parts]

    def push(self, tangents: Tensor) -> Tensor:
        """The derivative of vᵀ H, which is linear in v."""
        pieces = [view.read(tangents).flatten(tangents.dim() - 1) for view in self.parameters]
        sizes = [piece.shape[-1] for piece in pieces]
        with _recordable(tangents):
            v = torch.zeros_like(self.value).requires_grad_()
            rows = torch.autograd.grad(self.value, self.leaves, v, create_graph=True, allow_unused=True)
            used = [i for i, row in enumerate(rows) if row is not None and row.requires_grad]

            def push(some: Tensor) -> list[Tensor]:
                parts = some.split(sizes, dim=-1)
                given = [parts[i].reshape(len(some), *self.leaves[i].shape) for i in used]
                return _grad([rows[i] for i in used], (v,), given)

            if not used:
                return tangents.new_zeros(*tangents.shape[:-1], self.size)
            flat = _plain(torch.cat(pieces, dim=-1)).flatten(0, -2)
            (part,) = _in_blocks(push, flat, self._vectors_at_once)
        return part.reshape(*tangents.shape[:-1], self.size)

    @property
    def _vectors_at_once(self) -> int:
        numbers = self.size + sum(leaf.numel() for leaf in self.leaves)
        return max(1, cached_elements(self.value.device) // numbers)

    def squared(self) -> GraphDerivative:
        """Of the squares of sums over θ with random signs, which are about the sums of the squares."""
        return replace(self, of_squares=True)

    def relocate(self, shifts: Mapping[str, int]) -> GraphDerivative:
        return replace(self, parameters=tuple(view.shift(shifts[view.name]) for view in self.parameters))


def random_signs(like: Tensor) -> Tensor:
    """1 and −1, the same for all vectors (..., q)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    signs = 2 * torch.randint(0, 2, like.shape[-1:], generator=generator, device="cpu") - 1
    return signs.to(like)


def _grad(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """The gradients for as many cotangents as their first dimension is long, zero where there is no way."""
    number = len(cotangents[0])

    def pull(some: Sequence[Tensor], is_batch: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            outputs, inputs, some, retain_graph=True, allow_unused=True, is_grads_batched=is_batch
        )
        batch = (number,) if is_batch else ()
        return [x.new_zeros(*batch, *x.shape) if g is None else g for g, x in zip(found, inputs, strict=True)]

    if number > 1:
        try:
            return pull(cotangents, True)
        except RuntimeError:  # an operator that vmap cannot differentiate: one vector after the other
            pass
    rows = [pull([cotangent[i] for cotangent in cotangents], False) for i in range(number)]
    return [torch.stack(part) for part in zip(*rows, strict=True)]


def _in_blocks(function: Callable[[Tensor], list[Tensor]], vectors: Tensor, size: int) -> list[Tensor]:
    """Results of a function of many vectors, computed some at a time."""
    parts = [function(some) for some in vectors.split(size)]
    return [torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True)]


def _plain(vectors: Tensor) -> Tensor:
    return normal_tensor(vectors.detach())


@contextmanager
def _recordable(like: Tensor) -> Iterator[None]:
    """Where autograd can walk, and extend, a graph, whatever the user's mode: outside inference mode and autocast."""
    with torch.inference_mode(False), torch.enable_grad(), full_precision(like.device.type):
        yield
