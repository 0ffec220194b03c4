"""Regression problems: a network trained on one domain, and data of another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from . import networks

NOISE = 0.01


@dataclass(frozen=True)
class Case:
    """n training inputs and `num_test` test inputs in the first layer's dimension, in one dtype.

    :param network: The widths of an MLP, as "5-200-200-1".
    """

    network: str
    n: int
    num_test: int = 500
    dtype: str = "float32"

    def description(self) -> dict:
        """What a column is told, beside the arrays."""
        return {"network": self.network}

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs, targets with noise, test inputs, and the weights of a network trained before the domain changed."""
        generator = np.random.default_rng(0)
        dimension = networks.input_size(self.network)
        # Rounded to float32 whatever the dtype is: one reference serves both.
        x, x_test = (generator.standard_normal((size, dimension), dtype=np.float32) for size in (self.n, self.num_test))
        noise = NOISE**0.5 * generator.standard_normal(self.n)
        y = (_target(torch.tensor(x), shift=0.5).numpy() + noise).astype(np.float32)
        state = {f"network.{name}": tensor.numpy() for name, tensor in trained(self.network).state_dict().items()}
        data = {"x": x, "y": y, "x_test": x_test}
        return {name: array.astype(self.dtype) for name, array in data.items()} | state


@cache
def trained(name: str, steps: int = 200) -> nn.Sequential:
    """An MLP, trained for a moment on the source domain; always the same one."""
    network = networks.build(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, networks.input_size(name), generator=generator)
    fit_network(network, x, _target(x, shift=0.0), steps)
    return network


def fit_network(network: nn.Module, x: Tensor, y: Tensor, steps: int, learning_rate: float = 1e-3) -> None:
    """Adam on the squared error, in batches of at most 1,000 rows."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(1000, len(x)),), generator=generator)
        optimizer.zero_grad()
        (network(x[rows]).squeeze(-1) - y[rows]).square().mean().backward()
        optimizer.step()


def _target(x: Tensor, shift: float) -> Tensor:
    """A smooth function of all inputs; the shift is the change of domain."""
    return torch.sin(2 * x[:, 0] + shift) + 0.5 * torch.cos(x[:, 1:].sum(-1) / x.shape[1] ** 0.5) + shift * x[:, -1]
