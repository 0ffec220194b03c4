"""Float64 references by `torch.func` alone, independent of every engine that is measured."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from .columns.torch_func import TorchFuncColumn


class Reference:
    """J u, Jᵀ v, K V and the diagonal of K, in float64, at the same weights and inputs.

    :param network: The network.
    :param x: The inputs, (n, d).
    """

    def __init__(self, network: nn.Module, x: Tensor):
        self.column = TorchFuncColumn()
        self.column.network = copy.deepcopy(network).double()
        self.column.x = x.double()
        self.column.parameters = {name: p.detach() for name, p in self.column.network.named_parameters()}

    def jvp(self, tangent: np.ndarray) -> np.ndarray:
        return self.column.jvp({"tangent": tangent.astype(np.float64)})().numpy()

    def vjp(self, cotangents: np.ndarray) -> np.ndarray:
        return self.column.vjp({"rhs": cotangents.astype(np.float64)})().numpy()

    def kernel_matmul(self, rhs: np.ndarray) -> np.ndarray:
        arrays = {"rhs": rhs.astype(np.float64)}
        products = [self.column.apply(self.column.transposed(v)) for v in torch.tensor(arrays["rhs"].T)]
        return torch.stack(products, dim=-1).numpy()

    def diagonal(self, chunk: int = 64) -> np.ndarray:
        """Chunk by chunk, because the explicit Jacobian of a large network is larger than the network."""
        x, pieces = self.column.x, []
        for self.column.x in x.split(chunk):
            pieces.append(self.column.diagonal({})())
        self.column.x = x
        return torch.cat(pieces).numpy()
