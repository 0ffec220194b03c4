"""curvlinops: Jacobians as linear operators. It has none for a Gram matrix or its diagonal: those cells stay blank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from curvlinops import JacobianLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .torch_base import TorchColumn

torch.backends.mha.set_fastpath_enabled(False)  # it has no forward-mode derivative


class MathAttention(nn.Module):
    """A network with fused attention, which has no forward-mode derivative, switched off."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return self.network(x)


class CurvlinopsColumn(TorchColumn):
    def prepare(self, case: dict, arrays: dict[str, np.ndarray]) -> None:
        super().prepare(case, arrays)
        network = MathAttention(self.network)
        data = [(self.x, self.x.new_zeros(len(self.x), 1))]
        self.jacobian = JacobianLinearOperator(
            network, list(network.parameters()), data, check_deterministic=False, num_data=len(self.x)
        )
        self.transposed = self.jacobian.adjoint()

    def kernel_matmul(self, arrays: dict, columns: int) -> Callable:
        rhs = self.tensor(arrays["rhs"][:, :columns])
        return lambda: self.jacobian @ (self.transposed @ rhs)

    def jvp(self, arrays: dict) -> Callable:
        tangent = self.tensor(arrays["tangent"])
        return lambda: self.jacobian @ tangent

    def vjp(self, arrays: dict) -> Callable:
        cotangent = self.tensor(arrays["rhs"][:, 0].copy())
        return lambda: self.transposed @ cotangent
