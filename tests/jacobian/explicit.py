"""A network as the engines have it, and as the user has it, of which explicit Jacobians are made in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ntk_gp.network import FrozenNetwork
from ntk_gp.testing import check_rule, explicit_jacobian


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-300


def variances_for(network: FrozenNetwork, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.5 + torch.rand(count, network.num_groups, generator=generator, dtype=torch.float64)


class Subject:
    """One network twice: `frozen` is what is tested; nothing of it takes part in what is expected.

    :param options: Arguments of `FrozenNetwork`.
    """

    def __init__(self, module: nn.Module, **options: Any):
        self.module, self.options = module, options
        self.frozen = FrozenNetwork(module, **options)
        self.group_by = options.get("group_by") or (lambda name: "")

    def explicit(self, x: Tensor) -> Tensor:
        """J at x (B, n, d), (B, n·C, P): each point by itself, by reverse mode."""
        options = {name: value for name, value in self.options.items() if name != "group_by"}
        return explicit_jacobian(copy.deepcopy(self.module).to(x.dtype), x, **options)

    def variances(self, count: int) -> Tensor:
        """(count, G)."""
        return variances_for(self.frozen, count)

    def weighted(self, J1: Tensor, J2: Tensor, variances: Tensor) -> Tensor:
        """J₁ Σ J₂ᵀ of explicit Jacobians."""
        names = self.frozen.parameter_names
        named = dict(self.module.named_parameters(remove_duplicate=False))
        labels = [self.group_by(name) for name in names for _ in range(named[name].numel())]
        order = list(dict.fromkeys(labels))
        return (J1 * variances[..., [order.index(label) for label in labels]].unsqueeze(-2)) @ J2.mT

    def check(self, x: Tensor, other: Tensor, tolerance: float = 1e-10) -> dict[str, str]:
        """Every operation of the structured engine, in float64; by what each parameter is served."""
        tolerances = {torch.float64: tolerance}
        return check_rule(self.module, x, other, allow_autodiff=True, tolerances=tolerances, **self.options)
