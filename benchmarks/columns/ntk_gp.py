"""This package's engines, behind the interface that they share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ntk_gp import NTKKernel
from ntk_gp.jacobian.autodiff import AutodiffEngine
from ntk_gp.network import ALL_OUTPUTS, FrozenNetwork

from .torch_base import TorchColumn


class EngineColumn(TorchColumn):
    """One engine. Gram matrix and diagonal start from the inputs, as in every other column; products from the capture,
    which is done once for all of them and has a row of its own.

    :param engine: "autodiff" or "structured".
    """

    def __init__(self, engine: str, device: str = "cpu"):
        super().__init__(device)
        self.engine_name = engine
        self.engine_class = AutodiffEngine if engine == "autodiff" else _structured_engine()

    def prepare(self, case: dict, arrays: dict[str, np.ndarray]) -> None:
        super().prepare(case, arrays)
        network = FrozenNetwork(self.network, output=ALL_OUTPUTS)
        network.check(self.x)
        self.engine = self.engine_class(network)
        self.weights = torch.ones(1, 1, dtype=self.x.dtype, device=self.device)
        self.jacobian = self.engine.linearize(self.x[None])

    def capture(self, arrays: dict) -> Callable:
        return lambda: self.engine.linearize(self.x[None])

    def to_numpy(self, result: object) -> list[np.ndarray]:
        return super().to_numpy(result) if isinstance(result, Tensor) else []

    def gram(self, arrays: dict) -> Callable:
        def call() -> Tensor:
            jacobian = self.engine.linearize(self.x[None])
            return jacobian.gram(jacobian, self.weights)[0]

        return call

    def new_gram(self, arrays: dict) -> Callable:
        """Through the kernel, at inputs that it has not seen: nothing is kept but what was found out of the network."""
        kernel = NTKKernel(self.network, output=ALL_OUTPUTS, engine=self.engine_name)

        def call() -> Tensor:
            kernel._linearization.clear()
            with torch.no_grad():
                return kernel(self.x).to_dense()

        return call

    def diagonal(self, arrays: dict) -> Callable:
        return lambda: self.engine.linearize(self.x[None]).diagonal(self.weights)[0]

    def kernel_matmul(self, arrays: dict, columns: int) -> Callable:
        rhs = self.tensor(arrays["rhs"][:, :columns])[None]
        return lambda: self.jacobian.kernel_matmul(self.jacobian, rhs, self.weights)[0]

    def jvp(self, arrays: dict) -> Callable:
        tangent = self.tensor(arrays["tangent"])[None, None]
        return lambda: self.jacobian.jvp(tangent)[0, 0]

    def vjp(self, arrays: dict) -> Callable:
        cotangent = self.tensor(arrays["rhs"][:, 0].copy())[None, None]
        return lambda: self.jacobian.vjp(cotangent)[0, 0]


def _structured_engine() -> type:
    try:
        from ntk_gp.jacobian.structured import StructuredEngine
    except ImportError as error:
        raise NotImplementedError("this version has no structured engine") from error
    return StructuredEngine
