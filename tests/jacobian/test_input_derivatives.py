"""Derivatives of Gram matrices by the inputs, against explicit Jacobians with a graph."""

import pytest
import torch
from torch import nn

from ntk_gp import NTKKernel, settings
from ntk_gp.jacobian import autodiff
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.jacobian.modes import Modes
from ntk_gp.network import FrozenNetwork, are_one_slice, without_needless_graph
from tests import references


def _layer(name):
    return name[0]


def _network(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def _inputs(*shape, seed=0):
    return torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["transforms", "rows"])
def way(request, monkeypatch):
    """By forward mode of many points together, and by rows of J with a graph."""
    monkeypatch.setattr(Modes, "together", lambda self, count: request.param == "transforms")
    return request.param


def _check(outputs, shape1, shape2, variances, same=False):
    """All derivatives of a weighted sum of the entries, and of the diagonal's, where there is one."""
    net = _network(outputs)
    frozen = FrozenNetwork(net, output="all", group_by=_layer if variances.shape[-1] > 1 else None)
    linearization = Linearization(frozen)
    x1 = _inputs(*shape1).requires_grad_()
    x2 = x1 if same else _inputs(*shape2, seed=1).requires_grad_()
    sizes = [p.numel() for p in net.parameters()]
    groups = torch.tensor([0, 0, 1, 1] if variances.shape[-1] > 1 else [0, 0, 0, 0])
    expanded = variances[:, groups.repeat_interleave(torch.tensor(sizes))].unsqueeze(-2)
    rows1, rows2 = references.jacobian(net, x1), references.jacobian(net, x2)
    expected = (rows1 * expanded) @ rows2.mT
    jacobian1 = linearization.jacobian(x1)
    jacobian2 = jacobian1 if same else linearization.jacobian(x2)
    leaves = [x1, variances] if same else [x1, x2, variances]
    pairs = [(linearization.gram(jacobian1, jacobian2, variances), expected)]
    if x1.shape[1] == x2.shape[1]:
        found = linearization.diagonal(jacobian1, jacobian2, variances)
        pairs.append((found, expected.diagonal(dim1=-2, dim2=-1)))
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
        weights = torch.randn(wanted.shape, dtype=torch.float64)
        grads, wanted_grads = (
            torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True) for value in (actual, wanted)
        )
        for one, other in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("same", [False, True])
def test_one_group(way, outputs, same):
    _check(outputs, (1, 4), (1, 4), torch.tensor([[1.7]], dtype=torch.float64, requires_grad=True), same)


@pytest.mark.parametrize("batches", [(2, 1), (1, 2), (2, 2)])
def test_groups_and_batches(way, batches):
    variances = torch.tensor([[0.7, 1.3], [0.2, 2.0]], dtype=torch.float64, requires_grad=True)
    _check(1, (batches[0], 3), (batches[1], 5), variances)


def test_many_weightings_of_one_batch(way):
    variances = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    _check(1, (1, 3), (1, 3), variances, same=True)


def test_in_blocks(way):
    """Where vectors for all points have no room, they are taken a few at a time, and there is no tap."""
    with settings.memory_budget(1 << 14):
        _check(2, (1, 9), (1, 9), torch.ones(1, 1, dtype=torch.float64, requires_grad=True))


def test_second_derivatives():
    kernel = NTKKernel(_network(), engine="structured")
    x, z = _inputs(2).requires_grad_(), _inputs(3, seed=1)
    assert torch.autograd.gradgradcheck(lambda x: kernel(x, z).to_dense(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: kernel(x).to_dense(), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: kernel(x, diag=True), x, fast_mode=True)


def test_mixed_second_derivatives_reach_inputs_and_variances():
    net = _network()
    kernel = NTKKernel(net, variance_groups="layer").double()
    x = _inputs(3).requires_grad_()
    leaves = [x, kernel.raw_variance]
    sizes = torch.tensor([p.numel() for p in net.parameters()])
    expanded = kernel.variance[..., torch.tensor([0, 0, 1, 1]).repeat_interleave(sizes)]
    results = []
    for matrix in (kernel(x).to_dense(), references.kernel(net, x, variances=expanded)):
        first = torch.autograd.grad(matrix.square().sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_forward_records_no_rows(monkeypatch):
    """The rows of J have no graph where forward mode serves; and J(x) of slices alike is captured once."""
    recorded = []
    rows = autodiff.AutodiffJacobian.rows
    monkeypatch.setattr(Modes, "together", lambda self, count: True)
    monkeypatch.setattr(
        autodiff.AutodiffJacobian, "rows", lambda self: recorded.append(self.x.requires_grad) or rows(self)
    )
    kernel = NTKKernel(_network())
    z, x = _inputs(3).requires_grad_(), _inputs(5, seed=1)
    full = torch.cat([z, x])
    matrix = kernel(full)
    (matrix[:3, :3].to_dense().sum() + matrix[:3, 3:].to_dense().sum() + matrix[3:, 3:].diagonal().sum()).backward()
    assert not any(recorded)
    own = references.kernel(_network(), torch.cat([wanted := _inputs(3).requires_grad_(), x]))
    (own[:3, :3].sum() + own[:3, 3:].sum()).backward()
    torch.testing.assert_close(z.grad, wanted.grad, rtol=1e-10, atol=1e-12)


def test_inputs_changed_in_place_are_seen():
    """While a graph of the old ones is alive."""
    kernel, net = NTKKernel(_network()), _network()
    z = nn.Parameter(_inputs(3))
    before = kernel(z).to_dense()
    z.data.mul_(2.0)
    torch.testing.assert_close(kernel(z).to_dense(), references.kernel(net, z), rtol=1e-10, atol=1e-12)
    assert before.requires_grad


def test_changed_network_is_seen():
    kernel, net = NTKKernel(_network()), _network()
    z = _inputs(3).requires_grad_()
    before = kernel(z).to_dense()
    for module in (kernel.network.tensors, net):
        with torch.no_grad():
            for tensor in [*module.buffers(), *module.parameters()]:
                tensor.mul_(1.5)
    torch.testing.assert_close(kernel(z).to_dense(), references.kernel(net, z), rtol=1e-10, atol=1e-12)
    assert before.requires_grad


def test_parts_without_derivatives_are_detached():
    z, x = _inputs(3).requires_grad_(), _inputs(5)
    part = torch.cat([z, x])[..., 3:, :]
    assert part.requires_grad
    assert not without_needless_graph(part).requires_grad
    torch.testing.assert_close(without_needless_graph(part), x, rtol=0, atol=0)
    of_three = torch.cat([x, z, x])[..., :5, :]  # how long each constant is, the graph does not say
    assert without_needless_graph(of_three) is of_three
    full = torch.cat([z.expand(2, 3, 3), x.expand(2, 5, 3)], dim=-2)
    assert not without_needless_graph(full[..., 3:, :]).requires_grad
    assert not without_needless_graph(full[:1, 4:6, :2]).requires_grad
    for kept in (full, full[..., 2:, :], full[..., :3, :], full[..., 3:, :] * 1.0, full[..., 3::2, :], z, z[:1]):
        assert without_needless_graph(kept) is kept
    assert without_needless_graph(x) is x


def test_slices_alike():
    z, x = _inputs(4).requires_grad_(), _inputs(5)
    full = torch.cat([z, x])
    assert are_one_slice(full[:3], full[:3]) and are_one_slice(z[1:][1:], z[2:]) and are_one_slice(z[-2:], z[2:])
    assert are_one_slice(z.unsqueeze(0)[:, 1:], z[1:].reshape(1, 3, 3))
    assert not are_one_slice(full[:3], full[1:4]) and not are_one_slice(full[:3], torch.cat([z, x])[:3])
    assert not are_one_slice(z[:2], z.detach().requires_grad_()[:2]) and not are_one_slice(z[::2], z[:2])
    assert not are_one_slice(z.reshape(3, 4), z.reshape(4, 3)) and not are_one_slice(z.reshape(3, 4)[:2], z[:2])
