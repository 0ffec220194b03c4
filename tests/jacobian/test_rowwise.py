"""What autograd's graph is trusted to tell: that rows stay apart, never where they do not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntk_gp.jacobian.structured import rowwise
from ntk_gp.jacobian.structured.layout import compare_layouts
from ntk_gp.jacobian.structured.record import record
from ntk_gp.jacobian.structured.rowwise import keeps_rows_apart
from ntk_gp.network import FrozenNetwork, nodes_below

N = 6  # points; so many units, channels and positions as well, that shapes do not tell dimensions apart


class Body(nn.Module):
    """A layer in, a function of the features (n, N), and their mean."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second = nn.Linear(2, N), nn.Linear(N, N)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.second(torch.tanh(self.first(x)))).reshape(len(x), -1).mean(1, keepdim=True)


def image(h: Tensor) -> Tensor:
    return h.view(len(h), 1, 1, N) * torch.ones(1, 2, 4, 1, dtype=h.dtype)


KERNEL = torch.linspace(-1, 1, 2 * 2 * 2 * 2, dtype=torch.float64).view(2, 2, 2, 2)
ELEMENTWISE = (
    torch.abs, torch.cos, torch.erf, torch.exp, torch.expm1, torch.relu, torch.sigmoid, torch.sin, torch.tanh,
    torch.neg, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid, F.mish, F.silu,
    F.softplus, F.relu6, lambda h: h.square().log(), lambda h: h.square().log1p(), lambda h: 1 / h, lambda h: 3 - h,
    lambda h: h.clone() ** 3, lambda h: h.square().sqrt(), lambda h: h.square().rsqrt(), lambda h: h.clamp(-0.5, 0.5),
    lambda h: h.clamp_min(0.1), lambda h: h.clamp_max(0.1), lambda h: h * h - h / (h.square() + 1) + 1,
    lambda h: h * h[:, :1], lambda h: h.float(), lambda h: F.threshold(h, 0.1, 0.0), lambda h: h.reciprocal(),
)  # fmt: skip
APART = (
    *ELEMENTWISE, lambda h: h.softmax(1), lambda h: h.log_softmax(-1), lambda h: F.layer_norm(h, (N,)),
    lambda h: h.mean(1), lambda h: h.sum(1, keepdim=True) * h, lambda h: h[:, 1:3],
    lambda h: torch.cat([h, h.sin()], 1), lambda h: h[:, 2], lambda h: h @ torch.ones(N, 3, dtype=h.dtype),
    lambda h: h.unsqueeze(-1).squeeze(-1), lambda h: h.view(-1, 3).tanh(),
    lambda h: h.view(-1, 2, 3).transpose(1, 2).tanh(), lambda h: torch.bmm(h.view(-1, 2, 3), h.view(-1, 3, 2)),
    lambda h: F.conv2d(image(h), KERNEL.to(h)), lambda h: F.avg_pool2d(image(h), 2),
    lambda h: F.max_pool2d(image(h), 2), lambda h: F.adaptive_avg_pool2d(image(h), 2),
    lambda h: F.group_norm(image(h), 2),
)  # fmt: skip
MIXING = (
    lambda h: h - h.mean(0), lambda h: h + h.sum(), lambda h: h.flip(0), lambda h: h.roll(1, 0),
    lambda h: h[torch.arange(N - 1, -1, -1)], lambda h: h.softmax(0), lambda h: h.log_softmax(-2), lambda h: h * h.mT,
    lambda h: h.T.tanh() + h, lambda h: h + h[0], lambda h: h + h[:, 0],
    lambda h: torch.ones(N, N, dtype=h.dtype).triu() @ h, lambda h: h @ h.mT @ h,
    lambda h: torch.addmm(h, torch.ones(N, N, dtype=h.dtype).tril(), h), lambda h: h.cumsum(0),
    lambda h: h.sort(0).values, lambda h: F.layer_norm(h, (N, N)),
    lambda h: F.batch_norm(h, None, None, training=True), lambda h: h.amax(0) * h,
    lambda h: torch.cat([h[1:], h[:1]]), lambda h: h.view(2, -1, N).mean(0).repeat(2, 1),
    lambda h: h.view(-1).view(N, N).mT,
    lambda h: torch.bmm(torch.ones(1, N, N, dtype=h.dtype).triu(), h.unsqueeze(0)).squeeze(0),
    lambda h: F.conv1d(h, torch.ones(N, N, 1, dtype=h.dtype).triu()), lambda h: F.avg_pool1d(h.T, 3, 1, 1).T,
    lambda h: h + F.adaptive_avg_pool2d(h.view(1, 1, N, N), 1).view(1, 1), lambda h: torch.einsum("ij,jk->ik", h, h),
)  # fmt: skip


def told(function: Callable[[Tensor], Tensor]) -> tuple[bool, Tensor, set[str]]:
    """What the graph tells; whether outputs depend on other points' features, (n, n); and the nodes' names."""
    torch.manual_seed(0)
    network = FrozenNetwork(Body(function).double())
    x = torch.randn(N, 2, dtype=torch.float64)
    bound = network.function(x.dtype, x.device)
    names = tuple(bound.parameters)
    plain = FrozenNetwork(Body(torch.sin).double()).function(x.dtype, x.device)  # of which the uses are the same
    with bound.tracing(), torch.no_grad():
        layouts = compare_layouts(*(record(plain, torch.randn(n, 2, dtype=x.dtype), names) for n in (2, 3)))
        recording = record(bound, x, names)
    leaf = x.clone().requires_grad_()
    with bound.tracing():
        out = bound(bound.parameters, leaf)
    dependence = torch.stack([torch.autograd.grad(row.sum(), leaf, retain_graph=True)[0].abs().sum(1) for row in out])
    return keeps_rows_apart(recording, layouts), dependence, {node.name() for node in nodes_below(recording.output)}


@pytest.mark.parametrize("function", APART)
def test_what_keeps_rows_apart_is_told_apart(function: Callable):
    told_apart, dependence, _ = told(function)
    assert told_apart
    assert torch.equal(dependence, dependence.diagonal().diag())


@pytest.mark.parametrize("function", MIXING)
def test_what_mixes_rows_is_not(function: Callable):
    """Sizes are all alike, so that only what a node does can tell."""
    told_apart, dependence, _ = told(function)
    assert not torch.equal(dependence, dependence.diagonal().diag())
    assert not told_apart


def test_every_entry_of_the_tables_was_met():
    seen = set().union(*(told(function)[2] for function in APART))
    known = {*rowwise._ELEMENTWISE, *rowwise._OF_ONE_INPUT, *rowwise._ALONG, *rowwise._RESHAPED}
    assert known <= seen


def reversed_on_the_way_back(h: Tensor) -> Tensor:
    h = h * 1.0
    if h.requires_grad:
        h.register_hook(lambda g: g.flip(0))
    return h


def reversed_at_the_node(h: Tensor) -> Tensor:
    h = h * 1.0
    if h.grad_fn is not None:
        h.grad_fn.register_prehook(lambda g: (g[0].flip(0),))
    return h


@pytest.mark.parametrize("function", [reversed_on_the_way_back, reversed_at_the_node])
def test_a_network_with_hooks_in_its_graph_is_not_told_apart(function: Callable):
    """Its rows stay apart on the way there, and not on the way back."""
    told_apart, dependence, _ = told(function)
    assert not told_apart
    assert not torch.equal(dependence, dependence.diagonal().diag())


class Function(torch.autograd.Function):
    """Named like one of the package's, and what flows back is another row's."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.flip(0)


@pytest.mark.parametrize("name", ["_Tanh", "_Linear", "TanhBackward0", "Tanh"])
def test_a_users_function_is_not_taken_for_what_it_is_called(name: str):
    assert not told(type(name, (Function,), {}).apply)[0]


class Unsort(torch.autograd.Function):
    """Puts rows back in their places; its node has an attribute that those of leaves have."""

    @staticmethod
    def forward(ctx, h: Tensor, order: Tensor) -> Tensor:
        ctx.variable = order
        return torch.empty_like(h).index_copy(0, order, h)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.variable], None


def test_a_users_node_is_not_taken_for_a_leaf():
    assert not told(lambda h: Unsort.apply(h, torch.arange(len(h)).flip(0)))[0]
