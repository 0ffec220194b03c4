"""Kernels of one network share what is computed; each is independent of the others all the same."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from ntk_gp import NTKKernel, TangentMaternKernel
from ntk_gp.jacobian.shared import linearization_of
from tests import references
from tests.in_threads import in_threads


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


def state(kernel: NTKKernel) -> int:
    return kernel.network.fingerprint(thorough=True)


def share(one: NTKKernel, other: NTKKernel) -> bool:
    """Whether what one computes is found by the other."""
    x = randn(5, 3).to(one.dtype)
    found = one._linearization.keep("test", (x,), lambda copied: copied + 1)
    return other._linearization.keep("test", (x,), lambda copied: copied + 1) is found


def matches(kernel: NTKKernel, network: nn.Module) -> bool:
    x = randn(4, 3)
    return torch.allclose(kernel(x).to_dense(), references.kernel(network, x), rtol=0, atol=1e-9)


class TestWhatIsShared:
    def test_same_network_and_options(self):
        network = make_network()
        one, other = NTKKernel(network), NTKKernel(network, parameters="*")
        assert share(one, other)
        assert share(one, TangentMaternKernel(network))
        assert one.network is not other.network
        assert one.network.fingerprint() == other.network.fingerprint()
        x = randn(5, 3)
        ones = [kernel._linearization.jacobian(x.unsqueeze(0)) for kernel in (one, other)]
        assert ones[0] is ones[1]

    @pytest.mark.names_engine
    @pytest.mark.parametrize(
        "options",
        [
            {"parameters": "2.*"},
            {"output": 0},
            {"variance_groups": "layer"},
            {"engine": "autodiff"},
            {"input_shape": (3,)},
        ],
        ids=str,
    )
    def test_not_with_other_options(self, options):
        network = make_network()
        one = NTKKernel(network)
        assert not share(one, NTKKernel(network, **options))
        assert share(one, NTKKernel(network))

    def test_after_the_first_kernel_is_gone(self):
        network = make_network()
        one, other = NTKKernel(network), NTKKernel(network)
        del one
        gc.collect()
        assert share(other, NTKKernel(network))

    def test_groups_are_shared_among_those_that_have_them(self):
        network = make_network()
        one, other = (NTKKernel(network, variance_groups="layer") for _ in range(2))
        assert share(one, other)

    def test_not_another_network_that_is_equal(self):
        network = make_network()
        one = NTKKernel(network)
        assert not share(one, NTKKernel(copy.deepcopy(network)))

    @pytest.mark.parametrize("edit", ["parameter", "data", "attribute", "activation", "flag"])
    def test_not_a_network_that_has_changed(self, edit):
        network = make_network()
        network.scale = 1.0
        one = NTKKernel(network)
        before = copy.deepcopy(network)
        if edit == "parameter":
            with torch.no_grad():
                network[0].weight.mul_(2)
        elif edit == "data":
            network[2].weight.data[0, 0] += 1.0
        elif edit == "attribute":
            network.scale = 2.0
        elif edit == "activation":
            network[1] = nn.Softplus(beta=3.0)
        else:
            network[2].weight.requires_grad_(False)
        other = NTKKernel(network)
        assert not share(one, other)
        assert matches(one, before)
        assert matches(other, network)

    def test_an_activation_with_another_number(self):
        network = make_network()
        network[1] = nn.Softplus(beta=1.0)
        one = NTKKernel(network)
        network[1].beta = 3.0
        other = NTKKernel(network)
        assert not share(one, other)
        assert matches(other, network)

    def test_a_selection_by_a_function_is_kept_for_the_next_network(self):
        network = make_network()
        one = NTKKernel(network)
        other = NTKKernel(network, parameters=lambda name, _: True)
        assert share(one, other)
        network[0].requires_grad_(False)
        one.linearize(network)
        other.linearize(network)
        assert one.network.parameter_names == ("2.weight", "2.bias")
        assert len(other.network.parameter_names) == 4


class TestIndependence:
    """What is done to one kernel does not reach the other."""

    def make(self) -> tuple[NTKKernel, NTKKernel, nn.Module]:
        network = make_network()
        one, other = NTKKernel(network), NTKKernel(network)
        x = randn(5, 3)
        one(x).to_dense()
        other(x).to_dense()
        return one, other, network

    def test_conversion(self):
        one, other, network = self.make()
        one.float()
        assert (one.dtype, other.dtype) == (torch.float32, torch.float64)
        assert matches(other, network)

    def test_loading(self):
        one, other, network = self.make()
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed[0].weight.add_(0.1)
        one.load_state_dict(NTKKernel(changed).state_dict())
        assert matches(one, changed)
        assert matches(other, network)
        assert not share(one, other)

    def test_another_network(self):
        one, other, network = self.make()
        torch.manual_seed(1)
        changed = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        one.linearize(changed)
        assert matches(one, changed)
        assert matches(other, network)

    def test_copies_and_pickles(self):
        one, other, network = self.make()
        copied, loaded = copy.deepcopy((one, other)), pickle.loads(pickle.dumps((one, other)))
        for kernel in (*copied, *loaded):
            assert matches(kernel, network)
        assert not share(loaded[0], one)


class TestStates:
    """Snapshots that come to share other tensors are in one state again."""

    def test_both_converted(self):
        network = make_network().float()
        one, other = NTKKernel(network), NTKKernel(network)
        one.double()
        assert state(one) != state(other)
        other.double()
        assert state(one) == state(other)
        assert share(one, other)

    def test_both_loaded(self):
        network = make_network()
        one, other = NTKKernel(network), NTKKernel(network)
        loaded = {name: tensor + 1 for name, tensor in one.state_dict().items()}
        one.load_state_dict(loaded)
        assert state(one) != state(other)
        other.load_state_dict(loaded)
        assert state(one) == state(other)

    def test_both_linearized_again(self):
        network = make_network()
        one, other = NTKKernel(network), TangentMaternKernel(network)
        with torch.no_grad():
            network[0].weight.mul_(2)
        one.linearize(network)
        assert not share(one, other)
        other.linearize(network)
        assert share(one, other)

    def test_edits_that_leave_no_trace_are_seen_by_both(self):
        network = make_network()
        one, other = NTKKernel(network), NTKKernel(network)
        before = state(one)
        tensor = one.network.get_buffer("tensors.0.weight")
        tensor.data[0, 0] += 1.0
        assert state(one) == state(other) != before
        tensor.data[0, 0] += 1.0
        assert state(one) == state(other) != before

    def test_converted_to_and_fro(self):
        network, x = make_network(), randn(4, 3)
        with torch.no_grad():
            network[0].weight.add_(1e-9)  # what single precision does not hold
        one, other = NTKKernel(network), NTKKernel(network)
        one.float().double()
        rounded = copy.deepcopy(network).float().double()
        assert matches(one, rounded)
        assert matches(other, network)
        assert not one(x).to_dense().equal(other(x).to_dense())


def test_nothing_is_kept_alive():
    network = make_network()
    one = linearization_of(network)
    other = linearization_of(network)
    references_to = [weakref.ref(each) for each in (one, other, one.network, other.network, network)]
    del one, other
    gc.collect()
    assert [reference() for reference in references_to[:4]] == [None] * 4
    del network
    gc.collect()
    assert references_to[4]() is None


def test_made_in_several_threads():
    network = make_network()
    kernels: list[NTKKernel | None] = [None] * 4

    def work(number: int) -> None:
        kernels[number] = NTKKernel(network)
        kernels[number](randn(5, 3)).to_dense()

    in_threads(work)
    assert all(matches(kernel, network) for kernel in kernels)
    another = NTKKernel(network)
    assert any(share(kernel, another) for kernel in kernels)


def test_the_oldest_is_shared():
    """Whatever their addresses are: ranks that share must take the same one."""
    net = make_network()
    kernels = [NTKKernel(net) for _ in range(8)]
    for kernel in kernels[1:]:
        kernel._linearization.clear()
    assert NTKKernel(net)._linearization._cache is kernels[0]._linearization._cache
    assert NTKKernel(net)._linearization._cache is kernels[0]._linearization._cache
