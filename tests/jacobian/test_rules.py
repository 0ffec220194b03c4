"""Every rule alone, with shapes drawn at random, against explicit Jacobians in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ntk_gp
from ntk_gp.jacobian.rules import UnsupportedUse, Use, register_rule
from ntk_gp.jacobian.rules.registry import _RULES
from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.network import FrozenNetwork
from tests.jacobian.explicit import Subject, assert_close

few = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
size = st.integers(1, 4)


class Network(nn.Module):
    """One call with parameters in it, the inputs reshaped before, the result mixed nonlinearly to C outputs after."""

    def __init__(self, shape: tuple[int, ...], call: Callable[..., Tensor], outputs: int, **parameters: Tensor):
        super().__init__()
        self.shape = shape
        self.call = call
        self.outputs = outputs
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value.double()))

    def forward(self, x: Tensor) -> Tensor:
        z = self.call(self, x.reshape(-1, *self.shape))
        flat = torch.tanh(z).reshape(x.shape[0], -1)
        phases = torch.arange(flat.shape[1] * self.outputs, dtype=x.dtype).reshape(-1, self.outputs)
        return torch.sin(flat @ phases.cos()) + flat.square() @ phases.sin()


def check(
    shape: tuple[int, ...],
    call: Callable[..., Tensor],
    draw: st.DataObject,
    served: bool = True,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
    **parameters: tuple[int, ...],
) -> None:
    """Builds the network with random parameters of these shapes, some of them selected, and compares everything."""
    generator = torch.Generator().manual_seed(draw.draw(st.integers(0, 100)))
    values = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in parameters.items()}
    selected = draw.draw(st.lists(st.sampled_from(sorted(values)), min_size=1, unique=True))
    outputs = draw.draw(st.integers(1, 3))
    network = Subject(Network(shape, call, outputs, **values).eval(), parameters=selected, output="all")
    width = int(torch.tensor(shape).prod())
    n = draw.draw(st.integers(1, 4))
    x = transform(torch.randn(1, n, width, generator=generator, dtype=torch.float64))
    other = transform(torch.randn(1, draw.draw(st.integers(1, n)), width, generator=generator, dtype=torch.float64))
    by = network.check(x, other)
    if served:
        assert "autodiff" not in by.values()


@few
@given(st.data(), st.lists(size, max_size=2), size, size)
def test_linear(data, positions, d_in, d_out):
    check(
        (*positions, d_in),
        lambda net, x: F.linear(x, net.weight, net.bias),
        data,
        weight=(d_out, d_in),
        bias=(d_out,),
    )


@few
@given(st.data(), st.integers(1, 3))
def test_convolution(data, dims):
    draw = data.draw
    groups, c_in, c_out = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    same = draw(st.booleans())
    stride: list[int] = [1] * dims if same else [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = "same" if same else [draw(st.integers(0, 2)) for _ in range(dims)]
    length = [(k - 1) * d + draw(st.integers(1, 3)) for k, d in zip(kernel, dilation, strict=True)]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    check(
        (groups * c_in, *length),
        lambda net, x: convolve(x, net.weight, net.bias, stride, padding, dilation, groups),
        data,
        weight=(groups * c_out, c_in, *kernel),
        bias=(groups * c_out,),
    )


@few
@given(st.data(), st.integers(1, 3))
def test_transposed_convolution(data, dims):
    draw = data.draw
    groups, c_in, c_out = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [draw(st.integers(0, min(1, (k - 1) * d))) for k, d in zip(kernel, dilation, strict=True)]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    length = [draw(st.integers(2, 3)) for _ in range(dims)]
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    check(
        (groups * c_in, *length),
        lambda net, x: convolve(x, net.weight, net.bias, stride, padding, extra, groups, dilation),
        data,
        weight=(groups * c_in, c_out, *kernel),
        bias=(groups * c_out,),
    )


@few
@given(st.data(), st.lists(size, min_size=1, max_size=2), st.integers(2, 6), size, st.booleans())
def test_embedding(data, positions, vocabulary, d, padded):
    padding = data.draw(st.integers(-vocabulary, vocabulary - 1)) if padded else None
    check(
        tuple(positions),
        lambda net, x: F.embedding(x.long(), net.weight, padding_idx=padding),
        data,
        transform=lambda x: (x.abs() * 2).clamp(max=vocabulary - 1).floor(),
        weight=(vocabulary, d),
    )


@few
@given(st.data(), st.lists(size, max_size=2), st.lists(st.integers(2, 4), min_size=1, max_size=2))
def test_layer_and_rms_norm(data, positions, normalised):
    shape = tuple(normalised)
    if data.draw(st.booleans()):
        check(
            (*positions, *shape),
            lambda net, x: F.layer_norm(x, shape, net.weight, net.bias, 1e-3),
            data,
            weight=shape,
            bias=shape,
        )
    else:
        check((*positions, *shape), lambda net, x: F.rms_norm(x, shape, net.weight, 1e-3), data, weight=shape)


@few
@given(st.data(), st.integers(1, 3), st.integers(1, 2), st.lists(st.integers(2, 3), min_size=1, max_size=2))
def test_norms_by_channel(data, per_group, groups, positions):
    channels = per_group * groups
    mean, variance = torch.linspace(-1, 1, channels).double(), torch.linspace(0.5, 2, channels).double()
    call = data.draw(
        st.sampled_from(
            [
                lambda net, x: F.group_norm(x, groups, net.weight, net.bias, 1e-3),
                lambda net, x: F.batch_norm(x, mean, variance, net.weight, net.bias),
                lambda net, x: F.instance_norm(x, None, None, net.weight, net.bias, eps=1e-3),
                lambda net, x: F.instance_norm(x, mean, variance, net.weight, net.bias, False),
            ]
        )
    )
    check((channels, *positions), call, data, weight=(channels,), bias=(channels,))


@few
@given(st.data(), st.lists(size, min_size=1, max_size=3))
def test_elementwise(data, shape):
    kept = [data.draw(st.booleans()) for _ in shape]
    first = data.draw(st.integers(0, len(shape) - 1))
    leading = data.draw(st.booleans()) and first == 0
    parameter = tuple(n if keep else 1 for n, keep in zip(shape[first:], kept[first:], strict=True))
    parameter = (1, *parameter) if leading else parameter
    call = data.draw(
        st.sampled_from(
            [
                lambda net, x: x + net.weight,
                lambda net, x: net.weight + x,
                lambda net, x: torch.add(x, net.weight, alpha=3),
                lambda net, x: x - net.weight,
                lambda net, x: torch.sub(net.weight, x, alpha=0.5),
                lambda net, x: x * net.weight,
                lambda net, x: net.weight.mul(x),
                lambda net, x: x.sin().add_(net.weight).cos(),
                lambda net, x: x * net.weight.expand(x.shape),
            ]
        )
    )
    check(tuple(shape), call, data, weight=parameter)


@few
@given(st.data(), size, size, size, st.integers(1, 2))
def test_raw_matrices(data, d_in, d_out, positions, heads):
    calls = [
        ((positions, d_in), lambda net, x: x @ net.weight, (d_in, d_out)),
        ((positions, d_in), lambda net, x: x.matmul(net.weight.T), (d_out, d_in)),
        ((d_in, positions), lambda net, x: net.weight @ x, (d_out, d_in)),
        ((positions, d_in), lambda net, x: x @ net.weight, (d_in,)),
        ((heads, positions, d_in), lambda net, x: x @ net.weight, (heads, d_in, d_out)),
        ((d_in,), lambda net, x: torch.mm(x, net.weight), (d_in, d_out)),
    ]
    shape, call, weight = data.draw(st.sampled_from(calls))
    check(shape, call, data, weight=weight)


@few
@given(st.data(), size, size)
def test_addmm(data, d_in, d_out):
    check(
        (d_in,),
        lambda net, x: torch.addmm(net.bias, x, net.weight, beta=2, alpha=0.5),
        data,
        weight=(d_in, d_out),
        bias=(d_out,),
    )


@few
@given(st.data(), st.integers(1, 3), st.lists(size, max_size=2), st.booleans())
def test_prelu(data, channels, positions, single):
    check(
        (channels, *positions),
        lambda net, x: F.prelu(x, net.weight),
        data,
        weight=(1 if single else channels,),
    )


@few
@given(st.data(), st.lists(size, max_size=1), size, size)
def test_bilinear(data, positions, d, d_out):
    check(
        (*positions, d),
        lambda net, x: F.bilinear(x, x.sin(), net.weight, net.bias),
        data,
        weight=(d_out, d, d),
        bias=(d_out,),
    )


@few
@given(st.data(), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.booleans())
def test_attention(data, heads, per_head, length, same):
    width = heads * per_head
    attention = nn.MultiheadAttention(width, heads, batch_first=True).double()
    shapes = {name.replace(".", "_"): tuple(p.shape) for name, p in attention.named_parameters()}
    causal = torch.ones(length, length, dtype=torch.bool).triu(1) if data.draw(st.booleans()) else None
    weights_wanted = data.draw(st.booleans())

    def call(net: nn.Module, x: Tensor) -> Tensor:
        query = x.transpose(0, 1)
        keys = query if same else query.sin()
        return F.multi_head_attention_forward(
            query, keys, keys, width, heads, net.in_proj_weight, net.in_proj_bias, None, None, False, 0.0,
            net.out_proj_weight, net.out_proj_bias, False, need_weights=weights_wanted, attn_mask=causal,
        )[0].transpose(0, 1)  # fmt: skip

    check((length, width), call, data, **shapes)


def test_a_rule_that_is_wrong_is_found_out():
    scale = torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))(lambda x, weight: x * weight.exp())
    register_rule(scale, lambda use, x, weight: use.features(weight, use.gradients * x.unsqueeze(1)), elementwise=True)
    try:
        network = Subject(Network((3,), lambda net, x: scale(x, net.weight), 1, weight=torch.ones(3)).eval())
        x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 2, 3)
        assert network.check(x, x[:, :1]) == {"weight": "autodiff"}
    finally:
        del _RULES[scale]


class Gated(nn.Module):
    """A scale, and a gate that lets it through at positive inputs only; the scale may have another use beside it."""

    def __init__(self, scale: Callable, tied: bool):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))
        self.scale = scale
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        gated = F.relu(self.scale(x, self.weight) * (x > 0))
        return self.linear(gated + (x * self.weight if self.tied else x)).sum(-1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_a_wrong_rule_is_found_out_where_it_first_makes_a_difference(tied, budget):
    scale = torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))(lambda x, weight: x * weight.exp())
    register_rule(scale, lambda use, x, weight: use.features(weight, use.gradients * x.unsqueeze(1)), elementwise=True)
    try:
        network = Subject(Gated(scale, tied).double())
        engine = StructuredEngine(network.frozen)
        generator = torch.Generator().manual_seed(0)
        dead = -torch.rand(1, 20, 3, dtype=torch.float64, generator=generator)
        alive = torch.rand(1, 20, 3, dtype=torch.float64, generator=generator)
        before = engine.linearize(dead)
        assert [e["parameter"] for e in before.report() if e["served_by"] == "autodiff"] == []
        x = torch.cat([dead, alive], dim=1)
        with ntk_gp.settings.memory_budget(budget):
            after = engine.linearize(x)
            assert_close(after.rows(), network.explicit(x))
            weights = torch.ones(1, 1, dtype=torch.float64)
            assert_close(before.gram(after, weights), network.explicit(dead) @ network.explicit(x).mT)
            assert_close(after.gram(after, weights), network.explicit(x) @ network.explicit(x).mT)
        assert [e["parameter"] for e in after.report() if e["served_by"] == "autodiff"] == ["weight"]
        assert_close(engine.linearize(alive).rows(), network.explicit(alive))
    finally:
        del _RULES[scale]


@pytest.mark.parametrize("error", [UnsupportedUse("not this one")])
def test_a_rule_may_decline(error):
    function = torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))(lambda x, weight: x * weight)

    def decline(use: Use, x: Tensor, weight: Tensor):
        raise error

    register_rule(function, decline)
    try:
        network = FrozenNetwork(Network((3,), lambda net, x: function(x, net.weight), 1, weight=torch.ones(3)).eval())
        jacobian = StructuredEngine(network).linearize(torch.ones(1, 2, 3, dtype=torch.float64))
        assert jacobian.report()[0]["served_by"] == "autodiff"
    finally:
        del _RULES[function]
