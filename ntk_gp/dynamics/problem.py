"""What is trained: a kernel, data, the function that training begins at, and the loss."""

from __future__ import annotations

import copy
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.means import Mean
from linear_operator import to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from .. import memory
from ..bridge.feature_sums import Summand, summands
from ..bridge.recognised import contains_ntk
from ..kernels import NTKKernel
from ..network import ALL_OUTPUTS, check_finite, check_tensor
from ..operators import JacobianLinearOperator, NTKLinearOperator

# By what half the sum of squares is multiplied, for N = n·C numbers.
LOSSES = {
    "half_sum": lambda numbers: 1.0,
    "sum": lambda numbers: 2.0,
    "half_mse": lambda numbers: 1.0 / numbers,
    "mse": lambda numbers: 2.0 / numbers,
}


def check_loss(loss: str) -> None:
    if loss not in LOSSES:
        raise ValueError(
            f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}: 'mse' is torch.nn.MSELoss(), "
            "'half_sum' is half the sum of squares."
        )


class Inputs:
    """A kernel with training inputs, as all that is trained by it sees them; in float64.

    :param source: A network, or a kernel.
    :param train_x: (n, d), (n, *input_shape), or (n,) for d = 1.
    :param outputs: C where a network is to have several outputs, else 1.

    :ivar kernel: A copy, with hyperparameters that stay as they are.
    :ivar tangent: The NTKKernel that it is, scaled or not; None for other kernels.
    :ivar num_rows: N = n·C.
    """

    def __init__(self, source: nn.Module, train_x: Tensor, outputs: int = 1):
        self.kernel = _kernel_of(source, outputs)
        parts = summands(self.kernel)
        is_tangent = len(parts) == 1 and isinstance(parts[0].kernel, NTKKernel)
        self.tangent: Summand | None = parts[0] if is_tangent else None
        rows = self.rows_of(train_x).detach()
        self.dtype = rows.dtype
        self.x = rows.double()
        if self.x.dim() != 2 or len(self.x) == 0:
            raise ValueError(
                f"Expected training inputs (n, d) with n > 0, got {tuple(self.x.shape)}. There is one training run, on "
                "one set of inputs: take each batch by itself."
            )
        with torch.no_grad():
            self.matrix = self.between(self.x, self.x)
        self.num_rows = self.matrix.shape[-1]
        if self.matrix.dim() != 2:
            raise ValueError(
                f"Expected a kernel without batches, got one whose matrix has shape {tuple(self.matrix.shape)}."
            )
        self.num_outputs = self.num_rows // len(self.x)

    def rows_of(self, x: Tensor) -> Tensor:
        """Inputs as the kernel takes them, (n, d)."""
        check_tensor(x)
        if not x.is_floating_point():
            raise TypeError(
                f"Expected inputs of a floating-point dtype, got {x.dtype}. Cast them, e.g. with x.float()."
            )
        if self.tangent is not None and self.tangent.active_dims is None and self.kernel.active_dims is None:
            x = self.tangent.kernel.network.flattened(x)
        x = x.unsqueeze(-1) if x.dim() == 1 else x
        check_finite(x)
        return x

    def test_rows(self, x: Tensor) -> Tensor:
        """Inputs at which predictions are wanted, (m, d), likewise."""
        rows = self.rows_of(x)
        if rows.dim() != 2 or rows.shape[-1] != self.x.shape[-1] or rows.device != self.x.device:
            raise ValueError(
                f"Expected inputs (m, {self.x.shape[-1]}) on {self.x.device}, as the training inputs are, got "
                f"{tuple(x.shape)} on {x.device}. Take each batch by itself."
            )
        return rows

    def between(self, x1: Tensor, x2: Tensor) -> LinearOperator:
        """K(x₁, x₂), evaluated lazily where it can be."""
        matrix = self.kernel(x1, x2)
        return to_linear_operator(matrix.evaluate_kernel() if isinstance(matrix, LazyEvaluatedKernelTensor) else matrix)

    def dense(self) -> Tensor:
        """K(X, X), (N, N), symmetric and finite."""
        with torch.no_grad():
            matrix = self.matrix.to_dense().double()
        if not matrix.isfinite().all():
            raise ValueError(
                f"The kernel matrix of the training inputs, {tuple(matrix.shape)}, has NaN or infinite entries. Look "
                "for weights or inputs at which the network has no finite derivative."
            )
        return (matrix + matrix.mT) / 2

    @torch.no_grad()
    def product(self, columns: Tensor) -> Tensor:
        """K(X, X) V, (N, r) to (N, r)."""
        product = self.matrix @ columns
        if not product.isfinite().all():
            raise ValueError("Products with the kernel matrix of the training inputs are NaN or infinite.")
        return product

    def has_room_for_eigenvectors(self) -> bool:
        """K, its eigenvectors, and what finding them takes."""
        return 4 * 8 * self.num_rows**2 <= memory.SYSTEM.bytes(self.x.device)


class Problem(Inputs):
    """These, with targets.

    :param source: A network, or a kernel.
    :param train_x: See :class:`Inputs`.
    :param train_y: (n,), (n, 1), or (n, C).
    :param loss: One of :data:`LOSSES`.
    :param mean: The function that training begins at; None for the network, or zero for a kernel that has none.

    :ivar factor: By what times are multiplied to be those of half the sum of squares.
    :ivar residual: y − f₀, (N,), float64.
    """

    def __init__(self, source: nn.Module, train_x: Tensor, train_y: Tensor, loss: str, mean: Mean | None):
        check_loss(loss)
        check_tensor(train_y)
        targets = train_y.squeeze(-1) if train_y.dim() == 2 and train_y.shape[-1] == 1 else train_y
        super().__init__(source, train_x, targets.shape[-1] if targets.dim() == 2 else 1)
        expected = (len(self.x),) if self.num_outputs == 1 else (len(self.x), self.num_outputs)
        if targets.shape != expected:
            raise ValueError(
                f"Expected targets of shape {expected} for {len(self.x)} inputs and {self.num_outputs} output(s) of "
                f"the kernel, got {tuple(train_y.shape)}. Of a network with several outputs, "
                "NTKKernel(network, output=i) takes one, output='all' all of them."
            )
        if not targets.isfinite().all():
            raise ValueError("Some targets are NaN or infinite. Remove these points.")
        if mean is not None and not isinstance(mean, Mean):
            raise TypeError(f"mean must be a gpytorch.means.Mean, got {type(mean).__name__}.")
        self.mean = None if mean is None else copy.deepcopy(mean).requires_grad_(False)
        self.factor = LOSSES[loss](self.num_rows)
        with torch.no_grad():
            self.residual = targets.detach().to(self.x).reshape(-1) - self.initial(self.x)

    def initial(self, x: Tensor) -> Tensor:
        """f₀(x), (m·C,), at rows (m, d)."""
        if self.mean is not None:
            values = self.mean(x)
        elif self.tangent is None:
            return x.new_zeros(len(x) * self.num_outputs)
        else:
            values = self.tangent.kernel.network(self.seen(x))
        if values.numel() != len(x) * self.num_outputs:
            raise ValueError(
                f"Expected a mean with {self.num_outputs} output(s), as the kernel has, got values of shape "
                f"{tuple(values.shape)} for {len(x)} inputs."
            )
        return values.reshape(-1).to(x)

    def seen(self, x: Tensor) -> Tensor:
        """The columns that the network sees."""
        for dims in (self.kernel.active_dims, self.tangent.active_dims if self.tangent is not None else None):
            x = x if dims is None else x.index_select(-1, dims)
        return x

    def shaped(self, rows: Tensor) -> Tensor:
        """(..., m·C) as (..., m), or (..., m, C)."""
        return rows if self.num_outputs == 1 else rows.unflatten(-1, (-1, self.num_outputs))

    def tangent_kernel(self, wanted: str) -> NTKKernel:
        """The kernel whose weights are trained."""
        if self.tangent is None:
            raise TypeError(
                f"{wanted} needs weights: an NTKKernel, scaled or not, or a network. {type(self.kernel).__name__} has "
                "functions only; predict() and distribution() give those."
            )
        return self.tangent.kernel

    @property
    def variances(self) -> Tensor:
        """The prior variances of all weights, (P,)."""
        assert isinstance(self.matrix, NTKLinearOperator)
        return self.matrix.function.expand_variances(self.matrix._prior_variances)[0]

    def jacobian(self) -> JacobianLinearOperator:
        """J(X), (N, P), without these."""
        return self.tangent_kernel("a Jacobian").jacobian(self.seen(self.x))

    @torch.no_grad()
    def weights_of(self, duals: Tensor) -> Tensor:
        """ΣJᵀα for (r, N) to (r, P)."""
        return (self.jacobian().mT @ duals.mT).mT * self.variances


def _kernel_of(source: Any, outputs: int) -> Kernel:
    if isinstance(source, Kernel):
        kernel = copy.deepcopy(source).eval().requires_grad_(False)
        return kernel if contains_ntk(kernel) else kernel.double()
    if isinstance(source, nn.Module):
        return NTKKernel(source, output=ALL_OUTPUTS if outputs > 1 else None)
    raise TypeError(
        f"Expected a network (torch.nn.Module) or a kernel (such as NTKKernel(network)), got {type(source).__name__}."
    )
