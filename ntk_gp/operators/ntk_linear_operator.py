"""Kernel matrices between two sets of inputs, as lazy matrices: what they share, and the neural tangent kernel's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from linear_operator.operators import (
    DiagLinearOperator,
    LinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from linear_operator.utils.getitem import IndexType
from torch import Size, Tensor

from .. import memory
from .._compat import OPTIONS, added_diagonal
from ..jacobian.base import Jacobian
from ..jacobian.columns import Column
from ..jacobian.linearization import Linearization
from ..jacobian.widened import WidenedLinearization, widened_function
from ..network import NetworkFunction
from ._batches import (
    FoldedColumns,
    are_one,
    expand,
    flatten_batch,
    in_common_batches,
    is_everything,
    points_of_rows,
    select,
)
from ._parts import Arguments, GramMatrices, Numbers, Part, part_of
from .ntk_added_diag_linear_operator import NTKAddedDiagLinearOperator
from .ntk_sum_linear_operator import NTKSumLinearOperator, entry_by_entry, product_over_batch


class BetweenInputs(LinearOperator):
    """A matrix (*batch, n₁·C, n₂·C), rows and columns point-major and output-minor, whose slices are of the inputs.

    :param x1: (*batch, n₁, d).
    :param x2: (*batch, n₂, d).
    :param numbers: What else each batch has, (*batch, 1, k): the hyperparameters.
    :param linearization: The frozen network with its engines.
    :param function: The network as it was bound to the inputs, where the caller has it; else it is asked for when it is
        wanted.
    :param options: What a subclass takes beside these.
    """

    def __init__(
        self,
        x1: Tensor,
        x2: Tensor,
        numbers: Tensor,
        *,
        linearization: Linearization,
        function: NetworkFunction | None = None,
        **options: Any,
    ):
        super().__init__(x1, x2, numbers, linearization=linearization, function=function, **options)
        self._function = function
        self.x1 = x1
        self.x2 = x2
        self.linearization = linearization

    @abstractmethod
    def _like(self, x1: Tensor, x2: Tensor, numbers: Tensor) -> BetweenInputs:
        """The same of other inputs."""

    @property
    @abstractmethod
    def _numbers(self) -> Tensor:
        """The hyperparameters, (*batch, 1, k)."""

    @property
    def _inputs_require_grad(self) -> bool:
        return self.x1.requires_grad or self.x2.requires_grad

    @property
    def _outputs(self) -> int:
        """C."""
        return self.linearization.network.num_outputs(self.x1) if self._function is None else self._function.num_outputs

    @property
    def network_state(self) -> int:
        """The state of the network that this is a kernel of: the one it was bound in."""
        bound = None if self._function is None else self._function.state
        return self.linearization.network.fingerprint() if bound is None else bound

    def _size(self) -> Size:
        outputs = self._outputs
        return Size([*self.x1.shape[:-2], self.x1.shape[-2] * outputs, self.x2.shape[-2] * outputs])

    def __getstate__(self) -> dict:
        state = {**self.__dict__, "_function": None}  # states are those of one process
        return {**state, OPTIONS: {**state[OPTIONS], "function": None}}

    def _transpose_nonbatch(self) -> BetweenInputs:
        return self._like(self.x2, self.x1, self._numbers)

    def _getitem(self, row_index: IndexType, col_index: IndexType, *batch_indices: IndexType) -> LinearOperator:
        rows, row_rest = points_of_rows(row_index, self.shape[-2], self._outputs)
        columns, col_rest = points_of_rows(col_index, self.shape[-1], self._outputs)
        x1, x2 = select(self.x1, batch_indices, rows), select(self.x2, batch_indices, columns)
        points = self._like(x1, x2, select(self._numbers, batch_indices))
        if is_everything(row_rest) and is_everything(col_rest):
            return points
        return LinearOperator._getitem(points, row_rest, col_rest, *[slice(None)] * len(points.batch_shape))


class NTKLinearOperator(BetweenInputs):
    r"""The kernel matrix :math:`\boldsymbol J(\boldsymbol X_1) \boldsymbol\Sigma \boldsymbol J(\boldsymbol X_2)^\top`.

    Of size (*batch, n₁·C, n₂·C), rows and columns point-major and output-minor. Products run Jacobian-vector products
    and form no N₁×N₂ matrix, unless it fits in the memory budget and storing it is cheaper
    (:class:`ntk_gp.settings.memory_budget`). A constant factor is absorbed into :math:`\boldsymbol\Sigma`.

    :param x1: (*batch, n₁, d).
    :param x2: (*batch, n₂, d).
    :param variances: (*batch, 1, G): the prior variance of each group of parameters,
        :math:`\boldsymbol\Sigma = \mathrm{blockdiag}(s_1 I, \dots, s_G I)`.
    :param linearization: The frozen network with its engines.
    :param function: The network as it was bound to the inputs, where the caller has it; else it is asked for when it is
        wanted.
    """

    def __init__(
        self,
        x1: Tensor,
        x2: Tensor,
        variances: Tensor,
        *,
        linearization: Linearization,
        function: NetworkFunction | None = None,
    ):
        variances = variances.to(x1.dtype)
        if not x1.shape[:-2] == x2.shape[:-2] == variances.shape[:-2]:
            x1, x2, variances = in_common_batches(x1, x2, variances)
        super().__init__(x1, x2, variances, linearization=linearization, function=function)
        self.variances = variances
        self._jacobians_memo: tuple[Jacobian, Jacobian] | None = None

    @property
    def _jacobians(self) -> tuple[Jacobian, Jacobian]:
        """J(X₁) and J(X₂), the same object where the inputs are the same tensor.

        One instance serves all iterations of a solve, and looks them up once. Differentiable ones are not kept: they
        hold a graph.
        """
        if self._jacobians_memo is not None and not (torch.is_grad_enabled() and self._inputs_require_grad):
            return self._jacobians_memo
        jacobian1 = self.linearization.jacobian(flatten_batch(self.x1))
        same = are_one(self.x1, self.x2)
        jacobian2 = jacobian1 if same else self.linearization.jacobian(flatten_batch(self.x2))
        if not (torch.is_grad_enabled() and self._inputs_require_grad):
            self._jacobians_memo = (jacobian1, jacobian2)
        return jacobian1, jacobian2

    @property
    def _prior_variances(self) -> Tensor:
        """(B, G)."""
        return self.variances.reshape(-1, self.variances.shape[-1])

    @property
    def _numbers(self) -> Tensor:
        return self.variances

    @property
    def function(self) -> NetworkFunction:
        """What says which parameters are in which group."""
        return self._jacobians[0].function if self._function is None else self._function

    def _like(self, x1: Tensor, x2: Tensor, variances: Tensor) -> NTKLinearOperator:
        return self.__class__(x1, x2, variances, linearization=self.linearization, function=self._function)

    def widened(self, columns: Sequence[Column], variances: Tensor) -> NTKLinearOperator:
        """The sum of this matrix and those of known features: again a neural tangent kernel's, of more groups.

        :param columns: The features.
        :param variances: Their prior variances, (*batch, 1, groups); the batches broadcast with this matrix's.
        """
        shape = torch.broadcast_shapes(self.variances.shape[:-1], variances.shape[:-1])
        own = [part.expand(*shape, part.shape[-1]) for part in (self.variances, variances.to(self.variances))]
        function = None if self._function is None else widened_function(self._function, columns)
        linearization = WidenedLinearization(self.linearization, columns)
        return self.__class__(self.x1, self.x2, torch.cat(own, -1), linearization=linearization, function=function)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_jacobians_memo": None}

    def is_of_one_kernel_with(self, other: NTKLinearOperator) -> bool:
        """Whether both are of one state of one network, with the same prior variances."""
        ours, theirs = self.variances.detach(), other.variances.detach()
        return self.network_state == other.network_state and bool((ours == theirs.to(ours)).all())

    def points_of(self, rows: Tensor) -> Tensor | None:
        """A mask of points, (n,), from one of rows, (n·C,); None if that has some but not all of a point's C."""
        outputs = rows.reshape(-1, self._outputs)
        return outputs[:, 0] if (outputs == outputs[:, :1]).all() else None

    def at_points(self, points: Tensor) -> NTKLinearOperator:
        """The rows and columns of some points, from a square matrix.

        :param points: A mask, (n,).
        """
        x1 = self.x1[..., points, :]
        same = are_one(self.x1, self.x2)
        return self._like(x1, x1 if same else self.x2[..., points, :], self.variances)

    def _expand_batch(self, batch_shape: Size | list[int]) -> NTKLinearOperator:
        return self._like(*(expand(tensor, batch_shape) for tensor in (self.x1, self.x2, self.variances)))

    def mul(self, other: float | Tensor | LinearOperator) -> LinearOperator:
        if isinstance(other, Tensor) and other.shape[-2:] == (1, 1):  # with more batches than this has, too
            return self._mul_constant(other.squeeze((-2, -1)))
        return super().mul(other)

    def _mul_constant(self, other: float | Tensor) -> NTKLinearOperator:
        other = torch.as_tensor(other, dtype=self.variances.dtype, device=self.variances.device)
        return self._like(self.x1, self.x2, self.variances * other[..., None, None])

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        return entry_by_entry(self, other)

    def _prod_batch(self, dim: int) -> LinearOperator:
        return product_over_batch(self, dim)

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """A square root, for samples, as long as it fits in the memory budget: JΣ^{1/2} where that is the smaller."""
        if method is not None:
            return super().root_decomposition(method)
        parameters = self._jacobians[0].function.num_parameters
        held = 2 * 8 * self.shape[:-1].numel() * parameters
        fits = parameters < self.shape[-1] and held <= memory.SYSTEM.bytes(self.device)
        if not fits or self._inputs_require_grad:
            return NTKSumLinearOperator(self).root_decomposition()
        return RootLinearOperator(self._features())

    def _features(self) -> Tensor:
        """JΣ^{1/2}, (*batch, N, P), evaluated in float64."""
        jacobian = self.linearization.jacobian(flatten_batch(self.x1.detach().double()))
        scales = jacobian.function.expand_variances(self._prior_variances.double()).sqrt()
        rows = jacobian.rows() * scales.unsqueeze(-2)
        return rows.expand(self.batch_shape.numel(), *rows.shape[-2:]).reshape(*self.shape[:-1], -1).to(self.dtype)

    def _matmul(self, rhs: Tensor) -> Tensor:
        if rhs.dim() == 1:
            return self._matmul(rhs.unsqueeze(-1)).squeeze(-1)
        jacobian1, jacobian2 = self._jacobians
        if self.linearization.network.num_groups > 1:
            columns = FoldedColumns(rhs, self.batch_shape)
            product = self.linearization.kernel_matmul(jacobian1, jacobian2, columns.flat, self._prior_variances)
            return columns.unfold(product)
        # One scale: where all batches have the same inputs, they are the same matrix up to that factor.
        one_matrix = jacobian1.x.shape[0] == jacobian2.x.shape[0] == 1
        columns = FoldedColumns(rhs, Size() if one_matrix else self.batch_shape)
        unit = self._prior_variances.new_ones(1, 1)
        product = columns.unfold(self.linearization.kernel_matmul(jacobian1, jacobian2, columns.flat, unit))
        return product * self.variances

    def to_dense(self) -> Tensor:
        dense = self.linearization.gram(*self._jacobians, self._prior_variances)
        return dense.reshape(self.shape)

    def _diagonal(self) -> Tensor:
        diagonal = self.linearization.diagonal(*self._jacobians, self._prior_variances)
        return diagonal.expand(self.batch_shape.numel(), -1).reshape(self.shape[:-1])

    def _get_indices(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        row_index, col_index, *batch_indices = torch.broadcast_tensors(row_index, col_index, *batch_indices)
        if row_index.numel() == 0:
            return self.x1.new_zeros(row_index.shape)
        if not self.batch_shape:
            rows, columns = row_index.reshape(-1), col_index.reshape(-1)
            unique, inverse = rows.unique(return_inverse=True)
            if len(unique) <= 4:  # one step of pivoted Cholesky asks for many entries of one row
                return self._rows(unique)[inverse, columns].reshape(row_index.shape)
        return self._entries(row_index, col_index, *batch_indices)

    def _rows(self, index: Tensor) -> Tensor:
        """A few whole rows, (m, N₂), of an operator without batches."""
        outputs = self._outputs
        jacobian1, jacobian2 = self._jacobians
        points, inverse = (index // outputs).unique(return_inverse=True)
        blocks = self.linearization.gram(jacobian1[points], jacobian2, self._prior_variances, keep=False)
        return blocks[0, inverse * outputs + index % outputs]

    def _entries(self, row_index: Tensor, col_index: Tensor, *batch_indices: Tensor) -> Tensor:
        """Single entries: as many products of two rows of J."""
        outputs = self._outputs
        x1 = self.x1[(*batch_indices, row_index // outputs)].reshape(1, -1, self.x1.shape[-1])
        x2 = self.x2[(*batch_indices, col_index // outputs)].reshape(1, -1, self.x2.shape[-1])
        jacobian1, jacobian2 = (self.linearization.jacobian(x, keep=False) for x in (x1, x2))
        variances = self.variances[(*batch_indices, torch.zeros_like(row_index))].reshape(-1, self.variances.shape[-1])
        weights = jacobian1.function.expand_variances(variances)
        size = jacobian1.points_per_block()
        pieces = []
        for i in range(0, x1.shape[1], size):
            here = slice(i, i + size)
            left = _select_outputs(jacobian1[here].rows(), row_index.reshape(-1)[here] % outputs)
            right = _select_outputs(jacobian2[here].rows(), col_index.reshape(-1)[here] % outputs)
            pieces.append((left * weights[here] * right).sum(-1))
        return torch.cat(pieces).reshape(row_index.shape)

    def _bilinear_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> tuple[Tensor | None, ...]:
        if left_vecs.dim() == 1:
            left_vecs, right_vecs = left_vecs.unsqueeze(-1), right_vecs.unsqueeze(-1)
        with torch.no_grad():
            grad_variances = self._variances_derivative(left_vecs, right_vecs) if self.variances.requires_grad else None
        grad_x1 = self._inputs_derivative(left_vecs, right_vecs) if self.x1.requires_grad else None
        grad_x2 = (
            self._transpose_nonbatch()._inputs_derivative(right_vecs, left_vecs) if self.x2.requires_grad else None
        )
        return grad_x1, grad_x2, grad_variances

    def _variances_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> Tensor:
        """K is linear in the variances: for each group, leftᵀ K right with its variance one and the rest zero."""
        groups = torch.eye(self.variances.shape[-1], dtype=self.variances.dtype, device=self.variances.device)
        x1, x2 = self.x1.detach(), self.x2.detach()
        derivatives = [
            (left_vecs * self._like(x1, x2, one.expand_as(self.variances))._matmul(right_vecs)).sum((-2, -1))
            for one in groups
        ]
        return torch.stack([d.sum_to_size(self.batch_shape) for d in derivatives], dim=-1).unsqueeze(-2)

    def _inputs_derivative(self, left_vecs: Tensor, right_vecs: Tensor) -> Tensor:
        """The derivative with respect to X₁ alone, block of points by block: its memory is that of one block."""
        x1 = self.x1.detach().reshape(self.batch_shape.numel(), *self.x1.shape[-2:])
        left, right = (FoldedColumns(vecs, self.batch_shape).flat for vecs in _same_batches(left_vecs, right_vecs))
        with torch.no_grad():
            jacobian2 = self.linearization.jacobian(flatten_batch(self.x2.detach()))
            weights = jacobian2.function.expand_variances(self._prior_variances.detach()).unsqueeze(-2)
            tangents = jacobian2.vjp(right.mT) * weights
        size = jacobian2.points_per_block()
        pieces = []
        for i in range(0, x1.shape[1], size):
            points = x1[:, i : i + size].clone().requires_grad_()
            with torch.enable_grad():
                out = self.linearization.jacobian(points).jvp(tangents)
                cotangents = left[:, i * self._outputs : (i + size) * self._outputs].mT
                pieces.append(
                    torch.autograd.grad(out, points, cotangents, allow_unused=True, materialize_grads=True)[0]
                )
        return torch.cat(pieces, dim=1).reshape(self.x1.shape)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        added = super().add_diagonal(diag)
        return self + added_diagonal(added)

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return NTKAddedDiagLinearOperator(self, other)
        if isinstance(other, RootLinearOperator):  # the base class would form root and inverse root of both
            return NTKSumLinearOperator(self, other)
        added = super().__add__(other)
        return NTKSumLinearOperator(*added.linear_ops) if type(added) is SumLinearOperator else added


@part_of.register
def _of_tangent_kernel(matrix: NTKLinearOperator, arguments: Arguments) -> Part:
    """In float64, by the Gram matrices that are kept where there is room for them."""
    if torch.is_grad_enabled() and matrix._inputs_require_grad:
        x1, x2, variances = (tensor.double() for tensor in (matrix.x1, matrix.x2, matrix.variances))
        return Numbers(arguments.add(matrix._like(x1, x2, variances).to_dense()))
    x1 = matrix.x1.detach().double()
    same = are_one(matrix.x1.detach(), matrix.x2.detach())
    double = matrix._like(x1, x1 if same else matrix.x2.detach().double(), matrix.variances.double())
    grams = matrix.linearization.unit_grams(*double._jacobians) if same else None  # test inputs may not come again
    if grams is None:
        return Numbers(arguments.add(double.to_dense()))
    if matrix.variances.shape[-1] == 1:
        grams = grams[0] if len(grams) == 1 else grams.reshape(double.shape)
    return GramMatrices(arguments.add(matrix.variances), grams)


def _same_batches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*shape, *a.shape[-2:]), b.expand(*shape, *b.shape[-2:])


def _select_outputs(rows: Tensor, output: Tensor) -> Tensor:
    """Of (1, m·C, P) rows, the one of each point's C that is asked for: (m, P)."""
    rows = rows.reshape(output.shape[0], -1, rows.shape[-1])
    return rows[torch.arange(output.shape[0], device=output.device), output]
