"""Plain `torch.func`, as its documentation does it: explicit Jacobians, and a vjp followed by a jvp."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import fastest
from .torch_base import TorchColumn

torch.backends.mha.set_fastpath_enabled(False)  # it has no forward-mode derivative


class TorchFuncColumn(TorchColumn):
    def prepare(self, case: dict, arrays: dict[str, np.ndarray]) -> None:
        super().prepare(case, arrays)
        self.parameters = {name: parameter.detach() for name, parameter in self.network.named_parameters()}

    def gram(self, arrays: dict) -> Callable:
        def call() -> Tensor:
            gram = 0.0
            for rows in self.explicit_jacobian():
                gram = gram + rows @ rows.mT
            return gram

        return call

    def diagonal(self, arrays: dict) -> Callable:
        return lambda: sum(rows.square().sum(-1) for rows in self.explicit_jacobian())

    def kernel_matmul(self, arrays: dict, columns: int) -> Callable:
        """The better of a loop over the columns and one vmap; a single column needs neither."""
        rhs = self.tensor(arrays["rhs"][:, :columns]).mT.contiguous()

        def product(column: Tensor) -> Tensor:
            return self.apply(self.transposed(column))

        def loop() -> Tensor:
            return torch.stack([product(column) for column in rhs], dim=-1)

        return loop if columns == 1 else fastest(loop, lambda: vmap(product, out_dims=-1)(rhs))

    def jvp(self, arrays: dict) -> Callable:
        pieces = self.tensor(arrays["tangent"]).split([p.numel() for p in self.parameters.values()])
        tangent = {n: piece.view_as(p) for (n, p), piece in zip(self.parameters.items(), pieces, strict=True)}
        return lambda: self.apply(tangent)

    def vjp(self, arrays: dict) -> Callable:
        cotangent = self.tensor(arrays["rhs"][:, 0].copy())
        return lambda: torch.cat([piece.flatten() for piece in self.transposed(cotangent).values()])

    def function(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no forward-mode derivative
            return functional_call(self.network, parameters, (x,)).flatten()

    def explicit_jacobian(self) -> list[Tensor]:
        """J in one (N, P_l) piece for each parameter."""

        def single(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return self.function(parameters, x[None])

        pieces = vmap(jacrev(single), (None, 0))(self.parameters, self.x)
        return [piece.flatten(0, 1).flatten(1) for piece in pieces.values()]

    def apply(self, tangent: dict[str, Tensor]) -> Tensor:
        """J u."""
        return jvp(lambda parameters: self.function(parameters, self.x), (self.parameters,), (tangent,))[1]

    def transposed(self, cotangent: Tensor) -> dict[str, Tensor]:
        """Jᵀ v."""
        return vjp(lambda parameters: self.function(parameters, self.x), self.parameters)[1](cotangent)[0]
