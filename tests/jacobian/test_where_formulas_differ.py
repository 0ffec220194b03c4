"""Points at which an operator's formulas for forward and reverse mode differ: products are those of reverse mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ntk_gp.jacobian.autodiff import AutodiffEngine
from ntk_gp.network import FrozenNetwork


class Layers(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 6), nn.Linear(6, 1), between
        nn.init.zeros_(self.first.bias)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


OPERATIONS = {
    "atan2": lambda h: torch.atan2(h, h.flip(-1)),
    "prelu": lambda h: F.prelu(h, torch.full((1,), 0.2, dtype=h.dtype)),
    "relu": torch.relu,
    "abs": torch.abs,
    "hardtanh": lambda h: F.hardtanh(h, 0.0, 1.0),
    "maximum": lambda h: torch.maximum(h, -h),
    "amax": lambda h: h.exp() * h.amax(-1, keepdim=True),
    "max_pool": lambda h: F.max_pool1d(h[:, None], 2)[:, 0].repeat(1, 2),
    "norm": lambda h: h.exp() * torch.linalg.vector_norm(h, dim=-1, keepdim=True),
    "std": lambda h: h.exp() * h.std(-1, keepdim=True),
    "prod": lambda h: h.exp() * h.prod(-1, keepdim=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_products_at_zeros_beyond_the_first_points(name):
    torch.manual_seed(0)
    network = Layers(OPERATIONS[name]).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    x[3], x[5] = 0.0, 0.0  # neither first, last nor in the middle
    expected = []
    for point in x:
        gradients = torch.autograd.grad(network(point[None])[0, 0], list(network.parameters()))
        expected.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    J = torch.stack(expected)
    if not J.isfinite().all():
        pytest.skip("by this torch, there is no derivative at zero")
    u = torch.randn(1, 2, J.shape[1], dtype=x.dtype)
    jacobian = AutodiffEngine(FrozenNetwork(network)).linearize(x.unsqueeze(0))
    torch.testing.assert_close(jacobian.jvp(u)[0], u[0] @ J.mT, rtol=1e-10, atol=1e-10)
