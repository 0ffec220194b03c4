"""Each snapshot of a network is tried by itself, at inputs of its own, once for each kind of them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.network import frozen


class Switched(nn.Module):
    """Mixes rows once it is told to, which its tensors do not show."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.mixes = nn.Linear(3, 8), nn.Linear(8, 1), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(h - h.mean(0) if self.mixes else h))


def mlp(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs))


@pytest.fixture
def trials(monkeypatch) -> list[torch.dtype]:
    """The dtypes of the rows of every trial from now on."""
    made: list[torch.dtype] = []

    class Counted(frozen.Trial):
        def __init__(self, function, rows, convert):
            made.append(rows.dtype)
            super().__init__(function, rows, convert)

    monkeypatch.setattr(frozen, "Trial", Counted)
    return made


class OwnPrecision(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.float())


@pytest.mark.parametrize("kernel_first", [True, False])
def test_a_precision_of_the_networks_own_is_found_out_by_each(kernel_first):
    network, x = OwnPrecision(), torch.randn(20, 3, dtype=torch.float64)
    first, second = (NTKKernel, NetworkMean) if kernel_first else (NetworkMean, NTKKernel)
    for make in (first, second, first):
        module = make(network)
        with pytest.warns(NumericalWarning, match="computes in torch.float32"):
            evaluate(module, x)
        evaluate(module, x[:5])  # tried again, in the precision that it has by now


class Log(nn.Module):
    """NaN at negative inputs."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.log(x))


class MixesNegative(Log):
    def forward(self, x: Tensor) -> Tensor:
        h = self.out(x)
        return h - h.mean(0) * (x.mean() < 0)


@pytest.mark.parametrize(
    ("make", "message"), [(Log, "NaN or infinite"), (MixesNegative, "changes with the other rows")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_looks_at_its_own_first_inputs(make, message, dtype):
    network, x = make(), torch.rand(16, 3) + 1
    NetworkMean(network)(x), evaluate(NTKKernel(network), x)
    with pytest.raises(ValueError, match=message):
        evaluate(NTKKernel(network), -x.to(dtype))
    with pytest.raises(ValueError, match=message):
        NetworkMean(network)(-x.to(dtype))


def test_other_numbers_of_rows_are_tried(trials):
    kernel = NTKKernel(mlp())
    for n in (2, 5, 20, 40):
        kernel(torch.randn(n, 3)).to_dense()
    assert len(trials) == 3


@pytest.mark.parametrize("mean_first", [True, False])
def test_a_module_that_has_changed_between_two_snapshots(mean_first):
    network, x = Switched(), torch.randn(20, 3)
    first, second = (NetworkMean, NTKKernel) if mean_first else (NTKKernel, NetworkMean)
    fine = first(network)
    network.mixes = True
    mixing = second(network)
    evaluate(fine, x)
    with pytest.raises(ValueError, match="changes with the other rows"):
        evaluate(mixing, x)


def evaluate(module: nn.Module, x: Tensor) -> None:
    out = module(x)
    out if isinstance(out, Tensor) else out.to_dense()


def test_what_is_warned_of_is_found_out_by_each():
    network, x = Unused(), torch.randn(20, 3)
    for module in (NetworkMean(network), NTKKernel(network)):
        with pytest.warns(UserWarning, match="does not depend on its parameters unused"):
            evaluate(module, x)


class Unused(nn.Linear):
    """Holds a constant, and a parameter without influence."""

    def __init__(self):
        super().__init__(3, 1)
        self.unused, self.constant = nn.Parameter(torch.ones(2)), torch.ones(2)


def test_copies_and_pickles_are_as_good_as_new(trials):
    network, x = mlp(), torch.randn(20, 3)
    kernel = NTKKernel(network)
    evaluate(kernel, x)
    evaluate(copy.deepcopy(kernel), x)
    assert len(trials) == 1
    evaluate(pickle.loads(pickle.dumps(kernel)), x)
    assert len(trials) == 2
