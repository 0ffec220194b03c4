"""The structured engine against explicit Jacobians, computed one point at a time by plain autograd, in float64."""

import copy
import logging
import math
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_gp import settings
from ntk_gp.jacobian.autodiff import AutodiffEngine
from ntk_gp.jacobian.structured import ChunkedJacobian, StructuredEngine, StructuredJacobian
from ntk_gp.jacobian.terms import ConvolutionTerm
from ntk_gp.network import FrozenNetwork
from tests.jacobian.explicit import Subject, assert_close
from tests.networks import ADVERSARIAL, CASES, Case, mlp

EVERY = [pytest.param(case, id=case.name) for case in (*CASES, *ADVERSARIAL)]
SOME = [
    case
    for case in CASES
    if case.name in ("mlp", "mlp_groups", "cnn", "resnet", "transformer", "embedding_lstm", "language")
]
SOME_CASES = [pytest.param(case, id=case.name) for case in SOME]


def subject(case: Case) -> Subject:
    return Subject(case.network(), **case.options)


@pytest.mark.parametrize("case", EVERY)
def test_every_operation_equals_the_explicit_jacobians(case: Case):
    subject(case).check(case.inputs(5), case.inputs(4, seed=7), case.tolerance)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in (*CASES, *ADVERSARIAL) if c.autodiff is not None])
def test_rules_serve_what_they_know_and_nothing_else(case: Case):
    jacobian = StructuredEngine(case.frozen()).linearize(case.inputs(5))
    left = tuple(entry["parameter"] for entry in jacobian.report() if entry["served_by"] == "autodiff")
    assert set(left) == set(case.autodiff)


@pytest.mark.parametrize("case", SOME_CASES)
@pytest.mark.parametrize("batches, count", [(2, 1), (2, 2), (1, 3)])
def test_batches_and_weightings(case: Case, batches: int, count: int):
    network = subject(case)
    x, other = case.inputs(4, batches), case.inputs(3, batches, seed=7)
    J, K = network.explicit(x), network.explicit(other)
    engine = StructuredEngine(network.frozen)
    jacobian, jacobian2 = engine.linearize(x), engine.linearize(other)
    weights = network.variances(count)
    v = torch.randn(max(batches, 1), 2, J.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(jacobian.gram(jacobian, weights), network.weighted(J, J, weights))
    assert_close(jacobian2.gram(jacobian, weights), network.weighted(K, J, weights))
    assert_close(jacobian.diagonal(weights), network.weighted(J, J, weights).diagonal(dim1=-2, dim2=-1))
    assert_close(jacobian2.kernel_matmul(jacobian, v.mT, weights), network.weighted(K, J, weights) @ v.mT)
    assert_close(jacobian2.kernel_matmul(jacobian, v[:1].mT, weights), network.weighted(K, J, weights) @ v[:1].mT)
    many = v.repeat(1, 200, 1).mT
    assert_close(jacobian.kernel_matmul(jacobian, many, weights), network.weighted(J, J, weights) @ many)
    assert_close(jacobian.vjp(v), v @ J)
    u = torch.randn(batches, 2, J.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(jacobian.jvp(u), u @ J.mT)
    single = engine.linearize(x[:1])
    assert_close(single.gram(jacobian, weights), network.weighted(J[:1], J, weights))


@pytest.mark.parametrize("case", SOME_CASES)
def test_many_points_take_several_tiles(case: Case):
    network = subject(case)
    x, other = case.inputs(300), case.inputs(270, seed=5)
    engine = StructuredEngine(network.frozen)
    jacobian, jacobian2 = engine.linearize(x), engine.linearize(other)
    J, K = jacobian.rows(), jacobian2.rows()
    weights = network.variances(1)
    symmetric = jacobian.gram(jacobian, weights)
    assert_close(symmetric, network.weighted(J, J, weights))
    if not case.autodiff:
        assert torch.equal(symmetric, symmetric.mT)
    assert_close(jacobian.gram(jacobian2, weights), network.weighted(J, K, weights))
    rhs = torch.randn(1, J.shape[1], 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_close(jacobian.kernel_matmul(jacobian, rhs, weights), network.weighted(J, J, weights) @ rhs)


@pytest.mark.parametrize("case", SOME_CASES)
def test_points_are_selected_without_the_network(case: Case, monkeypatch):
    if case.autodiff:
        pytest.skip("autodiff evaluates the network")
    network = subject(case)
    x = case.inputs(6, 2)
    jacobian = StructuredEngine(network.frozen).linearize(x)
    J = jacobian.rows()
    outputs = jacobian.function.num_outputs
    monkeypatch.setattr(type(jacobian.function), "__call__", lambda *_: pytest.fail("the network was evaluated"))
    index = torch.tensor([4, 0, 4])
    assert_close(jacobian[index].rows(), J.unflatten(1, (-1, outputs))[:, index].flatten(1, 2))
    assert_close(jacobian[1:3].rows(), J.unflatten(1, (-1, outputs))[:, 1:3].flatten(1, 2))
    weights = network.variances(1)
    assert_close(jacobian[index].gram(jacobian, weights), network.weighted(jacobian[index].rows(), J, weights))


@pytest.mark.parametrize("case", SOME_CASES)
def test_no_points(case: Case):
    network = subject(case)
    engine = StructuredEngine(network.frozen)
    empty, jacobian = engine.linearize(case.inputs(0)), engine.linearize(case.inputs(3))
    weights = network.variances(1)
    P, N = jacobian.function.num_parameters, jacobian.num_rows
    assert empty.gram(jacobian, weights).shape == (1, 0, N)
    assert jacobian.gram(empty, weights).shape == (1, N, 0)
    assert empty.diagonal(weights).shape == (1, 0)
    assert empty.rows().shape == (1, 0, P)
    assert torch.equal(empty.vjp(torch.zeros(1, 2, 0, dtype=torch.float64)), torch.zeros(1, 2, P, dtype=torch.float64))
    assert torch.equal(
        jacobian.kernel_matmul(empty, torch.zeros(1, 0, 2, dtype=torch.float64), weights),
        torch.zeros(1, N, 2, dtype=torch.float64),
    )


@pytest.mark.parametrize("case", SOME_CASES)
def test_over_the_budget_the_numbers_are_the_same(case: Case):
    network = subject(case)
    x, other = case.inputs(7), case.inputs(5, seed=3)
    engine = StructuredEngine(network.frozen)
    held, held2 = engine.linearize(x), engine.linearize(other)
    weights = network.variances(1)
    with settings.memory_budget(12 * engine.plan(held.function, x).bytes_per_point):
        chunked, chunked2 = engine.linearize(x), engine.linearize(other)
        assert isinstance(chunked, ChunkedJacobian) and chunked.nbytes == 0
        rhs = torch.randn(1, held.num_rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u = torch.randn(1, 2, held.function.num_parameters, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        assert_close(chunked.gram(chunked, weights), held.gram(held, weights))
        assert_close(chunked2.gram(chunked, weights), held2.gram(held, weights))
        assert_close(held2.gram(chunked, weights), held2.gram(held, weights))
        assert_close(chunked.gram(held2, weights), held.gram(held2, weights))
        assert_close(chunked.diagonal(weights), held.diagonal(weights))
        assert_close(chunked.rows(), held.rows())
        assert_close(chunked.jvp(u), held.jvp(u))
        assert_close(chunked.vjp(rhs.mT), held.vjp(rhs.mT))
        assert_close(chunked2.kernel_matmul(chunked, rhs, weights), held2.kernel_matmul(held, rhs, weights))
        assert_close(chunked[torch.tensor([5, 1])].rows(), held[torch.tensor([5, 1])].rows())
        assert [e["served_by"] for e in chunked.report()] == [e["served_by"] for e in held.report()]


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that exist at once among those made under it."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("operation", ["linearize", "jvp", "vjp", "diagonal", "gram", "kernel_matmul"])
@pytest.mark.parametrize("name", ["wide", "images"])
def test_the_peak_stays_under_the_budget(name: str, operation: str):
    if name == "wide":
        network, n = FrozenNetwork(mlp(5, 128, 128, 1)), 1200
    else:
        layers = nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(800, 1)
        network, n = FrozenNetwork(nn.Sequential(*layers), input_shape=(2, 12, 12)), 150
    engine = StructuredEngine(network)
    width = 5 if name == "wide" else 288
    x = torch.randn(1, n, width, generator=torch.Generator().manual_seed(0))
    weights, columns = torch.ones(1, 1), torch.ones(1, n, 2)
    held = engine.linearize(x)
    tangents = torch.ones(1, 2, held.function.num_parameters)
    budget = held.nbytes  # the factors alone would fill it
    operations = {
        "linearize": lambda jacobian: engine.linearize(x).x,
        "jvp": lambda jacobian: jacobian.jvp(tangents),
        "vjp": lambda jacobian: jacobian.vjp(columns.mT),
        "diagonal": lambda jacobian: jacobian.diagonal(weights),
        "gram": lambda jacobian: jacobian.gram(jacobian, weights),
        "kernel_matmul": lambda jacobian: jacobian.kernel_matmul(jacobian, columns, weights),
    }
    expected = operations[operation](held)
    with settings.memory_budget(budget):
        jacobian = engine.linearize(x)
        assert isinstance(jacobian, ChunkedJacobian)
        with PeakMemory() as memory:
            result = operations[operation](jacobian)
    assert memory.peak - result.nbytes <= budget
    assert_close(result, expected, 1e-5)


def test_another_path_at_other_inputs_is_never_silently_wrong():
    case = next(case for case in ADVERSARIAL if case.name == "data_dependent")
    network = subject(case)
    engine = StructuredEngine(network.frozen)
    low, high = case.inputs(6).clamp(max=0.5), case.inputs(6, seed=1).abs() + 1.5
    for x in (low, high, torch.cat([low, high], dim=1)):
        assert_close(engine.linearize(x).rows(), network.explicit(x))
    weights = network.variances(1)
    one, two = engine.linearize(low), engine.linearize(high)
    J1, J2 = network.explicit(low), network.explicit(high)
    assert_close(one.gram(two, weights), network.weighted(J1, J2, weights))
    assert_close(two.gram(one, weights), network.weighted(J2, J1, weights))
    rhs = torch.ones(1, J1.shape[1], 1, dtype=torch.float64)
    assert_close(two.kernel_matmul(one, rhs, weights), network.weighted(J2, J1, weights) @ rhs)
    assert_close(two.cross_diagonal(one, weights), network.weighted(J2, J1, weights).diagonal(dim1=-2, dim2=-1))


def test_products_can_be_differentiated():
    case = CASES[0]
    network = subject(case)
    jacobian = StructuredEngine(network.frozen).linearize(case.inputs(4))
    weights = network.variances(1).requires_grad_()
    rhs = torch.randn(1, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: jacobian.kernel_matmul(jacobian, r, w), (rhs, weights), fast_mode=True)
    assert torch.autograd.gradcheck(jacobian.vjp, (rhs.mT.detach().requires_grad_(),), fast_mode=True)


def test_mixed_with_the_autodiff_engine():
    case = CASES[0]
    network = subject(case)
    x, other = case.inputs(4), case.inputs(3, seed=1)
    ours, theirs = StructuredEngine(network.frozen).linearize(x), AutodiffEngine(network.frozen).linearize(other)
    weights = network.variances(1)
    expected = network.weighted(network.explicit(x), network.explicit(other), weights)
    assert_close(ours.gram(theirs, weights), expected)
    assert_close(theirs.gram(ours, weights), expected.mT)


def test_the_random_state_the_network_and_the_modes_are_left_alone():
    network = FrozenNetwork(mlp(3, 4, 1))
    engine = StructuredEngine(network)
    state = torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():
        jacobian = engine.linearize(torch.ones(1, 3, 3))
        jacobian.gram(jacobian, torch.ones(1, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in network.buffers())


def test_what_is_left_to_autodiff_is_logged(caplog):
    case = next(case for case in CASES if case.name == "shared_with_unknown")
    with caplog.at_level(logging.DEBUG, logger="ntk_gp"):
        StructuredEngine(case.frozen()).linearize(case.inputs(3))
    assert "linear.weight is left to autodiff" in caplog.text


def test_engines_can_be_copied_and_pickled():
    network = FrozenNetwork(mlp(3, 4, 1))
    engine = StructuredEngine(network)
    x = torch.ones(1, 2, 3)
    expected = engine.linearize(x).rows()
    assert torch.equal(copy.deepcopy(engine).linearize(x).rows(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(engine)).linearize(x).rows(), expected)


def test_float32_stays_float32():
    network = Subject(mlp(3, 30, 30, 1))
    x = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0))
    jacobian = StructuredEngine(network.frozen).linearize(x)
    assert isinstance(jacobian, StructuredJacobian)
    gram = jacobian.gram(jacobian, torch.ones(1, 1))
    assert gram.dtype == torch.float32
    exact = network.explicit(x.double())
    assert_close(gram.double(), exact @ exact.mT, 1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("stride", "dilation", "groups", "bias"), [(1, 1, 1, True), (2, 1, 2, False), (1, 2, 4, True)])
def test_float32_convolutions_agree_with_float64(dims, stride, dilation, groups, bias):
    """Their per-point gradients are found in another way."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    shape = (4, *(9, 7, 8)[:dims])
    convolution = layer(4, 8, 3, stride, padding=1, dilation=dilation, groups=groups, bias=bias)
    size = convolution(torch.zeros(1, *shape)).numel()
    network = nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(size, 1)).double()
    engine = StructuredEngine(FrozenNetwork(network, input_shape=shape))
    x = torch.randn(2, 5, math.prod(shape), dtype=torch.float64)
    weights = torch.ones(1, 1, dtype=torch.float64)
    exact, rounded = engine.linearize(x), engine.linearize(x.float())
    assert any(isinstance(term, ConvolutionTerm) for term in rounded.terms)
    for actual, expected in (
        (rounded.rows(), exact.rows()),
        (rounded.diagonal(weights.float()), exact.diagonal(weights)),
        (rounded.gram(rounded, weights.float()), exact.gram(exact, weights)),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
