"""What fools a look at the first few rows: every operation of the engine against Jacobians of single rows."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NTKKernel
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.jacobian.rules import register_decomposition, register_rule
from ntk_gp.jacobian.rules.registry import _DECOMPOSITIONS, _RULES
from ntk_gp.jacobian.structured import StructuredEngine, StructuredJacobian
from ntk_gp.jacobian.structured.record import record
from ntk_gp.network import FrozenNetwork, some_rows
from tests.jacobian.explicit import Subject, assert_close


class Network(nn.Module):
    """A layer in, a function of the module, the features and the inputs, and a layer out, all parameters random."""

    def __init__(self, body: Callable[[nn.Module, Tensor, Tensor], Tensor], outputs: int = 1):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.heads = nn.Parameter(torch.randn(3, 6, 6))
        self.table = nn.Embedding(4, 6)
        self.gate = 1.0
        self.head = nn.Linear(6, outputs)
        self.body = body
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, torch.tanh(self.first(x)), x))


def by_sorting(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    order = (x[:, 0] > 0).long().argsort(stable=True)
    y = torch.tanh(net.second(h[order]))
    return h + net.gate * torch.empty_like(y).index_copy(0, order, y)


def by_mask(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    mask = x[:, 0] > 0
    out = h.clone()
    out[mask] = torch.tanh(net.second(h[mask]))
    return out


def by_experts(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for expert, layer in enumerate((net.second, net.third)):
        rows = ((x[:, 0] > 0).long() == expert).nonzero().squeeze(1)
        out = out.index_add(0, rows, torch.tanh(layer(h[rows])))
    return out


def by_where(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return torch.where(x[:, :1] > 0, torch.tanh(net.second(h)), torch.sin(net.third(h)))


def by_branch(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """A layer that is not called where no row wants it."""
    return by_where(net, h, x) if (x[:, 0] > 0).any() else torch.sin(net.third(h))


def by_unique(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """Layers of distinct values, as caches are, which come sorted."""
    values, inverse = x.detach().unique(dim=0, return_inverse=True)
    return h + torch.tanh(net.second(torch.tanh(net.first(values))))[inverse]


def flipped(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h + net.gate * torch.tanh(net.second(h.flip(0))).flip(0)


def gated(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return h + 1e-7 * torch.tanh(net.second(h.flip(0))).flip(0)


def tied(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(net.second(h)) + 1e-7 * torch.sin(net.second(h.flip(0))).flip(0)


def positions_first(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """Rows and positions in one dimension, in the wrong order for those who take the points to come first."""
    z = torch.stack([h, h.sin(), h.cos()]).flatten(0, 1)
    return torch.tanh(net.second(z)).unflatten(0, (3, -1)).sum(0)


def points_first(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    z = torch.stack([h, h.sin(), h.cos()], 1).flatten(0, 1)
    return torch.tanh(net.second(z)).unflatten(0, (-1, 3)).sum(1)


def one_head_each(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(torch.matmul(h[:, None, None], net.heads)).squeeze(2).sum(1)


def ensemble(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(h @ net.heads).prod(0)


def sorted_embedding(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    index = (2 * x[:, 0].detach()).long().remainder(4)
    order = index.argsort(stable=True)
    return h * torch.zeros_like(h).index_copy(0, order, net.table(index[order]))


def routed_to_one_of_many_matrices(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    index = (x[:, 0] > 0).long()
    return torch.tanh(torch.bmm(net.heads[index], h.unsqueeze(-1)).squeeze(-1))


BODIES = (
    by_sorting, by_mask, by_experts, by_where, by_branch, by_unique, flipped, gated, tied, positions_first,
    points_first, one_head_each, ensemble, sorted_embedding, routed_to_one_of_many_matrices,
)  # fmt: skip


NOT_SECOND = (one_head_each, ensemble, sorted_embedding, routed_to_one_of_many_matrices)  # do without that layer


def late(x: Tensor, rows: int = 10) -> Tensor:
    """One kind of row only in the first rows."""
    x[:, :rows, 0] = -x[:, :rows, 0].abs()
    return x


def replicated(x: Tensor) -> Tensor:
    x[:, :9] = x[:, :1]
    return x


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {"mixed": lambda x: x, "late": late, "replicated": replicated}


def points(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(1, n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def subject(body: Callable, outputs: int = 1, **options) -> Subject:
    torch.manual_seed(1)
    return Subject(Network(body, outputs).double(), output="all", **options)


@pytest.mark.parametrize(("order", "outputs"), [("mixed", 1), ("late", 3), ("replicated", 1)])
@pytest.mark.parametrize("body", BODIES)
def test_every_operation_at_rows_of_any_order(body: Callable, order: str, outputs: int):
    x = ORDERS[order](points(15))
    subject(body, outputs).check(x, x[:, 9:13].flip(1) + 0.1)


@pytest.mark.parametrize("body", BODIES)
def test_a_plan_made_at_other_rows(body: Callable):
    """The first inputs are one row, equal rows, or of one kind; the others are served by the same engine."""
    network = subject(body)
    weights = network.variances(1)
    for first in (points(1), replicated(points(9)), late(points(10))):
        engine = StructuredEngine(network.frozen)
        J1 = network.explicit(first)
        assert_close(engine.linearize(first).rows(), J1)
        for x in (late(points(14, 1)), points(12, 2)):
            jacobian, J = engine.linearize(x), network.explicit(x)
            assert_close(jacobian.rows(), J)
            assert_close(jacobian.gram(jacobian, weights), weights[0, 0] * J @ J.mT)
            assert_close(engine.linearize(first).gram(jacobian, weights), weights[0, 0] * J1 @ J.mT)


@pytest.mark.parametrize("body", BODIES)
def test_in_single_precision(body: Callable):
    network = subject(body)
    x = late(points(40, dtype=torch.float32))
    for parameters in (None, "second.*"):
        if parameters and (body in NOT_SECOND or body is by_branch):
            continue
        network = subject(body, parameters=parameters)
        expected = network.explicit(x.double())
        assert_close(StructuredEngine(network.frozen).linearize(x).rows().double(), expected, 1e-5)


@pytest.mark.parametrize("body", [by_sorting, by_mask, flipped, gated])
def test_captured_chunk_by_chunk(body: Callable):
    network = subject(body)
    x = late(points(40))
    J, weights = network.explicit(x), network.variances(1)
    with ntk_gp.settings.memory_budget(12_000):
        jacobian = StructuredEngine(network.frozen).linearize(x)
        assert not isinstance(jacobian, StructuredJacobian)
        assert_close(jacobian.gram(jacobian, weights), weights[0, 0] * J @ J.mT)
        assert_close(jacobian.diagonal(weights), weights[0, 0] * J.square().sum(-1))
        assert_close(jacobian.vjp(torch.ones(1, 1, 40, dtype=x.dtype)), J.sum(1, keepdim=True))


def test_what_is_right_stays_with_the_rules():
    for body, left in ((flipped, {"second"}), (by_where, set()), (points_first, set()), (one_head_each, set())):
        report = StructuredEngine(subject(body).frozen).linearize(late(points(16))).report()
        autodiff = {e["parameter"].split(".")[0] for e in report if e["served_by"] == "autodiff"}
        assert autodiff == left, body.__name__


def test_a_later_permutation_costs_only_its_own_layer():
    engine = StructuredEngine(subject(by_sorting).frozen)
    report = engine.linearize(late(points(10))).report()
    served = [e["parameter"] for e in report if e["served_by"] == "linear"]
    assert {"second.weight", "second.bias"} <= set(served)
    report = engine.linearize(points(16)).report()
    assert [e["parameter"] for e in report if e["served_by"] == "autodiff"] == ["second.weight", "second.bias"]


def test_the_rows_tried_are_distinct_spread_and_valid():
    x = torch.arange(1000.0)[:, None].expand(-1, 3)
    rows = some_rows(x, 8, torch.sum)
    assert len(rows.unique(dim=0)) == 8 and rows.max() > 500 > rows.min()
    for given in (torch.full((1, 2), 7.0), torch.full((50, 2), 7.0)):
        rows = some_rows(given, 8, torch.sum)
        assert len(rows) >= 3 and len(rows.unique(dim=0)) == len(rows)
        assert (rows.long() == 7).all() and (rows.round() == 7).all()
        for evaluate in (lambda rows: (7 - rows).sqrt(), lambda rows: [][int(rows.max())]):  # not at inputs beyond 7
            assert torch.equal(some_rows(given, 8, evaluate), torch.full((4, 2), 7.0))


# Users' rules


def function_of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))(function)


@contextmanager
def registered(function: Callable, rule: Callable, **options) -> Iterator[None]:
    register_rule(function, rule, parameters=("weight",), **options)
    try:
        yield
    finally:
        del _RULES[function]


class Own(nn.Module):
    """A user's own function in the middle; the outputs may depend on it very little."""

    def __init__(self, function: Callable, gate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 2))
        self.function = function
        self.gate = gate
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate * torch.tanh(self.function(x, self.weight)))


def forgets_the_absolute_value(use, x: Tensor, weight):
    use.decline_points_in_last(1)
    return use.matrix(weight, None, x)


def forgets_it_below_minus_two(use, x: Tensor, weight):
    use.decline_points_in_last(1)
    return use.matrix(weight, None, torch.where(x < -2, x, x.abs()))


def raises_below_zero(use, x: Tensor, weight):
    use.decline_points_in_last(1)
    if (x < 0).any():
        raise IndexError("not here")
    return use.matrix(weight, None, x)


def has_the_wrong_shape_below_zero(use, x: Tensor, weight):
    use.decline_points_in_last(1)
    return use.matrix(weight, None, x[:, :1] if (x < 0).any() else x)


RULES = (
    forgets_the_absolute_value, forgets_it_below_minus_two, raises_below_zero, has_the_wrong_shape_below_zero,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gate", [1.0, 1e-6])
@pytest.mark.parametrize("rule", RULES)
def test_a_users_rule_that_is_wrong_further_on(rule: Callable, gate: float, dtype: torch.dtype):
    absolute = function_of_two(lambda x, weight: x.abs() @ weight.T)
    with registered(absolute, rule):
        torch.manual_seed(0)
        network = Subject(Own(absolute, gate).double(), parameters="weight")
        x = points(100, dtype=dtype).abs()
        y = x.clone()
        y[:, 70] = -3 - y[:, 70]  # one row in 100
        tolerance = 1e-10 if dtype == torch.float64 else 5e-5  # what a comparison of sums can see
        engine = StructuredEngine(network.frozen)
        for inputs in (x, y, -y):
            expected = network.explicit(inputs.double())
            assert_close(engine.linearize(inputs).rows().double(), expected, tolerance)
        assert_close(
            StructuredEngine(network.frozen).linearize(y).rows().double(), network.explicit(y.double()), tolerance
        )


def test_a_right_rule_serves():
    absolute = function_of_two(lambda x, weight: x.abs() @ weight.T)
    with registered(absolute, lambda use, x, weight: use.matrix(weight, None, x.abs())):
        network = Subject(Own(absolute).double())
        for dtype in (torch.float64, torch.float32):
            report = StructuredEngine(network.frozen).linearize(points(300, dtype=dtype)).report()
            assert [e["parameter"] for e in report if e["served_by"] == "autodiff"] == []


def test_a_users_decomposition_that_is_wrong_further_on():
    absolute = function_of_two(lambda x, weight: x.abs() @ weight.T)
    register_decomposition(absolute, lambda x, weight: F.linear(x, weight))
    try:
        network = Subject(Own(absolute).double())
        engine = StructuredEngine(network.frozen)
        for x in (points(20).abs(), points(20)):
            assert_close(engine.linearize(x).rows(), network.explicit(x))
    finally:
        del _DECOMPOSITIONS[absolute]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", [forgets_it_below_minus_two, raises_below_zero, has_the_wrong_shape_below_zero])
def test_a_rule_of_the_packages_own_that_is_wrong_further_on(rule: Callable, dtype: torch.dtype):
    """Which is compared at a few rows of each large capture, and once in a while of small ones."""
    absolute = function_of_two(lambda x, weight: x.abs() @ weight.T)
    with registered(absolute, rule):
        _RULES[absolute].is_own = True
        torch.manual_seed(0)
        network = Subject(Own(absolute).double(), parameters="weight")
        x = points(600, dtype=dtype).abs()
        engine = StructuredEngine(network.frozen)
        assert engine.linearize(x).report()[0]["served_by"] != "autodiff"
        expected = network.explicit((-3 - x).double())
        assert_close(engine.linearize(-3 - x).rows().double(), expected, 1e-10 if dtype == torch.float64 else 5e-5)
        engine = StructuredEngine(network.frozen)
        for rows in (x, -3 - x):
            reports = [engine.linearize(part).report()[0]["served_by"] for part in rows.split(40, dim=1)]
        assert reports[-1] == "autodiff"


class Kinks(nn.Module):
    """Units of which many are within rounding of where their derivative jumps."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 1))
        with torch.no_grad():  # twice the same with opposite signs: zero but for rounding
            self.layers[2].weight[:, 32:] = -self.layers[2].weight[:, :32]
            self.layers[2].bias.zero_()
            self.layers[0].weight[32:], self.layers[0].bias[32:] = self.layers[0].weight[:32], self.layers[0].bias[:32]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_two_passes_that_go_two_ways_at_a_kink_are_both_right():
    torch.manual_seed(0)
    jacobian = StructuredEngine(FrozenNetwork(Kinks())).linearize(points(600, dtype=torch.float32))
    assert [e["parameter"] for e in jacobian.report() if e["served_by"] == "autodiff"] == []


def test_rules_reach_kernels_that_exist():
    absolute = function_of_two(lambda x, weight: x.abs() @ weight.T)
    linearization = Linearization(FrozenNetwork(Own(absolute).double()), engine="structured")
    x = points(20)

    def served_by() -> dict[str, str]:
        return {e["parameter"]: e["served_by"] for e in linearization.jacobian(x).report()}

    assert served_by()["weight"] == "autodiff"

    def rule(use, x: Tensor, weight):
        return use.matrix(weight, None, x.abs())

    with registered(absolute, rule):
        assert served_by()["weight"] == "rule"


# Tolerances


class Attention(nn.Module):
    """Tokens to one number, by one of the usual ways to write attention."""

    def __init__(self, kind: str, d: int = 16, heads: int = 2):
        super().__init__()
        self.kind, self.d, self.heads = kind, d, heads
        if kind == "separate":
            self.query, self.key, self.value = (nn.Linear(d, d) for _ in range(3))
        elif kind == "fused":
            self.projection = nn.Linear(d, 3 * d)
        elif kind == "encoder":
            self.layer = nn.TransformerEncoderLayer(d, heads, 2 * d, batch_first=True)
        else:
            self.attention = nn.MultiheadAttention(d, heads, batch_first=True)
        self.head = nn.Linear(d, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(len(x), -1, self.d)
        if self.kind == "encoder":
            return self.head(self.layer(tokens).mean(1))
        if self.kind == "module":
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))
        if self.kind == "separate":
            q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
        else:
            q, k, v = self.projection(tokens).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if self.kind == "fused":
            attended = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.head(attended.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["separate", "fused", "module", "encoder"])
@pytest.mark.parametrize("selected", [None, "biases"])
def test_a_gradient_that_is_zero_is_no_error(kind: str, selected: str | None, dtype: torch.dtype):
    """That of the bias of keys: softmax does not see it."""
    torch.manual_seed(0)
    parameters = None if selected is None else lambda name, parameter: parameter.dim() == 1
    network = Subject(Attention(kind).double(), parameters=parameters)
    x = torch.randn(1, 20, 5 * 16, dtype=dtype)
    jacobian = StructuredEngine(network.frozen).linearize(x)
    assert [e["parameter"] for e in jacobian.report() if e["served_by"] == "autodiff"] == []
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_close(jacobian.rows().double(), network.explicit(x.double()), tolerance)


# Scalars


class Scaled(nn.Module):
    """Numbers as parameters: a temperature, and elements of a vector."""

    def __init__(self, outputs: int):
        super().__init__()
        self.linear = nn.Linear(2, outputs)
        self.scale, self.numbers = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.3, -0.2, 1.1]))
        self.unused = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x) * self.scale + self.numbers[0]
        return torch.tanh(z / self.numbers[2].exp()) - self.numbers[1]


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("parameters", [None, "scale", "numbers", ["scale", "unused"]])
def test_parameters_without_dimensions(parameters, outputs: int):
    network = Subject(Scaled(outputs).double(), parameters=parameters, output="all")
    network.check(points(7), points(4, 1))


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
def test_kernels_of_parameters_without_dimensions(engine: str):
    network = Scaled(1).double()
    x, v = points(7)[0], torch.ones(7, 2, dtype=torch.float64)
    J = Subject(network).explicit(x[None])[0]
    kernel = NTKKernel(network, engine=engine)
    assert_close(kernel(x) @ v, J @ J.mT @ v)
    assert_close(kernel(x).to_dense(), J @ J.mT)
    assert_close(kernel(x, diag=True), J.square().sum(-1))


# Order


_SEEDS = """
import torch
from torch import nn
from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.network import FrozenNetwork

class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.ModuleList(nn.Linear(4, 1) for _ in range(5))
        self.linear = nn.Linear(4, 1)
    def forward(self, x):
        weight, bias = torch.stack([m.weight for m in self.m]), torch.stack([m.bias for m in self.m])
        return (torch.einsum("ni,eoi->eno", x, weight) + bias[:, None]).sin().prod(0) + self.linear(x)

torch.manual_seed(0)
net = Stacked().double()
x = torch.randn(6, 4, dtype=torch.float64)
for selection in ("m.*", "*"):
    chosen = [p for name, p in net.named_parameters() if selection == "*" or name.startswith("m.")]
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(net(r[None]).sum(), chosen)]) for r in x])
    j = StructuredEngine(FrozenNetwork(net, parameters=selection)).linearize(x[None])
    u, v = torch.randn(1, 2, J.shape[1], dtype=J.dtype), torch.randn(1, 2, 6, dtype=J.dtype)
    for actual, expected in ((j.rows(), J[None]), (j.jvp(u), u @ J.T), (j.vjp(v), v @ J)):
        assert (actual - expected).abs().max() < 1e-12, (selection, actual, expected)
    print([(e["parameter"], e["served_by"]) for e in j.report()])
"""


def test_columns_are_in_the_parameters_order_whatever_strings_hash_to():
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _SEEDS],
            env={"PYTHONHASHSEED": str(seed), "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(2)
    ]  # fmt: skip
    results = [(*run.communicate(), run.returncode) for run in runs]
    assert all(code == 0 for _, _, code in results), results
    assert len({out for out, _, _ in results}) == 1


def test_what_no_rule_has_seen_is_named_in_the_parameters_order():
    network = subject(routed_to_one_of_many_matrices).frozen
    function = network.function(torch.float64, torch.device("cpu"))
    names = tuple(function.parameters)
    assert copy.copy(function).restrict(reversed(names)).parameters.keys() == function.parameters.keys()
    assert list(function.restrict(set(names)).parameters) == list(names)
    network.check(points(3)[0])
    with function.tracing(), torch.no_grad():
        assert record(function, points(3)[0], names).unseen == ("heads",)
