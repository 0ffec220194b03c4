"""[J, Ψ] against the same matrix written out, for each method of the interface."""

import copy
import pickle

import pytest
import torch

from ntk_gp.jacobian.columns import Inputs, Ones, Values, products
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.jacobian.widened import WidenedLinearization
from ntk_gp.network import FrozenNetwork
from tests import references
from tests.adapted import assert_close, data, network


def _layer(name: str) -> str:
    return name[0]


class Case:
    """A network of C outputs, at B batches of points, with a group for each layer and known columns beside."""

    def __init__(self, outputs: int = 1, batch: int = 1, n: int = 6):
        self.net = network(outputs=outputs)
        frozen = FrozenNetwork(self.net, output="all", group_by=_layer)
        self.columns = [Values(outputs, FrozenNetwork(self.net, output="all")), Ones(outputs)]
        if outputs == 1:
            self.columns += [Inputs(3, ard=True), Inputs(3, ard=False)]
        self.linearization = WidenedLinearization(Linearization(frozen), self.columns)
        self.x, self.other_x = data(n, batch)[0], data(4, batch, seed=1)[0]
        self.jacobian, self.other = self.linearization.jacobian(self.x), self.linearization.jacobian(self.other_x)
        own = [outputs, outputs, *([1, 1, 1, 3] if outputs == 1 else [])]
        sizes = torch.tensor([32, 8 * outputs + outputs, *own])
        self.group_of = torch.arange(len(sizes)).repeat_interleave(sizes)
        self.generator = torch.Generator().manual_seed(0)

    def rows(self, x):
        values = self.net(x)
        outputs = values.shape[-1]
        ones = torch.eye(outputs, dtype=x.dtype)
        gain = (values.unsqueeze(-1) * ones).flatten(-3, -2)
        offset = ones.expand(*x.shape[:-1], outputs, outputs).flatten(-3, -2)
        pieces = [references.jacobian(self.net, x), gain, offset, *([x, x] if outputs == 1 else [])]
        return torch.cat(pieces, dim=-1)

    def random(self, *shape):
        return torch.rand(*shape, dtype=torch.float64, generator=self.generator)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_method(outputs, batch):
    case = Case(outputs, batch)
    jacobian, other, rows, other_rows = case.jacobian, case.other, case.rows(case.x), case.rows(case.other_x)
    size, groups = rows.shape[-1], int(case.group_of.max()) + 1
    function = jacobian.function
    assert (function.num_parameters, function.num_groups) == (size, groups)
    assert jacobian.num_rows == 6 * outputs
    assert jacobian.nbytes >= jacobian.columns.nbytes
    assert_close(jacobian.rows(), rows)
    tangents, cotangents = case.random(1, 3, size), case.random(1, 3, 6 * outputs)
    assert_close(jacobian.jvp(tangents), tangents @ rows.mT)
    assert_close(jacobian.vjp(cotangents), (cotangents @ rows))
    index = torch.tensor([0, size - 1, 5, size - 2])
    assert_close(jacobian.some_columns(index), rows[..., index])
    assert_close(jacobian.some_columns(index[1:2]), rows[..., index[1:2]])
    for weightings in {1, batch}:
        variances = case.random(weightings, groups)
        expanded = variances[:, case.group_of].unsqueeze(-2)
        assert_close(function.expand_variances(variances).unsqueeze(-2), expanded)
        gram, cross = (rows * expanded) @ rows.mT, (rows * expanded) @ other_rows.mT
        rhs = case.random(1, 4 * outputs, 2)
        for of in (jacobian, case.linearization):
            of_gram = of.gram if of is jacobian else lambda *a: case.linearization.gram(jacobian, *a)
            of_product = (
                of.kernel_matmul if of is jacobian else lambda *a: case.linearization.kernel_matmul(jacobian, *a)
            )
            assert_close(of_gram(jacobian, variances), gram)
            assert_close(of_gram(other, variances), cross)
            assert_close(of_product(other, rhs, variances), cross @ rhs)
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        assert_close(jacobian.diagonal(variances), diagonal)
        assert_close(case.linearization.diagonal(jacobian, jacobian, variances), diagonal)
        some = jacobian[torch.tensor([4, 1])]
        ends = jacobian[2:4]
        picked = rows.unflatten(1, (6, outputs))
        first, second = (picked[:, i].flatten(1, 2) for i in ([4, 1], [2, 3]))
        assert_close(some.rows(), first)
        assert_close(some.cross_diagonal(ends, variances), (first * expanded * second).sum(-1))


def test_more_weightings_than_batches():
    case = Case()
    variances = case.random(3, int(case.group_of.max()) + 1).requires_grad_()
    rows = case.rows(case.x)
    expected = (rows * variances[:, case.group_of].unsqueeze(-2)) @ rows.mT
    actual = case.linearization.gram(case.jacobian, case.jacobian, variances)
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(v.square().sum(), variances)[0] for v in (actual, expected)))


def test_gradients_to_inputs():
    case = Case()
    x = case.x.requires_grad_()
    jacobian = case.linearization.jacobian(x)
    tangents = case.random(1, 2, jacobian.function.num_parameters)
    parameters = list(case.net.parameters())
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, create_graph=True)])
            for value in case.net(x).flatten()
        ]
    )
    values = case.net(x)[0]
    wide = torch.cat([rows, values, torch.ones_like(values), x[0], x[0]], dim=-1)
    for actual in (jacobian.jvp(tangents), tangents @ jacobian.rows().mT):
        expected = tangents @ wide.mT
        assert_close(actual, expected)
        grads = [torch.autograd.grad(v.square().sum(), x, retain_graph=True)[0] for v in (actual, expected)]
        assert_close(*grads)


def test_grams_of_the_network_are_kept_for_all():
    case = Case()
    alone, base = case.linearization.of_network, case.jacobian.base
    variances = torch.ones(1, 2, dtype=torch.float64)
    alone.gram(base, base, variances)
    kept = len(alone._cache._entries)
    everything = torch.ones(1, case.linearization.network.num_groups, dtype=torch.float64)
    case.linearization.gram(case.jacobian, case.jacobian, everything)
    WidenedLinearization(alone, case.columns[1:]).jacobian(case.x)
    assert len(alone._cache._entries) == kept + 1  # other columns, and nothing else


def test_columns_follow_their_network():
    case = Case()
    frozen = case.columns[0].network
    before = case.linearization.network.fingerprint()
    other = FrozenNetwork(network(seed=1), output="all")
    frozen.load_state_dict(other.state_dict())
    assert case.linearization.network.fingerprint() != before
    assert_close(case.linearization.jacobian(case.x).columns[..., :1], network(seed=1)(case.x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_copies(copied):
    case = Case()
    assert_close(copied(case.linearization).jacobian(case.x).rows(), case.jacobian.rows())


@pytest.mark.parametrize("outputs", [1, 3])
def test_products_from_known_values(outputs):
    case = Case(outputs)
    weights = case.random(5, case.jacobian.columns.shape[-1])
    actual = products(case.columns, case.x[0], case.net(case.x[0]), weights)
    assert_close(actual.flatten(1), weights @ case.jacobian.columns[0].mT)


def test_report():
    report = Case().jacobian.report()
    assert [entry["parameter"] for entry in report][-1] == "known features"
    assert len(report) == 5
