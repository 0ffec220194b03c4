from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from ntk_gp import settings
from ntk_gp.jacobian.autodiff import AutodiffEngine, AutodiffJacobian
from ntk_gp.network import FrozenNetwork
from tests import layers, references


def linearize(network: nn.Module, x: Tensor, **options) -> AutodiffJacobian:
    return AutodiffEngine(FrozenNetwork(network, **options)).linearize(x)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


@pytest.mark.parametrize("name", [*layers.NETWORKS, *layers.ONCE_DIFFERENTIABLE])
def test_products_equal_the_explicit_jacobian(name):
    network, x = layers.make(name)
    expected = references.jacobian(network, x)
    jacobian = linearize(network, x.unsqueeze(0))
    u, v = torch.randn(1, 3, expected.shape[1], dtype=x.dtype), torch.randn(1, 3, len(x), dtype=x.dtype)
    ones = torch.ones(1, 1, dtype=x.dtype)
    assert_close(jacobian.rows()[0], expected)
    assert_close(jacobian.jvp(u)[0], u[0] @ expected.mT)
    assert_close(jacobian.jvp(u[:, :1])[0], u[0, :1] @ expected.mT)
    assert_close(jacobian.vjp(v)[0], v[0] @ expected)
    assert_close(jacobian.vjp(v[:, :1])[0], v[0, :1] @ expected)
    assert_close(jacobian.gram(jacobian, ones)[0], expected @ expected.mT)
    assert_close(jacobian.diagonal(ones)[0], expected.square().sum(-1))


def finite_differences(
    network: nn.Module, x: Tensor, direction: Tensor, u: Tensor, v: Tensor, step: float = 1e-6
) -> Tensor:
    """The derivative of vᵀ J(x) u along a direction for each point, by central differences of the explicit Jacobian."""
    shift = step * direction
    difference = references.jacobian(network, x + shift) - references.jacobian(network, x - shift)
    return v * (difference @ u) / (2 * step)


@pytest.mark.parametrize("name", layers.NETWORKS)
def test_input_gradients_equal_finite_differences(name):
    """Torch has operators whose derivative, differentiated once more, is wrong without a word."""
    network, x = layers.make(name)
    num_parameters = references.jacobian(network, x[:1]).shape[1]
    us, vs = torch.randn(1, 2, num_parameters, dtype=x.dtype), torch.randn(1, 2, len(x), dtype=x.dtype)
    u, v = us[0, 0], vs[0, 0]
    directions = torch.randn(2, *x.shape, dtype=x.dtype)  # no wrong gradient is orthogonal to both
    expected = torch.stack([finite_differences(network, x, direction, u, v) for direction in directions])
    ways = {
        "jvp": lambda jacobian: jacobian.jvp(us[:, :1])[0, 0] @ v,
        "jvp, two columns": lambda jacobian: jacobian.jvp(us)[0, 0] @ v,
        "vjp": lambda jacobian: jacobian.vjp(vs[:, :1])[0, 0] @ u,
        "vjp, two columns": lambda jacobian: jacobian.vjp(vs)[0, 0] @ u,
        "rows": lambda jacobian: v @ jacobian.rows()[0] @ u,
    }
    for way, product in ways.items():
        points = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            product(linearize(network, points.unsqueeze(0))), points, allow_unused=True, materialize_grads=True
        )
        slopes = (gradient * directions).sum(-1)
        torch.testing.assert_close(slopes, expected, rtol=1e-5, atol=1e-6, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("name", layers.ONCE_DIFFERENTIABLE)
def test_what_torch_cannot_differentiate_again_raises(name):
    """Also where `torch.autograd.grad` would not ask for it."""
    network, x = layers.make(name)
    x = x.unsqueeze(0).requires_grad_()
    with pytest.raises(NotImplementedError):
        torch.autograd.grad(linearize(network, x).rows().sum(), x)


@pytest.mark.parametrize("name", ["Tanh", "LSTM", "weight_norm", "cdist", "MultiheadAttention", "BatchNorm2d"])
def test_batches_outputs_and_chunks(name):
    """Batches of points, of vectors and of weights broadcast; a budget of nothing takes points one by one."""
    network, x = layers.make(name)
    network = nn.Sequential(network, nn.Linear(1, 3).double())
    x = torch.stack([x, x.flip(0), x + 0.1])
    expected = references.jacobian(network, x)
    u = torch.randn(3, 2, expected.shape[-1], dtype=x.dtype)
    v = torch.randn(3, 2, expected.shape[-2], dtype=x.dtype)
    groups = {name: i % 2 for i, (name, _) in enumerate(network.named_parameters())}
    weights = torch.rand(3, 2, dtype=x.dtype) + 0.5
    expanded = torch.cat(
        [weights[:, groups[name], None].expand(3, p.numel()) for name, p in network.named_parameters()], dim=-1
    )
    for budget in (1, 10**9):
        with settings.memory_budget(budget):
            jacobian = linearize(network, x, output="all", group_by=lambda name: str(groups[name]))
            first = jacobian[torch.tensor([2, 0])]
            assert_close(jacobian.jvp(u), u @ expected.mT)
            assert_close(jacobian.jvp(u[:1]), u[:1] @ expected.mT)
            assert_close(jacobian.vjp(v), v @ expected)
            assert_close(jacobian.vjp(v[:1]), v[:1] @ expected)
            assert_close(jacobian.diagonal(weights), (expected.square() * expanded.unsqueeze(-2)).sum(-1))
            gram = (expected * expanded.unsqueeze(-2)) @ expected.mT
            assert_close(jacobian.gram(jacobian, weights), gram)
            assert_close(first.gram(jacobian, weights), gram[:, [6, 7, 8, 0, 1, 2]])
            assert_close(first.cross_diagonal(jacobian[1:3], weights), gram[:, [6, 7, 8, 0, 1, 2], [3, 4, 5, 6, 7, 8]])
            assert_close(
                jacobian.kernel_matmul(first, v[..., :6].mT, weights), gram[..., [6, 7, 8, 0, 1, 2]] @ v[..., :6].mT
            )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "is_formed"), [(40, True), (2, False)])
def test_a_block_is_formed_for_many_columns(monkeypatch, symmetric, columns, is_formed):
    """That takes as many passes as there are rows, not two for each column; where it has no room, columns do."""
    network, x = layers.make("GELU_tanh")
    x = torch.randn(20, x.shape[1], dtype=x.dtype)
    other = x if symmetric else x[:15] + 0.1
    J, K = references.jacobian(network, x), references.jacobian(network, other)
    left = linearize(network, x.unsqueeze(0))
    right = left if symmetric else linearize(network, other.unsqueeze(0))
    rhs, ones = torch.randn(1, len(K), columns, dtype=x.dtype), torch.ones(1, 1, dtype=x.dtype)
    expected = J @ K.mT @ rhs[0]
    with settings.memory_budget(64):
        assert_close(left.kernel_matmul(right, rhs, ones)[0], expected)
    products = []
    monkeypatch.setattr(AutodiffJacobian, "jvp", lambda self, u: products.append(u) or u @ J.mT)
    assert_close(left.kernel_matmul(right, rhs, ones)[0], expected)
    assert (len(products) == 0) == is_formed


def test_no_points_and_no_vectors():
    network, x = layers.make("Tanh")
    empty = linearize(network, x[:0].unsqueeze(0))
    full = linearize(network, x.unsqueeze(0))
    ones = torch.ones(1, 1, dtype=x.dtype)
    u, v = torch.randn(1, 2, 37, dtype=x.dtype), torch.zeros(1, 2, 0, dtype=x.dtype)
    assert empty.jvp(u).shape == (1, 2, 0)
    assert torch.equal(empty.vjp(v), torch.zeros(1, 2, 37, dtype=x.dtype))
    assert empty.rows().shape == (1, 0, 37)
    assert empty.diagonal(ones).shape == (1, 0)
    assert empty.gram(full, ones).shape == (1, 0, 5)
    assert full.gram(empty, ones).shape == (1, 5, 0)
    assert full.jvp(u[:, :0]).shape == (1, 0, 5)
    assert full.vjp(torch.zeros(1, 0, 5, dtype=x.dtype)).shape == (1, 0, 37)


@pytest.mark.parametrize(
    "name", ["Tanh", "MultiheadAttention", "TransformerEncoderLayer", "LSTM", "weight_norm", "cdist"]
)
def test_works_in_inference_mode(name):
    network, x = layers.make(name)
    expected = references.jacobian(network, x)
    u = torch.randn(1, 2, expected.shape[1], dtype=x.dtype)
    with torch.inference_mode():
        jacobian = linearize(network, x.unsqueeze(0).clone())
        assert_close(jacobian.jvp(u)[0], u[0] @ expected.mT)
        assert_close(jacobian.vjp(u[..., :5])[0], u[0, :, :5] @ expected)


def test_a_network_linear_in_its_parameters_is_its_own_linearisation():
    """f(x; w) = w·φ(x): J(x) = φ(x) exactly, and f(x) = J(x) w."""
    torch.manual_seed(0)
    head = nn.Linear(6, 1, bias=False).double()
    features = nn.Linear(3, 6).double().requires_grad_(False)
    network = nn.Sequential(features, nn.Tanh(), head)
    x = torch.randn(7, 3, dtype=torch.float64)
    jacobian = linearize(network, x.unsqueeze(0))
    with torch.no_grad():
        assert torch.equal(jacobian.rows()[0], torch.tanh(features(x)))
        assert_close(jacobian.jvp(head.weight.unsqueeze(0))[0, 0], network(x).squeeze(-1), tolerance=1e-15)


def test_several_threads_at_once():
    network = nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    engine = AutodiffEngine(FrozenNetwork(network))
    inputs = torch.randn(64, 1, 100, 3, dtype=torch.float64)
    tangents = torch.randn(1, 1, sum(parameter.numel() for parameter in network.parameters()), dtype=torch.float64)
    expected = [engine.linearize(x).jvp(tangents) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        actual = pool.map(lambda x: engine.linearize(x).jvp(tangents), inputs)
        for result, reference in zip(actual, expected, strict=True):
            assert_close(result, reference)


def test_within_the_users_own_transforms():
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = references.jacobian(network, x)
    jacobian = linearize(network, x.unsqueeze(0))
    u = torch.randn(1, 1, expected.shape[1], dtype=x.dtype)
    scale = torch.tensor(2.0, dtype=x.dtype)
    product, slope = torch.func.jvp(lambda s: jacobian.jvp(s * u), (scale,), (torch.ones_like(scale),))
    assert_close(product[0], 2.0 * u[0] @ expected.mT)
    assert_close(slope[0], u[0] @ expected.mT)
    many = torch.func.vmap(lambda s: jacobian.jvp(s * u))(torch.arange(3.0, dtype=x.dtype))
    assert_close(many[:, 0], torch.arange(3.0, dtype=x.dtype)[:, None, None] * (u[0] @ expected.mT))
