"""The posterior covariance as a lazy matrix."""

from __future__ import annotations

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.getitem import IndexType
from linear_operator.utils.memoize import cached
from torch import Size, Tensor

from .. import settings
from .._compat import added_diagonal, without_diagonal
from ..solvers import PosteriorCovariance
from ._batches import common_shape, expand, select
from ._densely_solved import DenselySolved

_NO_BATCH = Size()


class _FactorisedInDouble(DenselySolved):
    """Solves, determinants and roots from the covariance in float64, whatever the inputs' dtype.

    In float32 a posterior covariance, rounded to six digits of its largest entry, is no longer positive definite, and
    GPyTorch's jitter, 1e-6 whatever the entries' size, would be all that is left of a small one.
    """

    def _covariance(self) -> Tensor:
        """In float64."""
        raise NotImplementedError

    def _double(self) -> Tensor:
        return self._covariance()

    def _factorise(self) -> Tensor:
        """Lower triangular; with jitter, in units of the mean variance, where the matrix is singular."""
        matrix = self._covariance()
        size = matrix.detach().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        size = size.where(size > 0, 1.0)
        return psd_safe_cholesky(matrix / size) * size.sqrt()


class NTKPosteriorLinearOperator(_FactorisedInDouble):
    r"""The posterior covariance between two sets of test inputs, (*batch, m₁·C, m₂·C).

    Its diagonal, the posterior variances, is computed block of points by block and is never negative; other products
    form the matrix. Differentiable with respect to the inputs.

    :param x1: (*batch, m₁, d).
    :param x2: (*batch, m₂, d).
    :param source: What was built from the training data: a solver, or a low-rank factor.
    :param batch_shape: The batch shape of the training data, where the solver has batches of its own.
    """

    def __init__(self, x1: Tensor, x2: Tensor, *, source: PosteriorCovariance, batch_shape: Size = _NO_BATCH):
        shape = common_shape(x1.shape[:-2], x2.shape[:-2])
        same = x1 is x2
        x1 = expand(x1, shape)
        x2 = x1 if same else expand(x2, shape)
        super().__init__(x1, x2, source=source, batch_shape=batch_shape)
        self.x1 = x1
        self.x2 = x2
        self.source = source
        self.train_batch_shape = batch_shape

    @property
    def _outputs(self) -> int:
        return self.source.system.jacobian.function.num_outputs

    def _size(self) -> Size:
        return Size([*self.x1.shape[:-2], self.x1.shape[-2] * self._outputs, self.x2.shape[-2] * self._outputs])

    def _like(self, x1: Tensor, x2: Tensor) -> NTKPosteriorLinearOperator:
        return self.__class__(x1, x2, source=self.source, batch_shape=self.train_batch_shape)

    def _transpose_nonbatch(self) -> NTKPosteriorLinearOperator:
        return self._like(self.x2, self.x1)

    def _expand_batch(self, batch_shape: Size | list[int]) -> NTKPosteriorLinearOperator:
        x1 = expand(self.x1, batch_shape)
        return self._like(x1, x1 if self.x2 is self.x1 else expand(self.x2, batch_shape))

    @property
    def _is_square_of_one_set(self) -> bool:
        if self.x1 is self.x2:
            return True
        if self.x1.requires_grad or self.x2.requires_grad:  # each has a gradient of its own
            return False
        return self.x1.shape == self.x2.shape and torch.equal(self.x1, self.x2)

    @cached(name="posterior_diagonal")
    def _diagonal(self) -> Tensor:
        if not self._is_square_of_one_set:
            return self.to_dense().diagonal(dim1=-1, dim2=-2)
        pieces = [self._variances(x) for x in _one_batch_dimension(self.x1, self.train_batch_shape)]
        return torch.stack(pieces).reshape(self.shape[:-1]).to(self.dtype)

    def _variances(self, x: Tensor) -> Tensor:
        """(B, m, d) to (B, m·C); over ranks, each those of its share of points where it needs no other one for that."""
        group = settings.distributed.group()
        if group is None or x.requires_grad or x.shape[1] < group.size or not self.source.is_replicated:
            return self._variances_here(x)
        points = group.slices(x.shape[1])
        own = self._variances_here(x[:, points[group.rank]])
        return group.gather(own, -1, [(each.stop - each.start) * self._outputs for each in points])

    def _variances_here(self, x: Tensor) -> Tensor:
        """The same by this process alone."""
        system = self.source.system
        size = max(1, self.source.points_per_block(self._outputs) // max(1, x.shape[0] // system.batch))
        starts = settings.progress(range(0, x.shape[1], size), "Posterior variances")
        blocks = [self.source.variance(system.jacobian_at(x[:, i : i + size])) for i in starts]
        return torch.cat(blocks, dim=-1) if blocks else x.new_zeros(x.shape[0], 0)

    @cached
    def to_dense(self) -> Tensor:
        return self._covariance().to(self.dtype)

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return NTKPosteriorAddedDiagLinearOperator(self, other)
        return super().__add__(other)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        return self + added_diagonal(super().add_diagonal(diag))

    def _covariance(self) -> Tensor:
        """In float64."""
        system = self.source.system
        same = self._is_square_of_one_set
        pieces = []
        for x1, x2 in zip(
            _one_batch_dimension(self.x1, self.train_batch_shape),
            _one_batch_dimension(self.x2, self.train_batch_shape),
            strict=True,
        ):
            jacobian1 = system.jacobian_at(x1)
            jacobian2 = jacobian1 if same else system.jacobian_at(x2)
            pieces.append(self.source.covariance(jacobian1, jacobian2))
        return torch.stack(pieces).reshape(self.shape)

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.to_dense() @ rhs

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        if self._outputs != 1 or (self.train_batch_shape and not all(index == slice(None) for index in batch_indices)):
            return self._dense._getitem(row_index, col_index, *batch_indices)
        x1 = select(self.x1, batch_indices, row_index)
        same = self.x2 is self.x1 and _same_index(row_index, col_index)
        return self._like(x1, x1 if same else select(self.x2, batch_indices, col_index))

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        return self._dense._get_indices(row_index, col_index, *batch_indices)

    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._dense._permute_batch(*dims) if self.train_batch_shape else super()._permute_batch(*dims)

    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._dense._unsqueeze_batch(dim) if self.train_batch_shape else super()._unsqueeze_batch(dim)

    @property
    def _dense(self) -> DenseLinearOperator:
        """For what several outputs, or the batches of the training data, leave no other way to."""
        return NTKPosteriorEntries(self.to_dense())


class NTKPosteriorEntries(DenseLinearOperator):
    """Entries of a posterior covariance, rounded from float64 and known to be that."""


class NTKPosteriorAddedDiagLinearOperator(_FactorisedInDouble, AddedDiagLinearOperator):
    """A posterior covariance plus noise: what a likelihood makes of a prediction.

    :param linear_ops: The :class:`NTKPosteriorLinearOperator` and the
        :class:`~linear_operator.operators.DiagLinearOperator`.
    """

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return self.__class__(without_diagonal(self), added_diagonal(self) + other)
        return super().__add__(other)

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        if not _same_index(row_index, col_index) or without_diagonal(self).batch_shape != self.batch_shape:
            return super()._getitem(row_index, col_index, *batch_indices)
        noise = added_diagonal(self)._diagonal().expand(self.shape[:-1])[(*batch_indices, slice(None))][..., row_index]
        return without_diagonal(self)._getitem(row_index, col_index, *batch_indices) + DiagLinearOperator(noise)

    def _covariance(self) -> Tensor:
        matrix = without_diagonal(self)._covariance()
        noise = added_diagonal(self)._diagonal().double()
        matrix = matrix.expand(torch.broadcast_shapes(matrix.shape, (*noise.shape, 1)))
        return matrix + torch.diag_embed(noise)


def _same_index(one: IndexType, other: IndexType) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return isinstance(one, slice) and one == other


def _one_batch_dimension(x: Tensor, train_batch_shape: Size) -> Tensor:
    """(*batch, m, d) to (k, B, m, d): k pieces, each with the batches of the training data (any, if those are one)."""
    if not train_batch_shape:
        return x.reshape(1, -1, *x.shape[-2:])
    return x.reshape(-1, train_batch_shape.numel(), *x.shape[-2:])
