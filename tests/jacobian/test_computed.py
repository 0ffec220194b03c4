"""Parameters that a network computes from its parameters: served by rules, and right, against explicit Jacobians."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize

from ntk_gp import settings
from ntk_gp._compat import version_of
from ntk_gp.jacobian.maps import Pull, is_own, register_map
from ntk_gp.jacobian.maps.registry import _MAPS
from ntk_gp.jacobian.structured import ChunkedJacobian, StructuredEngine, tracked
from tests.jacobian.explicit import Subject, assert_close

WIDTH = 4


class Computing(nn.Module):
    """One call between two linear layers; what it is made of are parameters, or buffers where that is said.

    :param call: Gets the module and the inputs (n, 4), and returns (n, 5).
    """

    def __init__(self, call: Callable[..., Tensor], buffers: tuple[str, ...] = (), **sizes: tuple[int, ...]):
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(5, 2)
        self.call = call
        for name, size in sizes.items():
            value = torch.randn(size)
            self.register_buffer(name, value) if name in buffers else self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.call(self, torch.tanh(self.first(x)))))


class Merged(nn.Module):
    """A parametrization: a low-rank update."""

    def __init__(self, d_out: int, d_in: int):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(d_out, 2)), nn.Parameter(torch.randn(2, d_in))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * self.up @ self.down


def layered(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), layer, nn.Tanh(), nn.Linear(5, 2))


def convolved(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The first convolution with few positions for its width, the second with many."""
    wide, narrow = wrap(nn.Conv2d(2, 16, 3)), wrap(nn.Conv2d(16, 2, 1, groups=2))
    return nn.Sequential(nn.Unflatten(1, (2, 4, 4)), wide, nn.Tanh(), narrow, nn.Flatten(), nn.Linear(8, 2))


def nested() -> nn.Module:
    layer = nn.Linear(WIDTH, 5)
    parametrize.register_parametrization(layer, "weight", Merged(5, WIDTH))
    return layer


def old_weight_norm() -> nn.Module:
    network = layered(nn.utils.weight_norm(nn.Linear(WIDTH, 5))).double()
    with torch.no_grad():  # what it keeps on itself is computed anew, and may be copied
        network(torch.zeros(1, 3, dtype=torch.float64))
    return network


def orthogonalised(matrix: Tensor) -> Tensor:
    """By steps of Newton and Schulz, each of which the last one enters four times."""
    matrix = matrix / matrix.norm()
    for _ in range(12):
        matrix = 1.5 * matrix - 0.5 * matrix @ matrix.T @ matrix
    return matrix


@dataclass(frozen=True)
class Case:
    """A network, the parameters that are computed with, and the terms that serve them: how cheap it is.

    :param width: The number of its inputs.
    """

    name: str
    build: Callable[[], nn.Module]
    names: tuple[str, ...]
    terms: set[str]
    width: int = 3

    def subject(self, **options) -> Subject:
        torch.manual_seed(0)
        return Subject(self.build().double().eval(), output="all", **options)

    def inputs(self, n: int, batches: int = 1, seed: int = 1) -> Tensor:
        return torch.randn(batches, n, self.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def computing(name: str, call: Callable[..., Tensor], terms: set[str], buffers=(), **sizes) -> Case:
    used = tuple(size for size in sizes if size not in buffers)
    return Case(name, lambda: Computing(call, buffers, **sizes), used, terms)


_PLAIN = {"MatrixTerm", "FeatureTerm"}  # a plain layer's, kept as features where it is narrow
_PARAMETRISED = ("2.parametrizations.weight.original0", "2.parametrizations.weight.original1")
CASES = [
    Case(
        "weight_norm",
        lambda: layered(parametrizations.weight_norm(nn.Linear(WIDTH, 5))),
        _PARAMETRISED,
        {"CorrectedTerm"},
    ),
    Case("weight_norm_old", old_weight_norm, ("2.weight_g", "2.weight_v"), {"CorrectedTerm"}),
    Case(
        "weight_norm_convolution",
        lambda: convolved(parametrizations.weight_norm),
        ("1.parametrizations.weight.original0", "3.parametrizations.weight.original1"),
        {"CorrectedTerm"},
        32,
    ),
    Case(
        "spectral_norm",
        lambda: layered(parametrizations.spectral_norm(nn.Linear(WIDTH, 5))),
        ("2.parametrizations.weight.original",),
        {"CorrectedTerm"},
    ),
    Case(
        "spectral_norm_convolution",
        lambda: convolved(parametrizations.spectral_norm),
        ("1.parametrizations.weight.original",),
        {"CorrectedTerm"},
        32,
    ),
    Case(
        "orthogonal",
        lambda: layered(parametrizations.orthogonal(nn.Linear(WIDTH, 5))),
        ("2.parametrizations.weight.original",),
        {"PulledTerm"},
    ),
    Case("parametrised_update", lambda: layered(nested()), ("2.parametrizations.weight.0.up",), _PLAIN),
    computing(
        "update",
        lambda net, x: F.linear(x, net.weight + 0.5 * net.up @ net.down, net.bias),
        _PLAIN,
        weight=(5, 4),
        up=(5, 2),
        down=(2, 4),
        bias=(5,),
    ),
    computing(
        "update_of_a_constant",
        lambda net, x: x @ (net.weight - (net.down @ net.up).clone().T).T,
        _PLAIN,
        ("weight",),
        weight=(5, 4),
        up=(2, 5),
        down=(4, 2),
    ),
    computing(
        "normalised_update",
        lambda net, x: F.linear(x, torch.nn.functional.normalize(net.weight + net.up @ net.down, dim=1) * net.scale),
        {"CombinedTerm", "CorrectedTerm", "FeatureTerm"},
        weight=(5, 4),
        up=(5, 1),
        down=(1, 4),
        scale=(5, 1),
    ),
    computing("normalised_by_hand", lambda net, x: x @ (net.v / net.v.norm()).T, {"CorrectedTerm"}, v=(5, 4)),
    computing(
        "normalised_from_the_right",
        lambda net, x: x @ F.normalize(net.v, dim=0),
        {"PulledTerm"},
        v=(4, 5),
    ),
    computing(
        "softplus",
        lambda net, x: F.linear(x, F.softplus(net.weight) * net.mask, net.bias.exp()),
        {"ElementwiseTerm", "FeatureTerm"},
        ("mask",),
        weight=(5, 4),
        bias=(5,),
        mask=(5, 4),
    ),
    computing(
        "part_of_an_exponential",
        lambda net, x: F.linear(x, torch.matrix_exp(net.v)[:5, :4]),
        {"PulledTerm"},
        v=(6, 6),
    ),
    computing("part_of_softplus", lambda net, x: F.linear(x, F.softplus(net.w)[:5]), {"ElementwiseTerm"}, w=(7, 4)),
    computing("many_ways", lambda net, x: F.linear(x, orthogonalised(net.v)), {"CombinedTerm"}, v=(5, 4)),
    computing(
        "scaled_by_constants",
        lambda net, x: F.linear(x, -(net.rows * net.weight * net.columns) / 3, net.bias),
        _PLAIN,
        ("rows", "columns"),
        weight=(5, 4),
        rows=(5, 1),
        columns=(4,),
        bias=(5,),
    ),
    computing(
        "scaled_by_parameters",
        lambda net, x: F.linear(x, net.scale.square() * net.weight / net.number),
        {"MatrixTerm", "FeatureTerm"},
        weight=(5, 4),
        scale=(5, 1),
        number=(),
    ),
    computing(
        "used_twice",
        lambda net, x: F.linear(x, F.normalize(net.v)) + F.linear(torch.sin(x), F.normalize(net.v)),
        {"CorrectedTerm"},
        v=(5, 4),
    ),
    computing(
        "used_plainly_too",
        lambda net, x: F.linear(x, torch.tanh(net.weight)) + F.linear(torch.sin(x), net.weight),
        {"CombinedTerm"},
        weight=(5, 4),
    ),
    computing(
        "changed_in_place",
        lambda net, x: F.linear(x, (net.weight * 2).add_(net.shift)),
        {"MatrixTerm", "FeatureTerm", "PulledTerm"},
        weight=(5, 4),
        shift=(5, 1),
    ),
    computing(
        "zero_in_theory",
        lambda net, x: F.linear(x[:, :1], F.normalize(net.v), net.bias),
        {"CombinedTerm", "CorrectedTerm", "FeatureTerm"},
        v=(5, 1),
        bias=(5,),
    ),
    computing(
        "embedded",
        lambda net, x: F.embedding((x[:, 0] > 0).long(), net.table / net.table.norm()) + net.shift.cumsum(0),
        {"PulledTerm", "FeatureTerm"},
        table=(2, 5),
        shift=(5,),
    ),
]
EVERY = [pytest.param(case, id=case.name) for case in CASES]
SOME = [param for param in EVERY if param.id in ("weight_norm", "spectral_norm", "softplus", "normalised_update")]


@pytest.mark.parametrize("case", EVERY)
def test_every_operation_equals_the_explicit_jacobians(case: Case):
    served = case.subject(group_by=lambda name: name).check(case.inputs(4), case.inputs(3, seed=7))
    assert "autodiff" not in served.values()
    assert all("(computed)" in served[name] for name in case.names if name != "bias")


@pytest.mark.parametrize("case", EVERY)
def test_structure_is_found(case: Case):
    jacobian = StructuredEngine(case.subject().frozen).linearize(case.inputs(3))
    found = {type(term).__name__ for term in jacobian.terms if {view.name for view in term.views} & set(case.names)}
    assert found and found <= case.terms


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize(("batches", "count"), [(2, 1), (2, 2), (1, 3)])
def test_batches_and_weightings(case: Case, batches: int, count: int):
    network = case.subject(group_by=lambda name: name)
    x, other = case.inputs(4, batches), case.inputs(3, batches, seed=7)
    J, K = network.explicit(x), network.explicit(other)
    engine = StructuredEngine(network.frozen)
    jacobian, jacobian2 = engine.linearize(x), engine.linearize(other)
    weights = network.variances(count)
    v = torch.randn(batches, 2, J.shape[1], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    u = torch.randn(batches, 2, J.shape[2], generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    assert_close(jacobian.gram(jacobian, weights), network.weighted(J, J, weights))
    assert_close(jacobian2.gram(jacobian, weights), network.weighted(K, J, weights))
    assert_close(jacobian.diagonal(weights), network.weighted(J, J, weights).diagonal(dim1=-2, dim2=-1))
    assert_close(jacobian.kernel_matmul(jacobian, v.mT, weights), network.weighted(J, J, weights) @ v.mT)
    assert_close(jacobian.vjp(v), v @ J)
    assert_close(jacobian.jvp(u), u @ J.mT)


@pytest.mark.parametrize("case", SOME)
def test_many_points_in_tiles_and_in_chunks(case: Case):
    network = case.subject()
    x, other = case.inputs(300), case.inputs(270, seed=5)
    engine = StructuredEngine(network.frozen)
    jacobian, jacobian2 = engine.linearize(x), engine.linearize(other)
    J, K = jacobian.rows(), jacobian2.rows()
    weights = network.variances(1)
    assert_close(J, network.explicit(x))
    symmetric = jacobian.gram(jacobian, weights)
    assert torch.equal(symmetric, symmetric.mT)
    assert_close(symmetric, network.weighted(J, J, weights))
    assert_close(jacobian.gram(jacobian2, weights), network.weighted(J, K, weights))
    with settings.memory_budget(500 * engine.plan(jacobian.function, x).bytes_per_point):
        chunked = engine.linearize(x)
        assert isinstance(chunked, ChunkedJacobian)
        assert_close(chunked.gram(chunked, weights), symmetric)
        assert_close(chunked.rows(), J)


@pytest.mark.parametrize("case", SOME)
def test_the_network_is_not_run_again(case: Case, monkeypatch):
    jacobian = StructuredEngine(case.subject().frozen).linearize(case.inputs(5))
    monkeypatch.setattr(type(jacobian.function), "__call__", lambda *_: pytest.fail("the network was evaluated"))
    weights = torch.ones(1, 1, dtype=torch.float64)
    assert jacobian[1:3].gram(jacobian, weights).isfinite().all()


def test_what_all_points_share_is_counted_once():
    (case,) = (case for case in CASES if case.name == "weight_norm")
    engine = StructuredEngine(case.subject().frozen)
    one, two, four = (engine.linearize(case.inputs(n)).nbytes for n in (1, 2, 4))
    assert four - two == 2 * (two - one)
    assert one - (two - one) >= 8 * 5 * WIDTH  # a derivative as large as the weight


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_gram_matrices_take_at_most_twice_the_flops(wrap):
    def flops(layer: nn.Module) -> float:
        network = Subject(nn.Sequential(layer, nn.Tanh(), nn.Linear(100, 1)).double().eval())
        jacobian = StructuredEngine(network.frozen).linearize(torch.randn(1, 5, 100, dtype=torch.float64))
        return jacobian.gram_cost(jacobian)

    assert flops(wrap(nn.Linear(100, 100))) <= 2 * flops(nn.Linear(100, 100))


class Squared(torch.autograd.Function):
    """A user's, which computes without a graph, and gives the result one."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        return 2 * w * gradient


@pytest.mark.parametrize("is_compared_alone", [False, True])
def test_what_a_users_autograd_function_computes_is_no_constant(monkeypatch, is_compared_alone: bool):
    """Neither where calls are followed, nor, should they be lost there, where gradients are compared."""
    if is_compared_alone:
        monkeypatch.setattr(tracked, "_state", version_of)
    case = computing("squared", lambda net, x: F.linear(x, Squared.apply(net.w).T.T), set(), w=(5, 4))
    served = case.subject().check(case.inputs(4), case.inputs(3, seed=7))
    assert served["w"] == "autodiff" and served["last.weight"] != "autodiff"


class TestWhatDependsOnTheInputs:
    """Is no computed parameter, however it came about, and its uses are right."""

    @staticmethod
    def served(call: Callable[..., Tensor], **sizes) -> dict[str, str]:
        torch.manual_seed(0)
        network = Subject(Computing(call, **sizes).double().eval(), output="all")
        x = torch.randn(2, 1, 6, 3, dtype=torch.float64)
        return network.check(x[0], x[1])

    def test_a_network_that_computes_a_weight(self):
        def call(net, x):
            return (F.linear(x, net.weight).view(-1, 5, 4) @ x.unsqueeze(-1)).squeeze(-1)

        assert self.served(call, weight=(20, 4))["weight"] == "linear"

    def test_gates(self):
        def call(net, x):
            weight = net.weight * x.detach().unsqueeze(1)
            return (weight @ x.unsqueeze(-1)).squeeze(-1)

        assert "computed" not in self.served(call, weight=(5, 4))["weight"]

    @pytest.mark.parametrize(
        "hide",
        [
            lambda gate, x: gate.data.copy_(x),
            lambda gate, x: gate.detach().copy_(x),
            lambda gate, x: gate.__setitem__(slice(None), x),
            lambda gate, x: gate.numpy().__setitem__(slice(None), x.numpy()),
            lambda gate, x: gate.view(-1).copy_(x.reshape(-1)),
        ],
        ids=["data", "detach", "setitem", "numpy", "view"],
    )
    def test_written_into_a_constant(self, hide):
        def call(net, x):
            gate = torch.ones(len(x), 1, 4, dtype=x.dtype)
            hide(gate, x.detach().unsqueeze(1))
            return ((net.weight * gate) @ x.unsqueeze(-1)).squeeze(-1)

        assert "computed" not in self.served(call, weight=(5, 4))["weight"]

    def test_a_row_for_each_point(self):
        """As class tokens are expanded: the rules for these go on to serve them."""

        def call(net, x):
            token = net.token.expand(len(x), 1, 4)
            return F.linear(torch.cat([token, x.unsqueeze(1)], 1).sum(1), net.weight)

        served = self.served(call, token=(1, 1, 4), weight=(5, 4))
        assert (served["token"], served["weight"]) == ("expand", "linear")

    def test_a_row_for_each_point_of_something_computed(self):
        def call(net, x):
            tokens = torch.exp(net.token).expand(len(x), 1, 4).reshape(-1, 4)
            return F.linear(tokens + x, net.weight)

        self.served(call, token=(1, 1, 4), weight=(5, 4))


def test_a_wrong_map_is_found_out(monkeypatch):
    def doubles(pull: Pull, input, other, *, alpha=1):
        return [*pull.to(input, pull.term.scaled(2.0)), *pull.to(other)]

    monkeypatch.setitem(_MAPS, torch.Tensor.add, _MAPS[torch.Tensor.add])  # to be put back
    register_map(torch.Tensor.add, doubles)
    assert not is_own(torch.Tensor.add) and is_own(torch.Tensor.mul) and is_own(torch.cat)
    case = next(case for case in CASES if case.name == "update")
    served = case.subject().check(case.inputs(4), case.inputs(3))
    assert served["weight"] == "autodiff" and served["first.weight"] == "linear"
