"""Networks that the transforms of `torch.func` refuse, or of which they say something else than plain autograd: they
are served as autograd has them, in every operation, by either engine."""

from __future__ import annotations

import threading
from collections.abc import Callable

import gpytorch
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.jacobian.forward_mode import DualLevel, dual_level, value_and_tangent

N = 9


class Packed(nn.Module):
    """Sequences of different lengths."""

    def __init__(self, outputs: int):
        super().__init__()
        self.recurrent, self.head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (x[:, 0].abs() * 2).long().clamp(1, x.shape[1] - 1).cpu()
        packed = pack_padded_sequence(x[:, 1:, None], lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1][-1])


class Square(torch.autograd.Function):
    """In the old form, which transforms refuse."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0) ** 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * 2 * ctx.saved_tensors[0].clamp(min=0)


class Layers(nn.Module):
    """Two layers, and something in between or around."""

    def __init__(self, outputs: int, between: Callable[[Layers, Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 6), nn.Linear(6, outputs), between
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, x))


def _log(net: Layers, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    net.log = float(h.detach().numpy().mean())
    return h


def _item(net: Layers, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    net.largest = h.abs().max().item()
    return h


def _count(net: Layers, x: Tensor) -> Tensor:
    net.calls += 1
    return torch.tanh(net.first(x))


def _hook(net: Layers, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    return h


def _slope(net: Layers, x: Tensor) -> Tensor:
    """The gradient of a layer with respect to its inputs, inside the network."""
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(torch.tanh(net.first(z)).sum(), z, create_graph=True)
    return torch.tanh(net.first(x)) * slope[:, :1]


def _transformed(net: Layers, x: Tensor) -> Tensor:
    slope = torch.func.vmap(torch.func.grad(lambda z: torch.tanh(net.first(z)).sum()))(x)
    return torch.tanh(net.first(x)) * slope[:, :1]


def _sparse(net: Layers, x: Tensor) -> Tensor:
    matrix = torch.eye(6, dtype=x.dtype).add(0.5).to_sparse()
    return torch.sparse.mm(matrix, torch.tanh(net.first(x)).mT).mT


def _branch(net: Layers, x: Tensor) -> Tensor:
    h = net.first(x)
    return torch.stack([torch.tanh(row) if float(row.detach()[0]) > 0 else torch.sin(row) for row in h])


BETWEEN: dict[str, Callable[[Layers, Tensor], Tensor]] = {
    "checkpointed": lambda net, x: checkpoint(lambda z: torch.tanh(net.first(z)), x, use_reentrant=False),
    "checkpointed in the middle": lambda net, x: checkpoint(torch.tanh, net.first(x), use_reentrant=True),
    "old function": lambda net, x: Square.apply(net.first(x)),
    "logged": _log,
    "item": _item,
    "counted": _count,
    "hooked": _hook,
    "gradient required": lambda net, x: torch.tanh(net.first(x).requires_grad_(True)),
    "slope inside": _slope,
    "torch.func inside": _transformed,
    "sparse": _sparse,
    "branches": _branch,
}
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "packed": Packed,
    **{name: lambda outputs, between=between: Layers(outputs, between) for name, between in BETWEEN.items()},
}
# What can be differentiated just once: there are no gradients with respect to inputs.
ONCE = ("checkpointed", "checkpointed in the middle")


def explicit(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """J (N·C, P) and f (N, C), by plain autograd, row by row."""
    parameters = list(network.parameters())
    rows, values = [], []
    for row in x:
        out = network(row[None].clone()).reshape(-1)
        values.append(out.detach())
        for c in range(len(out)):
            for parameter in parameters:
                parameter.grad = None
            network(row[None].clone()).reshape(-1)[c].backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            rows.append(torch.cat([g.flatten() for g in gradients]))
    for parameter in parameters:
        parameter.grad = None
    return torch.stack(rows), torch.stack(values)


def make(name: str, outputs: int = 1) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name](outputs).double().eval(), torch.randn(N, 4, dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("engine", ["structured", "autodiff"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_operation(name, engine, outputs):
    network, x = make(name, outputs)
    J, f = explicit(network, x)
    options = {"output": "all"} if outputs > 1 else {}
    kernel, mean = NTKKernel(network, engine=engine, **options), NetworkMean(network, **options)
    u, v = torch.randn(J.shape[1], 2, dtype=torch.float64), torch.randn(len(J), 2, dtype=torch.float64)
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(mean(x).reshape(f.shape), f, **close)
    torch.testing.assert_close(kernel(x).to_dense(), J @ J.T, **close)
    torch.testing.assert_close(kernel(x) @ v, J @ (J.T @ v), **close)
    torch.testing.assert_close(kernel(x, diag=True), (J @ J.T).diagonal(), **close)
    torch.testing.assert_close(kernel.jacobian(x) @ u, J @ u, **close)
    torch.testing.assert_close(kernel.jacobian(x).mT @ v, J.T @ v, **close)
    torch.testing.assert_close(kernel.jacobian(x).to_dense(), J, **close)


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, engine: str):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().to(x))
        self.likelihood.noise = 0.1
        self.mean_module, self.covar_module = NetworkMean(network), NTKKernel(network, engine=engine)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
@pytest.mark.parametrize("name", NETWORKS)
def test_posteriors(name, engine):
    network, x = make(name)
    y = torch.randn(6, dtype=torch.float64)
    J, f = explicit(network, x)
    A, B = J[:6], J[6:]
    S = A @ A.T + 0.1 * torch.eye(6, dtype=torch.float64)
    mean = f[6:, 0] + B @ A.T @ torch.linalg.solve(S, y - f[:6, 0])
    covariance = B @ B.T - B @ A.T @ torch.linalg.solve(S, A @ B.T)
    model = Model(x[:6], y, network, engine).eval()
    with torch.no_grad():
        prediction = model(x[6:])
    torch.testing.assert_close(prediction.mean, mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(prediction.covariance_matrix, covariance, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ntk_gp.adapted_network(model)(x[6:]).detach(), mean, rtol=1e-8, atol=1e-9)
    functions = ntk_gp.draw_functions(model, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(functions(x[6:]).detach(), f[6:, 0] + functions.weights @ B.T, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
@pytest.mark.parametrize("quantity", ["mean", "variance"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in (*ONCE, "slope inside", "packed", "hooked")])
def test_gradients_with_respect_to_inputs(name, quantity, engine):
    network, x = make(name)
    model = Model(x[:6], torch.randn(6, dtype=torch.float64), network, engine).eval()
    z, d, h = x[6:].clone().requires_grad_(), torch.randn(N - 6, 4, dtype=torch.float64), 1e-5
    (slope,) = torch.autograd.grad(getattr(model(z), quantity).sum(), z)
    with torch.no_grad():
        difference = sum(s * getattr(model(x[6:] + s * h * d), quantity).sum() for s in (1, -1)) / (2 * h)
    torch.testing.assert_close((slope * d).sum(), difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ONCE)
def test_what_has_no_second_derivatives_says_so(name):
    network, x = make(name)
    model = Model(x[:6], torch.randn(6, dtype=torch.float64), network, "autodiff").eval()
    try:
        (slope,) = torch.autograd.grad(model(x[6:].requires_grad_()).mean.sum(), x)
    except (NotImplementedError, RuntimeError) as error:
        assert str(error)
    else:
        assert torch.isfinite(slope).all()


# Forward mode and reverse mode


class Padded(nn.Module):
    """A tied table, whose row 0 has no gradient where it is looked up; forward mode ignores that."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 3, padding_idx=0), nn.Linear(3, 3)
        with torch.no_grad():
            self.table.weight[0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(self.table(x.long()).mean(1)))
        return torch.einsum("nd,vd->nv", h, self.table.weight)[:, 3]


class Ties(nn.Module):
    def __init__(self, reduce: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.head, self.reduce = nn.Parameter(torch.ones(4, 6)), nn.Linear(1, 1), reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.reduce(torch.relu(x @ self.weight)).reshape(len(x), 1))


def _scatter_max(h: Tensor) -> Tensor:
    index = torch.zeros(h.shape, dtype=torch.long)
    return torch.zeros(len(h), 1, dtype=h.dtype).scatter_reduce(1, index, h, "amax", include_self=False)


@pytest.mark.parametrize("first_rows_padded", [False, True])
def test_padded_embeddings(first_rows_padded):
    torch.manual_seed(0)
    network = Padded().double()
    x = torch.randint(1, 10, (30, 3)).double()
    x[slice(0, 5) if first_rows_padded else slice(15, None), 1] = 0
    J, _ = explicit(network, x)
    u = torch.randn(J.shape[1], 3, dtype=torch.float64)
    for engine in ("structured", "autodiff"):
        kernel = NTKKernel(network, engine=engine)
        for rows in (x[5:15], x):
            torch.testing.assert_close(
                kernel.jacobian(rows) @ u, explicit(network, rows)[0] @ u, rtol=1e-10, atol=1e-11
            )


@pytest.mark.parametrize(
    "reduce",
    [
        lambda h: h.amax(1),
        lambda h: h.max(1).values,
        lambda h: F.max_pool1d(h.unsqueeze(1), 6),
        lambda h: F.adaptive_max_pool1d(h.unsqueeze(1), 1),
        lambda h: h.sort(1).values[:, -1],
        lambda h: h.topk(2, 1).values.sum(1),
        lambda h: h.median(1).values,
        lambda h: h.cummax(1).values.sum(1),
        _scatter_max,
    ],
    ids=["amax", "max", "max pool", "adaptive max pool", "sort", "topk", "median", "cummax", "scatter"],
)
def test_ties(reduce):
    """All of a row's activations are equal: there J is what reverse mode says, for J u as for Jᵀ v."""
    network = Ties(reduce).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    J, _ = explicit(network, x)
    u = torch.randn(J.shape[1], 2, dtype=torch.float64)
    for engine in ("structured", "autodiff"):
        kernel = NTKKernel(network, engine=engine)
        v = torch.randn(20, 1, dtype=torch.float64)
        pulled = kernel.jacobian(x).mT @ v
        torch.testing.assert_close(v.mT @ (kernel.jacobian(x) @ u), pulled.mT @ u, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(kernel(x) @ v, kernel(x).to_dense() @ v, rtol=1e-9, atol=1e-10)


@torch.jit.script
def scripted_swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
@pytest.mark.parametrize("quantity", ["mean", "variance"])
def test_scripted_functions(quantity, engine):
    """Compiled anew after a few calls, they have other second derivatives under transforms."""

    def slope(swish: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        network = Layers(1, lambda net, x: swish(net.first(x))).double()
        x = torch.randn(8, 4, dtype=torch.float64)
        model = Model(x, torch.randn(8, dtype=torch.float64), network, engine).eval()
        z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(4):
            (found,) = torch.autograd.grad(getattr(model(z), quantity).sum(), z)
        return found

    torch.testing.assert_close(slope(scripted_swish), slope(lambda z: z * z.sigmoid()), rtol=1e-9, atol=1e-11)


# Threads


def test_the_level_of_dual_numbers_is_shared_or_taken():
    level, together, most, inside = DualLevel(), threading.Barrier(4), [0], [0]
    lock = threading.Lock()

    def work(number: int) -> None:
        together.wait()
        for i in range(60):
            alone = (i + number) % 3 == 0
            with level.alone() if alone else level.shared():
                with lock:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    assert not alone or inside[0] == 1
                if not alone:
                    with level.shared():  # nested
                        assert torch.autograd.forward_ad._current_level == 0
                with lock:
                    inside[0] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] >= 1 and inside[0] == 0
    assert torch.autograd.forward_ad._current_level == -1


def test_forward_mode_from_threads_that_fail_now_and_then():
    x, w = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    expected = x.cos() * w
    wrong: list[float] = []

    def sine(p: dict[str, Tensor], **_: object) -> Tensor:
        return p["x"].sin()

    def fail(p: dict[str, Tensor], **_: object) -> Tensor:
        return p["x"] / (1 / 0)

    def work(number: int) -> None:
        for i in range(50):
            recorded = (i + number) % 2 == 0
            with torch.set_grad_enabled(recorded):
                try:
                    tangent = value_and_tangent(sine if i % 7 else fail, {"x": x}, {"x": w})[1]
                except ZeroDivisionError:
                    continue
                if not torch.equal(tangent, expected):
                    wrong.append(float((tangent - expected).abs().max()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch.autograd.forward_ad._current_level == -1
    with dual_level.alone():
        pass  # nobody holds it
