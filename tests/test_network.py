import copy
import gc
import pickle

import pytest
import torch
from torch import nn

from ntk_gp.network import FrozenNetwork
from ntk_gp.network.skeleton import Skeletons
from tests import layers


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, outputs)).double()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def probed(network: FrozenNetwork, x: torch.Tensor):
    network.check(x)
    return network.function(x.dtype, x.device)


def test_tensors_are_buffers_with_the_networks_names():
    network = make_network()
    frozen = FrozenNetwork(network)
    assert list(frozen.parameters()) == []
    assert set(frozen.state_dict()) == {f"tensors.{name}" for name in network.state_dict()}
    for name, tensor in network.state_dict().items():
        assert torch.equal(frozen.state_dict()[f"tensors.{name}"], tensor)
        assert frozen.state_dict()[f"tensors.{name}"].data_ptr() != tensor.data_ptr()


def test_names_that_modules_use_themselves():
    """`register_buffer` refuses some names that a network may have."""
    network = layers.Custom(lambda self, x: x @ self.dump_patches + self.T_destination, dump_patches=None)
    del network.dump_patches
    network._parameters["dump_patches"] = nn.Parameter(randn(3, 1))
    network._parameters["T_destination"] = nn.Parameter(randn(1))
    network.function = lambda self, x: x @ self._parameters["dump_patches"] + self._parameters["T_destination"]
    x = randn(5, 3)
    torch.testing.assert_close(FrozenNetwork(network)(x), network(x).squeeze(-1).detach())


def test_split_and_flatten_are_inverses():
    function = probed(FrozenNetwork(make_network()), randn(5, 3))
    flat = randn(2, 5, function.num_parameters)
    pieces = function.split(flat)
    assert [piece.shape[2:] for piece in pieces.values()] == [tensor.shape for tensor in function.parameters.values()]
    assert torch.equal(function.flatten(pieces), flat)
    assert function.num_parameters == sum(function.sizes) == sum(p.numel() for p in make_network().parameters())


def test_restrict():
    network, x = make_network(), randn(5, 3)
    function = probed(FrozenNetwork(network, group_by=lambda name: name.split(".")[0]), x)
    restricted = function.restrict(["3.weight", "0.bias"])
    assert list(restricted.parameters) == ["0.bias", "3.weight"]  # in the network's order
    assert restricted.num_parameters == 8
    assert restricted.group_indices == (0, 2)
    with function.tracing():
        assert torch.equal(restricted(restricted.parameters, x), function(function.parameters, x))


def test_expand_weights():
    function = probed(FrozenNetwork(make_network(), group_by=lambda name: name.split(".")[-1]), randn(5, 3))
    expanded = function.expand_variances(torch.tensor([[1.0, 2.0]]))
    expected = [1.0] * 12 + [2.0] * 4 + [1.0] * 4 + [2.0] * 4 + [1.0] * 4 + [2.0]
    assert torch.equal(expanded, torch.tensor([expected]))


def test_a_call_never_falls_back_on_stale_weights():
    """The skeleton's own tensors are on the meta device: what a call fails to replace cannot be computed with."""
    with Skeletons(FrozenNetwork(make_network())._skeleton[0], {}).lent({}) as skeleton:
        assert all(tensor.is_meta for tensor in [*skeleton.parameters(), *skeleton.buffers()])
        with pytest.raises((RuntimeError, NotImplementedError)):
            skeleton(randn(5, 3)).sum().item()


class TestFingerprint:
    def test_the_same_while_nothing_changes(self):
        frozen = FrozenNetwork(make_network())
        first = frozen.fingerprint()
        frozen(randn(5, 3)), frozen.train(), frozen.eval(), frozen.to(torch.float64), copy.deepcopy(frozen)
        assert frozen.fingerprint() == first

    @pytest.mark.parametrize(
        "change",
        [
            lambda frozen: frozen.float(),
            lambda frozen: frozen.load_state_dict(frozen.state_dict()),
            lambda frozen: frozen.get_buffer("tensors.0.weight").add_(1.0),
            lambda frozen: frozen.get_submodule("tensors.0")._buffers.update(bias=torch.zeros(4).double()),
        ],
    )
    def test_new_with_each_change(self, change):
        frozen = FrozenNetwork(make_network())
        seen = {frozen.fingerprint()}
        for _ in range(3):
            change(frozen)
            if frozen.dtype == torch.float32:
                seen.add(frozen.fingerprint())
                frozen.double()
            assert frozen.fingerprint() not in seen
            seen.add(frozen.fingerprint())

    def test_never_shared_by_two_networks(self):
        assert FrozenNetwork(make_network()).fingerprint() != FrozenNetwork(make_network()).fingerprint()

    def test_a_copy_shares_it_until_it_changes(self):
        frozen = FrozenNetwork(make_network())
        first = frozen.fingerprint()
        other = copy.deepcopy(frozen)
        assert other.fingerprint() == first
        other.load_state_dict(frozen.state_dict())
        assert other.fingerprint() != first
        assert frozen.fingerprint() == first


def test_loading_into_a_copy_leaves_the_original():
    frozen = FrozenNetwork(make_network())
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    other = copy.deepcopy(frozen)
    assert other.get_buffer("tensors.0.weight") is frozen.get_buffer("tensors.0.weight")
    other.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    for name, tensor in frozen.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_converted_tensors_are_made_once():
    frozen, x = FrozenNetwork(make_network()), randn(5, 3)
    assert probed(frozen, x.float()) is probed(frozen, x.float())
    assert probed(frozen, x.float()) is not probed(frozen, x)
    old = probed(frozen, x)
    frozen.load_state_dict(frozen.state_dict())
    assert probed(frozen, x) is not old


def test_buffers_that_the_network_writes_to():
    """A counter in a buffer: calls must not change the snapshot."""

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    frozen = FrozenNetwork(Counting())
    frozen(torch.randn(5, 3))
    frozen(torch.randn(5, 3))
    assert frozen.get_buffer("tensors.calls") == 0


@pytest.mark.parametrize("fails", [False, True])
def test_tracing_restores_what_it_sets(fails):
    network, x = layers.make("LSTM")
    function = probed(FrozenNetwork(network), x)
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(), torch.is_autocast_enabled("cpu")
    try:
        with torch.autocast("cpu"), function.tracing(input_gradients=True):
            assert not torch.is_autocast_enabled("cpu")
            assert not torch._C._get_mkldnn_enabled()
            if fails:
                raise KeyError
    except KeyError:
        pass
    after = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(), torch.is_autocast_enabled("cpu")
    assert after == before


def test_renewed_keeps_the_options():
    network = make_network(outputs=2)
    frozen = FrozenNetwork(network, parameters="3.*", output=1, group_by=lambda name: name)
    with torch.no_grad():
        network[3].bias.add_(1.0)
    renewed, x = frozen.renewed(network), randn(5, 3)
    assert renewed.parameter_names == ("3.weight", "3.bias")
    assert renewed.group_names == ("3.weight", "3.bias")
    torch.testing.assert_close(renewed(x), frozen(x) + 1.0)


def test_pickle_drops_what_can_be_made_again():
    frozen, x = FrozenNetwork(make_network()), randn(5, 3)
    small = len(pickle.dumps(frozen))
    expected = frozen(x)
    frozen(x.float())
    assert len(pickle.dumps(frozen)) == small
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), expected)


def test_bytes_per_point_grow_with_the_activations():
    narrow, wide = (nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double() for width in (10, 1000))
    small, large = (probed(FrozenNetwork(network), randn(5, 3)).bytes_per_point for network in (narrow, wide))
    assert 50 * small < large
    assert 8 * 1000 <= large <= 10 * 8 * 1000


def test_the_random_state_is_untouched_by_networks_that_draw():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.0 * torch.randn(1)

    frozen, x = FrozenNetwork(Noisy(3, 1)), torch.randn(5, 3)
    state = torch.get_rng_state()
    frozen.check(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_trying_a_network_leaves_no_memory_behind():
    """A result whose graph holds itself is never freed."""
    frozen, x = FrozenNetwork(nn.Sequential(nn.Linear(3, 77), nn.Tanh(), nn.Linear(77, 1)).double()), randn(5, 3)

    def alive() -> int:
        gc.collect()
        tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
        return sum(77 in tensor.shape for tensor in tensors)

    frozen.check(x)
    before = alive()
    for n in (1, 2, 5, 9, 17):
        frozen.check(randn(n, 3))
    assert alive() == before
