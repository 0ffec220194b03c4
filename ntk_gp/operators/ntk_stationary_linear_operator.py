"""A stationary kernel in the network's metric, as a lazy matrix."""

from __future__ import annotations

import torch
from torch import Size, Tensor

from .. import memory
from ..jacobian.distances import paired_squared_distances, squared_distances
from ..jacobian.linearization import Linearization
from ..network import NetworkFunction
from ._batches import are_one, expand, flatten_batch, in_common_batches
from ._radial import profile, radial
from .ntk_linear_operator import BetweenInputs

# Matrices of float64 numbers that are held at once while one is made: the Gram matrix, distances, and values.
_HELD = 4


class NTKStationaryLinearOperator(BetweenInputs):
    r"""The matrix of :math:`k(d^2(\boldsymbol x, \boldsymbol x') / \ell^2)`, d the distance of tangent features.

    Of size (*batch, n₁·C, n₂·C), rows and columns point-major and output-minor; each output has distances of its own,
    and covariances with itself alone. Slices are slices of the inputs. What does not fit in the memory budget
    (:class:`ntk_gp.settings.memory_budget`) is multiplied some rows at a time.

    :param x1: (*batch, n₁, d).
    :param x2: (*batch, n₂, d).
    :param lengthscale: (*batch, 1, 1).
    :param nu: That of a Matérn kernel (0.5, 1.5, 2.5); infinity for the squared exponential.
    :param linearization: The frozen network with its engines, one group of parameters.
    :param function: The network as it was bound to the inputs, where the caller has it.
    """

    def __init__(
        self,
        x1: Tensor,
        x2: Tensor,
        lengthscale: Tensor,
        *,
        nu: float,
        linearization: Linearization,
        function: NetworkFunction | None = None,
    ):
        if not x1.shape[:-2] == x2.shape[:-2] == lengthscale.shape[:-2]:
            x1, x2, lengthscale = in_common_batches(x1, x2, lengthscale)
        super().__init__(x1, x2, lengthscale, linearization=linearization, function=function, nu=nu)
        self.lengthscale = lengthscale
        self.nu = nu

    @property
    def dtype(self) -> torch.dtype:
        """That of the inputs; lengthscales may have another."""
        return self.x1.dtype

    @property
    def _numbers(self) -> Tensor:
        return self.lengthscale

    @property
    def _is_symmetric(self) -> bool:
        """Whether both sets of inputs are the same, also where they are in different places."""
        if are_one(self.x1, self.x2):
            return True
        equal = not self._inputs_require_grad and self.x1.shape == self.x2.shape
        return equal and torch.equal(self.x1, self.x2)

    def _like(self, x1: Tensor, x2: Tensor, lengthscale: Tensor) -> NTKStationaryLinearOperator:
        return self.__class__(
            x1, x2, lengthscale, nu=self.nu, linearization=self.linearization, function=self._function
        )

    def _expand_batch(self, batch_shape: Size | list[int]) -> NTKStationaryLinearOperator:
        x1 = expand(self.x1, batch_shape)
        x2 = x1 if self.x2 is self.x1 else expand(self.x2, batch_shape)
        return self._like(x1, x2, expand(self.lengthscale, batch_shape))

    @property
    def _lengthscales(self) -> Tensor:
        """(B, 1, 1) in float64."""
        return self.lengthscale.reshape(-1, 1, 1).double()

    def to_dense(self) -> Tensor:
        x1 = flatten_batch(self.x1)
        distances = squared_distances(self.linearization, x1, None if self._is_symmetric else flatten_batch(self.x2))
        outputs, n, m = distances.shape[1:]
        values = radial(distances.flatten(1, 2), self._lengthscales, self.nu).to(self.dtype)
        if outputs > 1:
            blocks = values.unflatten(1, (outputs, n)).movedim(1, -1)  # (B, n, m, C)
            values = torch.diag_embed(blocks, dim1=-3, dim2=-1).reshape(-1, n * outputs, m * outputs)
        return values.expand(self.batch_shape.numel(), *values.shape[1:]).reshape(self.shape)

    def _diagonal(self) -> Tensor:
        if self._is_symmetric:
            return self.x1.new_ones(self.shape[:-1])
        distances = self._paired(flatten_batch(self.x1), flatten_batch(self.x2))
        values = profile(distances / self._lengthscales.square(), self.nu).to(self.dtype)
        return values.flatten(1).expand(self.batch_shape.numel(), -1).reshape(self.shape[:-1])

    def _paired(self, x1: Tensor, x2: Tensor) -> Tensor:
        return paired_squared_distances(self.linearization, x1, x2)

    @property
    def _fits(self) -> bool:
        return 8 * _HELD * self.shape.numel() * self._outputs <= memory.SYSTEM.bytes(self.x1.device)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if self._fits or self.x1.shape[-2] <= 1:
            return self.to_dense() @ rhs
        return torch.cat([part._matmul(rhs) for part in self._halves], dim=-1 if rhs.dim() == 1 else -2)

    @property
    def _halves(self) -> list[NTKStationaryLinearOperator]:
        """The first half of the points' rows, and the other."""
        half = self.x1.shape[-2] // 2
        points = (self.x1[..., :half, :], self.x1[..., half:, :])
        return [self._like(x1, self.x2, self.lengthscale) for x1 in points]

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if self._fits or self.x1.shape[-2] <= 1:
            return super()._bilinear_derivative(left_vecs, right_vecs)
        if left_vecs.dim() == 1:
            left_vecs, right_vecs = left_vecs.unsqueeze(-1), right_vecs.unsqueeze(-1)
        first, second = self._halves
        rows = first.shape[-2]
        above = first._bilinear_derivative(left_vecs[..., :rows, :], right_vecs)
        below = second._bilinear_derivative(left_vecs[..., rows:, :], right_vecs)
        grad_x1 = None if above[0] is None or below[0] is None else torch.cat([above[0], below[0]], dim=-2)
        sums = (None if a is None or b is None else a + b for a, b in zip(above[1:], below[1:], strict=True))
        return grad_x1, *sums

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        row_index, col_index, *batch_indices = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        if row_index.numel() == 0:
            return self.x1.new_zeros(row_index.shape)
        outputs = self._outputs
        x1 = self.x1[(*batch_indices, row_index // outputs)].reshape(1, -1, self.x1.shape[-1])
        x2 = self.x2[(*batch_indices, col_index // outputs)].reshape(1, -1, self.x2.shape[-1])
        zeros = torch.zeros_like(row_index)
        lengthscale = self.lengthscale[(*batch_indices, zeros, zeros)].reshape(-1).double()
        output, other = (row_index % outputs).reshape(-1), (col_index % outputs).reshape(-1)
        distances = self._paired(x1, x2)[0].gather(-1, output.unsqueeze(-1)).squeeze(-1)
        values = profile(distances / lengthscale.square(), self.nu).masked_fill(output != other, 0.0)
        return values.to(self.dtype).reshape(row_index.shape)
