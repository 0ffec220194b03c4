"""One model served from several threads: the answers are those of one thread, and nothing stays behind.

Every operation is run by four threads at once, on cold and on warm objects, in both engines. Some of the calls fail:
the network raises when it meets a marked input, which must harm neither the other threads nor later calls.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import gpytorch
import pytest
import torch
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.jacobian.contents_cache import ContentsCache
from ntk_gp.network.switches import Switch
from tests.in_threads import THREADS, in_threads

pytestmark = pytest.mark.cpu_only

ROUNDS = 8
MARK = 1e6  # an input for which the network raises


class Guarded(nn.Module):
    """A network that raises where it meets a marked input, and keeps an activation as many do."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x) and bool((x.detach() == MARK).any()):
            raise ArithmeticError("a marked input")
        self.last = self.network(x)
        return self.last


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.unsqueeze(-1))).mean(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x.unsqueeze(-1))[0][:, -1])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)),
    "attention": Attention,
    "recurrent": Recurrent,
}


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, engine: str):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood().to(x))
        self.likelihood.noise = 0.1
        self.mean_module = NetworkMean(network)
        self.covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network, engine=engine)).to(x)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def predict(model: Model, z: Tensor) -> Tensor:
    prediction = model.likelihood(model(z))
    return torch.cat([prediction.mean, prediction.variance])


def input_gradient(model: Model, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(model(z).mean.sum(), z)[0]


OPERATIONS: dict[str, Callable[[Model], Callable[[Tensor], Tensor]]] = {
    "gram": lambda model: lambda z: model.covar_module(z).to_dense(),
    "cross": lambda model: lambda z: model.covar_module(z, model.train_inputs[0]).to_dense(),
    "diagonal": lambda model: lambda z: model.covar_module(z, diag=True),
    "product": lambda model: lambda z: model.covar_module(z) @ torch.ones(len(z), 2, dtype=z.dtype),
    "jacobian": lambda model: lambda z: model.covar_module.base_kernel.jacobian(z).to_dense(),
    "mean": lambda model: lambda z: model.mean_module(z),
    "prediction": lambda model: lambda z: predict(model, z),
    "input gradient": lambda model: lambda z: input_gradient(model, z),
    "adapted network": lambda model: ntk_gp.adapted_network(model),
    "drawn functions": lambda model: ntk_gp.draw_functions(model, 2, generator=torch.Generator().manual_seed(0)),
}


def global_state() -> tuple:
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._C._get_mkldnn_enabled(),
        torch.is_grad_enabled(),
        torch.autograd.forward_ad._current_level,
        gpytorch.settings.fast_computations.log_prob.on(),
        gpytorch.settings.lazily_evaluate_kernels.on(),
        gpytorch.settings.max_cholesky_size.value(),
        torch.get_rng_state().sum().item(),
    )


@pytest.fixture(autouse=True)
def gpytorchs_own_tolerance() -> Iterator[None]:
    """GPyTorch enters a setting of the whole process for each prediction: two threads leave it as neither found it."""
    before = gpytorch.settings.cg_tolerance._global_value
    yield
    gpytorch.settings.cg_tolerance._global_value = before


def make(network: str, engine: str, operation: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """The operation of a model that nothing has been asked of yet, and inputs for it."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    model = Model(x, y, Guarded(NETWORKS[network]()).double(), engine).eval()
    zs = [torch.randn(5 + i % 3, 3, dtype=torch.float64) for i in range(6)]
    return OPERATIONS[operation](model), zs


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("engine", ["structured", "autodiff"])
@pytest.mark.parametrize(
    ("network", "warm"),
    [
        ("mlp", True),
        ("mlp", False),
        ("attention", False),
        pytest.param("recurrent", False, marks=pytest.mark.thorough),
    ],
    ids=["mlp-warm", "mlp-cold", "attention-cold", "recurrent-cold"],
)
def test_answers_are_those_of_one_thread(network, engine, operation, warm):
    alone, zs = make(network, engine, operation)
    with torch.no_grad():
        expected = [alone(z) for z in zs]
    together = alone if warm else make(network, engine, operation)[0]
    marked = zs[0].clone()
    marked[-1, 0] = MARK
    before = global_state()

    @torch.no_grad()
    def work(number: int) -> None:
        for i in range(ROUNDS):
            j = (number * 5 + i) % len(zs)
            if (i + number) % 5 == 0:
                with contextlib.suppress(ArithmeticError, ValueError, RuntimeError):
                    together(marked)
            torch.testing.assert_close(together(zs[j]), expected[j], rtol=1e-9, atol=1e-11)

    in_threads(work)
    assert global_state() == before
    with torch.no_grad():
        torch.testing.assert_close(together(zs[0]), expected[0], rtol=1e-9, atol=1e-11)


def test_a_call_that_raises_is_one_that_raises_in_threads_too():
    """The stress test's marked inputs do what they are meant to."""
    mean, zs = make("mlp", "structured", "mean")
    marked = zs[0].clone()
    marked[-1, 0] = MARK
    mean(zs[0])
    with pytest.raises((ArithmeticError, ValueError), match="a marked input"):
        mean(marked)


class TestCache:
    def test_what_one_thread_computes_the_others_wait_for(self):
        cache, calls = ContentsCache(), []

        def compute(x: Tensor) -> Tensor:
            calls.append(1)
            time.sleep(0.05)
            return 2 * x

        x = torch.arange(3.0)
        in_threads(lambda _: torch.testing.assert_close(cache.get("twice", lambda: 0, (x,), compute), 2 * x))
        assert len(calls) == 1

    def test_what_was_made_last_is_kept_not_what_it_was_made_from(self):
        cache, x = ContentsCache(), torch.ones(100)

        def outer(x: Tensor) -> Tensor:
            return 2 * cache.get("inner", lambda: 0, (x,), torch.square)

        with ntk_gp.settings.memory_budget(4 * 4 * 300):  # room for one result with its key
            cache.get("outer", lambda: 0, (x,), outer)
            assert [entry.label[0] for entry in cache._entries] == ["outer"]

    def test_one_failure_fails_once(self):
        """Whoever waited for a computation that raised makes one of its own."""
        cache, calls, outcomes = ContentsCache(), [], []

        def compute(x: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 1:
                time.sleep(0.05)
                raise ArithmeticError
            return 2 * x

        def work(_: int) -> None:
            try:
                outcomes.append(cache.get("twice", lambda: 0, (torch.ones(1),), compute).item())
            except ArithmeticError:
                outcomes.append(None)

        in_threads(work)
        assert sorted(outcomes, key=str) == [2.0] * (THREADS - 1) + [None]
        assert len(calls) == 2

    def test_entries_come_and_go_while_others_look(self):
        cache = ContentsCache()
        inputs = [torch.full((50,), float(i)) for i in range(20)]

        def work(number: int) -> None:
            for i in range(200):
                x = inputs[(7 * i + number) % 20]
                assert torch.equal(cache.get("square", lambda: 0, (x,), torch.square), x.square())

        with ntk_gp.settings.memory_budget(8000):  # room for five
            in_threads(work)
            assert 0 < sum(entry.nbytes for entry in cache._entries) <= 2000


def test_switches_are_put_back_by_the_last():
    value = [True]
    switch = Switch((lambda: value[0], lambda new: value.__setitem__(0, new), False))

    def work(number: int) -> None:
        for i in range(50):
            with switch:
                time.sleep(1e-5 * ((i + number) % 3))
                assert value[0] is False

    in_threads(work)
    assert value[0] is True
    value[0] = False
    with switch, switch:
        assert value[0] is False
    assert value[0] is False  # as it was


def test_the_random_state_is_left_alone_by_networks_tried_at_the_same_time():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    kernels = [NTKKernel(NETWORKS["mlp"]()) for _ in range(THREADS)]
    in_threads(lambda number: kernels[number](torch.ones(3, 3) * torch.arange(3.0).unsqueeze(-1)).to_dense())
    assert not torch.equal(torch.get_rng_state(), state)  # making networks has moved it
    state = torch.get_rng_state()
    in_threads(lambda number: kernels[number](torch.ones(4, 3) * torch.arange(4.0).unsqueeze(-1)).to_dense())
    assert torch.equal(torch.get_rng_state(), state)
