import copy
import pickle

import pytest
import torch
from torch import nn

from ntk_gp import NetworkMean
from tests import layers


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_network(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(), nn.Linear(8, outputs)).double()


@pytest.mark.parametrize("name", layers.NETWORKS)
def test_is_the_network(name):
    network, x = layers.make(name)
    torch.testing.assert_close(NetworkMean(network)(x), network(x).reshape(5).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (2, 4), (3, 2, 4)])
def test_shapes(shape):
    network = make_network(outputs=2).eval()
    x = randn(*shape, 3)
    expected = network(x.reshape(-1, 3)).reshape(*shape, 2).detach()
    assert torch.equal(NetworkMean(network, output="all")(x), expected)
    assert torch.equal(NetworkMean(network, output=1)(x), expected[..., 1])
    assert torch.equal(NetworkMean(network, output=-2)(x), expected[..., 0])


@pytest.mark.parametrize("forward", [lambda z: z.squeeze(-1), lambda z: z, lambda z: z.unsqueeze(-1)])
def test_networks_with_one_output_in_any_form(forward):
    network = layers.Custom(lambda self, x: forward(self.layer(x)), layer=nn.Linear(3, 1)).double()
    x = randn(5, 3)
    assert torch.equal(NetworkMean(network)(x), network.layer(x).squeeze(-1).detach())
    assert NetworkMean(network)(x[:1]).shape == (1,)


def test_one_dimensional_inputs():
    network = nn.Linear(1, 1).double()
    x = randn(5)
    assert torch.equal(NetworkMean(network)(x), network(x.unsqueeze(-1)).squeeze(-1).detach())


def test_input_shape_and_active_dims():
    network, x = layers.make("Conv2d")
    mean = NetworkMean(network[1:], input_shape=(1, 4, 4), active_dims=tuple(range(2, 18)))
    actual = mean(torch.cat([randn(5, 2), x], dim=-1))
    torch.testing.assert_close(actual, network(x).squeeze(-1).detach(), rtol=0, atol=1e-12)


def test_gradients_with_respect_to_the_inputs():
    network = make_network().eval()
    x = randn(5, 3).requires_grad_()
    (actual,) = torch.autograd.grad(NetworkMean(network)(x).sum(), x)
    (expected,) = torch.autograd.grad(network(x).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_no_parameters_and_always_in_eval_mode():
    network = make_network().train()
    mean, x = NetworkMean(network).train(), randn(5, 3)
    assert list(mean.parameters()) == []
    assert torch.equal(mean(x), copy.deepcopy(network).eval()(x).squeeze(-1).detach())
    assert not mean(x).requires_grad


def test_computes_in_the_dtype_of_the_inputs():
    network, x = make_network().eval(), randn(5, 3)
    mean = NetworkMean(copy.deepcopy(network).float())
    assert mean(x).dtype == torch.float64
    assert mean(x.float()).dtype == torch.float32
    torch.testing.assert_close(mean(x), network(x).squeeze(-1).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda mean: pickle.loads(pickle.dumps(mean))])
def test_copies(copied):
    mean, x = NetworkMean(make_network(), active_dims=(0, 1, 2)), randn(5, 3)
    expected = mean(x)
    other = copied(mean)
    assert torch.equal(other(x), expected)
    other.load_state_dict({k: v if v.dtype == torch.long else 2 * v for k, v in mean.state_dict().items()})
    assert not torch.allclose(other(x), expected)
    assert torch.equal(mean(x), expected)


def test_state_dict_and_linearize():
    network, x = make_network(), randn(5, 3)
    mean = NetworkMean(network)
    assert set(mean.state_dict()) == {f"network.tensors.{name}" for name in network.state_dict()}
    with torch.no_grad():
        network[0].weight.mul_(2.0)
    expected = network.eval()(x).squeeze(-1).detach()
    assert not torch.allclose(mean(x), expected)
    loaded = NetworkMean(make_network())
    loaded.load_state_dict(NetworkMean(network).state_dict())
    assert torch.equal(loaded(x), expected)
    mean.linearize(network)
    assert torch.equal(mean(x), expected)


def test_frozen_networks_are_means_too():
    network, x = make_network().eval().requires_grad_(False), randn(5, 3)
    assert torch.equal(NetworkMean(network)(x), network(x).squeeze(-1))


def test_networks_with_unregistered_tensors():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(3, 1)
            self.scale = torch.tensor(2.0)

        def forward(self, x):
            return super().forward(x) * self.scale

    network = Scaled()
    mean, x = NetworkMean(network), randn(5, 3)
    assert mean(x).dtype == torch.float64
    torch.testing.assert_close(
        mean(x), 2 * nn.functional.linear(x, network.weight.double(), network.bias.double()).squeeze(-1).detach()
    )
    network.scale.zero_()
    assert mean(x).abs().min() > 0


class TestReuse:
    """Values at the inputs that the last ones began with are kept: never stale, and no obstacle to anything."""

    @pytest.mark.parametrize("change", [lambda x: x.add_(0.5), lambda x: x.data.add_(0.5), lambda x: x[0].zero_()])
    def test_inputs_changed_in_place(self, change):
        network, x = make_network().eval(), randn(5, 3)
        mean = NetworkMean(network)
        mean(x), mean(torch.cat([x, randn(2, 3)])), mean(x)
        change(x)
        assert torch.equal(mean(x), network(x).squeeze(-1).detach())

    def test_results_changed_in_place(self):
        network, x = make_network().eval(), randn(5, 3)
        mean = NetworkMean(network)
        for _ in range(3):
            assert torch.equal(mean(x), network(x).squeeze(-1).detach())
            mean(x).add_(1.0)

    @pytest.mark.parametrize("output", [0, "all"])
    def test_growing_shrinking_and_other_inputs(self, output):
        network = make_network(outputs=2).eval()
        mean, x = NetworkMean(network, output=output), randn(9, 3)
        batches = torch.stack([torch.cat([x[:5], randn(2, 3)]) for _ in range(4)])
        for points in (x[:5], x, x[:7], x[3:], batches, x[:5], batches.transpose(0, 1), x[:0], x[:1], x, x.float(), x):
            expected = (
                copy.deepcopy(network).to(points.dtype)(points.reshape(-1, 3)).detach().reshape(*points.shape[:-1], 2)
            )
            actual = mean(points)
            assert actual.dtype == points.dtype
            torch.testing.assert_close(actual, expected if output == "all" else expected[..., 0], rtol=1e-6, atol=1e-6)

    def test_training_inputs_in_between_do_not_push_out_test_inputs(self, monkeypatch):
        """As of several draws of hyperparameters, each of which asks for both: the network is asked for once."""
        mean, x = NetworkMean(make_network().eval()), randn(20, 3)
        asked, values = [], mean.network.values
        monkeypatch.setattr(mean.network, "values", lambda x, *rest: asked.append(len(x)) or values(x, *rest))
        for _ in range(3):
            mean(x[:4]), mean(x)
        mean(torch.cat([x[:4], randn(7, 3)]))
        assert asked == [4, 16, 7]

    def test_made_in_inference_mode(self):
        network, x = make_network().eval(), randn(5, 3)
        mean = NetworkMean(network)
        with torch.inference_mode():
            mean(x[:3])
            mean(x)
        scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
        (mean(x) * scale).sum().backward()
        torch.testing.assert_close(scale.grad, network(x).squeeze(-1).detach(), rtol=0, atol=1e-12)

    def test_other_weights(self):
        network, x = make_network().eval(), randn(5, 3)
        mean = NetworkMean(network)
        before = mean(x)
        state = {name: 2 * v if v.is_floating_point() else v for name, v in mean.state_dict().items()}
        other = copy.deepcopy(mean)
        other.load_state_dict(state)
        assert not torch.allclose(other(x), before)
        assert torch.equal(mean(x), before)
        mean.load_state_dict(state)
        assert torch.equal(mean(x), other(x))
