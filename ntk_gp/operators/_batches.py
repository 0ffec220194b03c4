"""Bookkeeping between the batch dimensions of operators, (*batch, n, d), and the engines' single one, (B, n, d)."""

from __future__ import annotations

import math

import torch
from linear_operator.utils.getitem import IndexType
from torch import Size, Tensor


def flatten_batch(x: Tensor) -> Tensor:
    """(*batch, n, d) to (B, n, d), where B = 1 if all batches are the same (expanded, or equal element by element).

    BoTorch's t-batches repeat the training inputs: their Jacobian is wanted once. Inputs that require gradients keep
    their batches apart, since each has a gradient of its own.
    """
    batch_dims = x.dim() - 2
    flat = x.reshape(x.shape[:-2].numel(), *x.shape[-2:])
    if x.requires_grad or flat.shape[0] <= 1:
        return flat
    expanded = all(stride == 0 or size == 1 for stride, size in zip(x.stride()[:batch_dims], x.shape, strict=False))
    if expanded or bool((flat[1:] == flat[:1]).all()):
        return flat[:1]
    return flat


def expand(x: Tensor, batch_shape: Size | list[int]) -> Tensor:
    """(*batch, n, d) to (*batch_shape, n, d), or itself; it requires a gradient as `x` does.

    Operators are rebuilt inside autograd functions, without grad mode, and must still know what to differentiate for.
    """
    if x.shape[:-2] == Size(batch_shape):
        return x
    return x.expand(*batch_shape, *x.shape[-2:]).requires_grad_(x.requires_grad)


def common_shape(shape: Size, *others: Size) -> Size:
    """What shapes broadcast to; `torch.broadcast_shapes` takes twenty microseconds to find that equal ones are."""
    return shape if all(other == shape for other in others) else torch.broadcast_shapes(shape, *others)


def select(x: Tensor, batch_indices: tuple[IndexType, ...], points: IndexType = slice(None)) -> Tensor:
    """Some batches of (*batch, n, d), and some points in each."""
    return x[(*batch_indices, slice(None), slice(None))][..., points, :]


def is_everything(index: IndexType) -> bool:
    """Whether an index leaves its dimension as it is."""
    return isinstance(index, slice) and index == slice(None)


def in_common_batches(x1: Tensor, x2: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in the same batches; one set of inputs stays one."""
    try:
        batch_shape = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2], variances.shape[:-2])
    except RuntimeError:
        raise RuntimeError(
            f"The batches of the inputs, {tuple(x1.shape)} and {tuple(x2.shape)}, and of the kernel's scale, "
            f"{tuple(variances.shape[:-2])}, do not broadcast."
        ) from None
    expanded = expand(x1, batch_shape)
    return expanded, expanded if x2 is x1 else expand(x2, batch_shape), expand(variances, batch_shape)


def same_memory(a: Tensor, b: Tensor) -> bool:
    layouts = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    return layouts[0] == layouts[1]


def are_one(x1: Tensor, x2: Tensor) -> bool:
    """Whether two sets of inputs are one: the same tensor, or the same memory, of which each has no derivative."""
    return x1 is x2 or (same_memory(x1, x2) and not (x1.requires_grad or x2.requires_grad))


def points_of_rows(index: IndexType, num_rows: int, outputs: int) -> tuple[IndexType, IndexType]:
    """The points that rows belong to, C rows each, and the index of those rows among all rows of these points."""
    if outputs == 1:
        return index, slice(None)
    if isinstance(index, slice):
        start, stop, step = index.indices(num_rows)
        if step == 1 and start % outputs == 0 and stop % outputs == 0:
            return slice(start // outputs, max(start, stop) // outputs), slice(None)
        index = torch.arange(start, stop, step, device="cpu")
    rows = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
    points, position = (rows // outputs).unique(return_inverse=True)
    return points, position * outputs + rows % outputs


class FoldedColumns:
    """Right-hand sides with more batches than the operator, as more columns for the same operator.

    :param rhs: (*rhs_batch, N, r).
    :param batch_shape: The operator's batch shape; broadcasts with that of `rhs`.
    """

    def __init__(self, rhs: Tensor, batch_shape: Size):
        self.out_shape = torch.broadcast_shapes(rhs.shape[:-2], batch_shape)
        own = (*[1] * (len(self.out_shape) - len(batch_shape)), *batch_shape)
        self._extra = [i for i, size in enumerate(own) if size == 1]  # these batch dimensions become columns
        self._kept = [i for i, size in enumerate(own) if size != 1]
        self._rhs = rhs

    @property
    def flat(self) -> Tensor:
        """(B, N, r · the extra batches), B the number of the operator's own batches."""
        dims = len(self.out_shape)
        rhs = self._rhs.expand(*self.out_shape, *self._rhs.shape[-2:])
        rhs = rhs.permute(*self._kept, dims, *self._extra, dims + 1)
        batch = math.prod(self.out_shape[i] for i in self._kept)
        return rhs.reshape(batch, rhs.shape[len(self._kept)], -1)

    def unfold(self, product: Tensor) -> Tensor:
        """(B, M, r · the extra batches) back to (*out, M, r)."""
        kept, extra = ([self.out_shape[i] for i in dims] for dims in (self._kept, self._extra))
        product = product.reshape(*kept, product.shape[-2], *extra, self._rhs.shape[-1])
        order = [0] * len(self.out_shape)
        for position, dim in enumerate(self._kept):
            order[dim] = position
        for position, dim in enumerate(self._extra):
            order[dim] = len(self._kept) + 1 + position
        return product.permute(*order, len(self._kept), product.dim() - 1)
