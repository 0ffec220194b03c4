"""Networks whose rows depend on one another, however that is hidden at first: refused, in kernel and mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel

SIZES = [2, 3, 5, 9, 17, 33, 100, 1000]


class Mixing(nn.Module):
    """Mixes rows from a batch of so many rows on."""

    def __init__(self, mix: Callable[[Tensor], Tensor], beyond: int = 0):
        super().__init__()
        self.first, self.second, self.mix, self.beyond = nn.Linear(2, 8), nn.Linear(8, 1), mix, beyond

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(self.mix(h) if len(h) > self.beyond else h))


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "maximum": lambda h: h - h.amax(0),
    "neighbour": lambda h: h + h.roll(1, 0),
    "far neighbour": lambda h: h + h.roll(len(h) // 2, 0),
    "first row": lambda h: h + h[:1],
    "order": lambda h: h.flip(0),
}
MODULES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "structured": lambda network: gram_of(NTKKernel(network)),
    "autodiff": lambda network: gram_of(NTKKernel(network, engine="autodiff")),
    "mean": lambda network: NetworkMean(network),
}


def gram_of(kernel: NTKKernel) -> Callable[[Tensor], Tensor]:
    return lambda x: kernel(x).to_dense()


def inputs(n: int) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n", SIZES)
def test_from_the_first_batch_on(n, mix, module):
    with pytest.raises(ValueError, match="changes with the other rows"):
        MODULES[module](Mixing(MIXES[mix]).double())(inputs(n))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("beyond", [4, 8, 16, 60, 300])
def test_beyond_what_was_tried_first(beyond, mix, module):
    evaluate = MODULES[module](Mixing(MIXES[mix], beyond).double())
    evaluate(inputs(1)), evaluate(inputs(beyond))
    for n in (2 * beyond, 2 * beyond + 1):
        with pytest.raises(ValueError, match="changes with the other rows"):
            evaluate(inputs(n))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "order"])
@pytest.mark.parametrize("replicates", [4, 16, 20])
def test_behind_replicates(replicates, mix, module):
    x = inputs(20)
    x[:replicates] = x[0]
    with pytest.raises(ValueError, match="changes with the other rows"):
        MODULES[module](Mixing(MIXES[mix]).double())(x)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "order"])
def test_with_one_input(mix, module):
    """Others near it are tried."""
    with pytest.raises(ValueError, match="changes with the other rows"):
        MODULES[module](Mixing(MIXES[mix]).double())(inputs(1))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("n", SIZES)
def test_independent_rows_pass(n, module):
    evaluate = MODULES[module](Mixing(lambda h: h - h.mean(1, keepdim=True)).double())
    x = inputs(n)
    x[n // 2 :] = x[0]
    evaluate(x), evaluate(x.clone()), evaluate(x[:1])
