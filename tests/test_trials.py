"""Mean and kernel of one network try it once between them, and each by itself where they may not be the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.network import frozen
from tests import references


class Switched(nn.Module):
    """Mixes rows once it is told to, which its tensors do not show."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.mixes = nn.Linear(3, 8), nn.Linear(8, 1), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.tanh(h - h.mean(0) if self.mixes else h))


class Unpicklable(Switched):
    def __init__(self):
        super().__init__()
        self.activation = lambda h: h.tanh()


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


@pytest.mark.parametrize("kernel_first", [True, False])
def test_one_trial_serves_mean_and_kernel_in_both_precisions(kernel_first, trials):
    network, x = mlp(), torch.randn(20, 3)
    modules = [NTKKernel(network), NetworkMean(network)]
    for module in modules if kernel_first else modules[::-1]:
        module(x)
    kernel, mean = modules
    gram, values = kernel(x.double()).to_dense(), mean(x.double())
    assert trials == [torch.float32]
    exact = network.double()
    torch.testing.assert_close(gram, references.kernel(exact, x.double()), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values, exact(x.double()).squeeze(-1).detach(), rtol=1e-12, atol=1e-13)


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


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda mean, kernel: None, 1),
        (lambda mean, kernel: mean.network.tensors.get_buffer("0.weight").data.mul_(2.0), 2),
        (lambda mean, kernel: kernel.network.load_state_dict(doubled(kernel.network)), 2),
        (lambda mean, kernel: kernel.linearize(mlp()), 2),
    ],
    ids=["the same", "edited in place", "loaded", "of another network"],
)
def test_tensors_that_have_changed_are_tried_anew(change: Callable, expected: int, trials):
    network, x = mlp(), torch.randn(20, 3)
    mean, kernel = NetworkMean(network), NTKKernel(network)
    mean(x)
    change(mean, kernel)
    evaluate(kernel, x)
    assert len(trials) == expected


def doubled(module: nn.Module) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in module.state_dict().items()}


def test_other_options_are_tried_by_themselves(trials):
    network, x = mlp(outputs=2), torch.randn(20, 3)
    NetworkMean(network, output=0)(x)
    evaluate(NTKKernel(network, output=1), x)
    evaluate(NTKKernel(network, output=0, parameters="2.*"), x)
    assert len(trials) == 3
    evaluate(NTKKernel(network, output=0, variance_groups="layer"), x)
    assert len(trials) == 3


def test_what_cannot_be_compared_is_tried_by_itself(trials):
    network, x = Unpicklable(), torch.randn(20, 3)
    NetworkMean(network)(x), evaluate(NTKKernel(network), x)
    assert len(trials) == 2


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
