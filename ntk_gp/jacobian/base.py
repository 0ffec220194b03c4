"""The interface that both Jacobian engines implement, and what they share: caching and the way back to rows.

Notation, here and in every engine: B batches of n points each, C outputs, N = n·C rows (point-major, output-minor, so
row = point·C + output), P parameters in G groups. Vectors are rows: a block of r parameter vectors has shape (B, r, P)
and a block of r row vectors (B, r, N), so that every vector is contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import memory
from ..distributed.shards import ALL_HERE, Shards
from ..network import FrozenNetwork, NetworkFunction


class Jacobian(ABC):
    r"""The Jacobian :math:`J(X)`, shape (B, N, P), at fixed inputs `x` of shape (B, n, d); never stored as a whole.

    Every `variances` argument is a (W, G) tensor: row w holds one prior variance per parameter group, that is
    :math:`\Sigma_w = \mathrm{blockdiag}(s_{w1} I, \dots, s_{wG} I)`. B and W broadcast: they are equal, or one is 1.

    :param function: The network as a pure function of its parameters, in the dtype and on the device of `x`.
    :param x: The inputs, (B, n, d).
    :ivar int num_points: n.
    :ivar int num_rows: N = n·C.
    """

    def __init__(self, function: NetworkFunction, x: Tensor):
        self.function = function
        self.x = x
        self.num_points = x.shape[-2]
        self.num_rows = self.num_points * function.num_outputs

    values: Tensor | None = None
    """f at the inputs, (B, n, C), where it was computed along with J. Not to be written to."""

    def values_and_product(self, tangent: Tensor) -> tuple[Tensor, Tensor] | None:
        """f, (B, n, C), and J u, (B, N), for one u (P,); None where these two take more than one pass."""
        return None if self.values is None else (self.values, self.jvp(tangent.reshape(1, 1, -1))[:, 0])

    @property
    def own(self) -> Jacobian:
        """The rows that this process works on, where several share them (:mod:`ntk_gp.distributed`): all of them."""
        return self

    @property
    def shards(self) -> Shards:
        """Which rows these are, and the way from them to all rows."""
        return ALL_HERE

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held beyond the inputs: what keeping this object in a cache costs."""

    @abstractmethod
    def jvp(self, tangents: Tensor) -> Tensor:
        """J u for every row u of `tangents`: (B or 1, r, P) to (B, r, N)."""

    @abstractmethod
    def vjp(self, cotangents: Tensor) -> Tensor:
        """Jᵀ v for every row v of `cotangents`: (B or 1, r, N) to (B, r, P)."""

    @abstractmethod
    def rows(self) -> Tensor:
        """All rows of J, (B, N, P), not to be written to: they may be what J is kept as. Meant for few points: select
        them first, `jacobian[index].rows()`."""

    def some_columns(self, index: Tensor) -> Tensor:
        """Some columns of J, (B, N, k), for the numbers of k parameters: as many Jacobian-vector products."""
        pieces = []
        for some in index.split(self.vectors_per_block()):
            tangents = self.x.new_zeros(1, len(some), self.function.num_parameters)
            tangents[0, torch.arange(len(some), device=some.device), some] = 1.0
            pieces.append(self.jvp(tangents).mT)
        return torch.cat(pieces, dim=-1) if pieces else self.x.new_zeros(len(self.x), self.num_rows, 0)

    @abstractmethod
    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        """J Σ_w J'ᵀ for every w: (B or W, N, N')."""

    @abstractmethod
    def diagonal(self, variances: Tensor) -> Tensor:
        """The diagonal of J Σ_w Jᵀ: (B or W, N), without any n×n work."""

    def cross_diagonal(self, other: Jacobian, variances: Tensor) -> Tensor:
        """The diagonal of J Σ_w J'ᵀ for two Jacobians at equally many points: (B or W, N)."""
        expanded = self.function.expand_variances(variances).unsqueeze(-2)
        size = self.points_per_block()
        blocks = [
            (self[slice(i, i + size)].rows() * other[slice(i, i + size)].rows() * expanded).sum(-1)
            for i in range(0, self.num_points, size)
        ]
        batch = max(self.x.shape[0], other.x.shape[0], variances.shape[0])
        return torch.cat(blocks, dim=-1) if blocks else self.x.new_zeros(batch, 0)

    def row_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Points, as many as whose rows may be held at once, and their rows of J, (B, m·C, P)."""
        size = self.points_per_block()
        for start in range(0, self.num_points, size):
            points = slice(start, min(start + size, self.num_points))
            yield points, self[points].rows()

    def points_per_block(self) -> int:
        """How many points' rows may be held at once: an eighth of the memory budget."""
        function = self.function
        row_bytes = function.num_outputs * function.num_parameters * self.x.element_size() + function.bytes_per_point
        budget = memory.BLOCK.bytes(self.x.device)
        return max(1, min(self.num_points, budget // max(1, self.x.shape[0] * row_bytes)))

    def vectors_per_block(self, other: Jacobian | None = None) -> int:
        """How many vectors, of parameters or of rows, may be held at once: an eighth of the memory budget."""
        longest = max(self.function.num_parameters, self.num_rows, 0 if other is None else other.num_rows)
        vector_bytes = len(self.x) * longest * self.x.element_size()
        return max(1, memory.BLOCK.bytes(self.x.device) // max(1, vector_bytes))

    def report(self) -> list[dict[str, object]]:
        """For each parameter: how it is served, the bytes of its factors, and flops per entry of a Gram matrix."""
        return [
            {"parameter": name, "served_by": "autodiff", "bytes": 0, "gram_flops": 2.0 * tensor.numel()}
            for name, tensor in self.function.parameters.items()
        ]

    def gram_cost(self, other: Jacobian) -> float:
        """About how many flops :meth:`gram` takes."""
        symmetric = 1 if other is self else 2
        return float(symmetric) * self.x.shape[0] * self.num_rows * other.num_rows * self.function.num_parameters

    def product_cost(self, other: Jacobian) -> float:
        """About how many flops :meth:`kernel_matmul` takes for each column: one reverse and one forward pass."""
        return 5.0 * self.x.shape[0] * (self.num_points + other.num_points) * self.function.num_parameters

    @abstractmethod
    def __getitem__(self, points: Tensor | slice) -> Jacobian:
        """The Jacobian at some of the points (the same ones in every batch)."""

    def kernel_matmul(self, other: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        """(J Σ_w J'ᵀ) rhs: (B or 1, N', r) to (B or W, N, r), without storing the N×N' matrix.

        An engine overrides this when it has something cheaper than one vjp and one jvp.
        """
        expanded = self.function.expand_variances(variances).unsqueeze(-2)
        r, size = rhs.shape[-1], self.vectors_per_block(other)
        if r <= size:
            return self.jvp(other.vjp(rhs.mT) * expanded).mT
        out = rhs.new_empty(self._results(other, rhs, variances), r, self.num_rows)
        for i in range(0, r, size):
            out[:, i : i + size] = self.jvp(other.vjp(rhs[..., i : i + size].mT) * expanded)
        return out.mT

    def _results(self, other: Jacobian, *factors: Tensor) -> int:
        """How many batches a product of these has."""
        return max(len(self.x), len(other.x), *map(len, factors))


class JacobianEngine(ABC):
    """Builds a :class:`Jacobian` at given inputs. Holds the network and nothing that depends on inputs.

    It is not an `nn.Module` and has none of `to`, `cpu`, `clone`, … on purpose: operators carry it by reference.

    :param network: The frozen network.
    """

    def __init__(self, network: FrozenNetwork):
        self.network = network

    @abstractmethod
    def linearize(self, x: Tensor, function: NetworkFunction | None = None) -> Jacobian:
        """The Jacobian at `x` (B, n, d), differentiable with respect to `x` where `x` requires a gradient.

        :param function: The network as it was tried at `x`, where the caller has it.
        """
