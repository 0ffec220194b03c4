"""What importing this package changes in GPyTorch: nothing for models without an NTK, and nothing twice."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import gpytorch
import linear_operator
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, MaternKernel, ProductKernel, RBFKernel, ScaleKernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.models import GP, exact_gp, exact_prediction_strategies
from gpytorch.settings import _feature_flag, _value_context
from linear_operator.operators import LinearOperator

from ntk_gp import NTKKernel, bridge, settings
from ntk_gp.bridge import distributions, exact_variances, kernel_matrices, models, replaced
from ntk_gp.bridge.prediction_strategies import NTKPredictionStrategy
from tests.adapted import AdaptedGP, assert_close, data, network

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only]

# Models without an NTK, and the bytes of what they compute.
STOCK = textwrap.dedent(
    """
    import hashlib, math, sys, warnings
    if sys.argv[1] == "with":
        import ntk_gp
    import gpytorch, torch
    from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
    from gpytorch.kernels import *
    from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
    warnings.simplefilter("ignore")

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x, y, likelihood, kernel, combine=None):
            super().__init__(x, y, likelihood)
            self.covar_module, self.combine = kernel, combine
            tasks = y.shape[-1] if y.dim() > 1 else None
            self.mean_module = gpytorch.means.ConstantMean()
            self.tasks = tasks
            if tasks:
                self.mean_module = gpytorch.means.MultitaskMean(self.mean_module, num_tasks=tasks)
        def forward(self, x):
            covariance = self.covar_module(x)
            covariance = covariance if self.combine is None else self.combine(covariance, x)
            return (MultitaskMultivariateNormal if self.tasks else MultivariateNormal)(self.mean_module(x), covariance)

    def digest(*tensors):
        return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]

    def run(name, n, kernel, combine=None, missing=False, tasks=None, sgpr=False):
        torch.manual_seed(0)
        x, test_x = torch.rand(n, 2), torch.rand(7, 2)
        y = torch.randn(n, tasks) if tasks else torch.randn(n)
        if missing:
            y[::7] = math.nan
        likelihood = MultitaskGaussianLikelihood(tasks) if tasks else GaussianLikelihood()
        kernel = kernel(x, likelihood)
        model = Model(x, y, likelihood, kernel, combine)
        with gpytorch.settings.observation_nan_policy("mask" if missing else "ignore"):
            loss = -gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model.train()(x), y)
            loss.backward()
            model.eval()
            prediction = likelihood(model(test_x))
            parts = [loss, prediction.mean]
            if not missing:
                parts += [prediction.variance, prediction.sample(torch.Size([3])), model.forward(x).sample()]
            print(name, n, digest(*parts, *(p.grad for p in model.parameters() if p.grad is not None)))

    for n in (40, 810):  # below and above the size from which GPyTorch iterates
        run("rbf", n, lambda x, l: ScaleKernel(RBFKernel()))
        run("sgpr", n, lambda x, l: InducingPointKernel(RBFKernel(), x[:9].clone(), likelihood=l))
        run("multitask", n // 2, lambda x, l: MultitaskKernel(RBFKernel(), num_tasks=2), tasks=2)
    n = 40
    run("sum", n, lambda x, l: RBFKernel() + LinearKernel())
    run("product", n, lambda x, l: RBFKernel() * LinearKernel())
    run("kiss", n, lambda x, l: GridInterpolationKernel(RBFKernel(), grid_size=12, num_dims=2))
    run("lazy product", n, lambda x, l: LinearKernel(), lambda k, x: k * LinearKernel()(x) + RBFKernel()(x) * 0.5)
    run("missing", n, lambda x, l: RBFKernel(), missing=True)
    """
)


@pytest.mark.names_engine  # there is none
def test_models_without_an_ntk_are_bitwise_the_same():
    processes = [
        subprocess.Popen([sys.executable, "-c", STOCK, which], stdout=subprocess.PIPE, text=True)
        for which in ("without", "with")
    ]
    without, imported = (process.communicate(timeout=300)[0] for process in processes)
    assert len(without.splitlines()) == 11
    assert imported == without


PLACES = (
    (exact_gp, "prediction_strategy"),
    (exact_prediction_strategies, "prediction_strategy"),
    (GP, "__call__"),
    (Kernel, "named_sub_kernels"),
    (Kernel, "batch_shape"),
    (Kernel, "dtype"),
    (Kernel, "device"),
    (LazyEvaluatedKernelTensor, "dtype"),
    (LazyEvaluatedKernelTensor, "evaluate_kernel"),
    (LinearOperator, "_mul_matrix"),
    (LinearOperator, "_prod_batch"),
    (MultivariateNormal, "log_prob"),
    (MultivariateNormal, "rsample"),
    (MultivariateNormal, "variance"),
)


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    bridge.install()


def function_of(attribute):
    return attribute.fget if isinstance(attribute, property) else attribute


def found() -> list:
    return [getattr(*place) for place in PLACES]


def depth(attribute) -> int:
    """How many functions of this package are around GPyTorch's."""
    count = 0
    while hasattr(function_of(attribute), "_ntk_gp_replaces"):
        attribute, count = function_of(attribute)._ntk_gp_replaces.default, count + 1
    return count


def once_everywhere() -> bool:
    return [depth(attribute) for attribute in found()] == [1] * len(PLACES)


class TestInstalling:
    def test_these_places_are_all(self):
        assert [(owner, name) for owner, name, _ in replaced.REPLACED] == list(PLACES)

    def test_twice_is_once(self, restored):
        before = found()
        bridge.install()
        bridge.install()
        assert all(one is other for one, other in zip(before, found(), strict=True))
        assert once_everywhere()

    @pytest.mark.parametrize(
        "module", [replaced, models, kernel_matrices, distributions, exact_variances], ids=lambda m: m.__name__
    )
    def test_reloaded(self, restored, module):
        for _ in range(2):
            importlib.reload(module)
            importlib.reload(replaced).install()
            assert once_everywhere()
        table = [place[2] for place in replaced.REPLACED]
        assert [function_of(attribute)._ntk_gp_replaces.replacement for attribute in found()] == table
        normal = MultivariateNormal(torch.zeros(3), torch.eye(3))
        assert_close(normal.log_prob(torch.zeros(3)), torch.tensor(-2.7568156719), 1e-7)
        net, (x, y) = network(), data(12)
        model = AdaptedGP(x, y, net, NTKKernel(net) + MaternKernel().double()).eval()
        model(x)
        assert isinstance(model.prediction_strategy, NTKPredictionStrategy)

    def test_uninstalled_gpytorch_is_its_own(self, restored):
        bridge.uninstall()
        bridge.uninstall()
        for attribute in found():
            function = function_of(attribute)
            assert not hasattr(function, "_ntk_gp_replaces")
            assert function.__module__.startswith(("gpytorch", "linear_operator"))
            file = pathlib.Path(function.__code__.co_filename)  # its own, where another's only says so
            assert any(pathlib.Path(package.__file__).parent in file.parents for package in (gpytorch, linear_operator))
        assert "__call__" not in vars(GP)

    def test_taken_out_and_put_in_again(self, restored):
        bridge.uninstall()
        bridge.install()
        assert once_everywhere()

    def test_nothing_else_is_changed(self):
        assert Kernel.prediction_strategy.__code__.co_filename.endswith("gpytorch/kernels/kernel.py")
        assert ProductKernel.forward.__code__.co_filename.endswith("gpytorch/kernels/kernel.py")

    def test_an_ntk_alone_needs_nothing_installed(self, restored):
        net, (x, y), test_x = network(), data(810), data(5, seed=1)[0]
        for kernel in (NTKKernel(net), ScaleKernel(NTKKernel(net)).double()):
            model = AdaptedGP(x, y, net, kernel).eval()
            with torch.no_grad():
                expected = model(test_x)
                expected = expected.mean, expected.variance
                bridge.uninstall()
                model = AdaptedGP(x, y, net, kernel).eval()
                actual = model(test_x)
                assert isinstance(model.prediction_strategy, NTKPredictionStrategy)
                assert_close(actual.mean, expected[0], 1e-12)
                assert_close(actual.variance, expected[1], 1e-12)
                bridge.install()


@pytest.mark.parametrize("budget", [None, 8 * 850**2])
@pytest.mark.parametrize(
    "compose", [lambda k: k, lambda k: k * RBFKernel() + MaternKernel()], ids=["plain", "composed"]
)
def test_likelihoods_and_samples_touch_no_setting_of_the_process(monkeypatch, budget, compose):
    """Other threads would meet it: entering any of GPyTorch's settings raises."""

    def forbidden(self, *args):
        raise AssertionError("a setting of the whole process was entered")

    net, (x, y) = network(), data(850)
    model = AdaptedGP(x, y, net, compose(NTKKernel(net)).double()).train()
    matrix = model.likelihood(model(x)).lazy_covariance_matrix.evaluate_kernel()  # GPyTorch's own does
    with settings.memory_budget(budget):
        monkeypatch.setattr(_feature_flag, "__enter__", forbidden)
        monkeypatch.setattr(_value_context, "__enter__", forbidden)
        distribution = MultivariateNormal(torch.zeros_like(y), matrix)
        distribution.log_prob(y).backward()
        if budget is None:
            distribution.rsample()


@pytest.mark.parametrize("compose", [lambda k: k + MaternKernel(), lambda k: k * RBFKernel()], ids=["sum", "product"])
def test_threads_that_share_a_strategy(compose):
    """Caches are filled by several threads at once; the network was evaluated before."""
    net, (x, y), test_x = network(), data(300), data(9, seed=1)[0]
    model = AdaptedGP(x, y, net, compose(NTKKernel(net)).double()).eval()
    with torch.no_grad():
        joint = model.forward(torch.cat([x, test_x])).lazy_covariance_matrix
        parts = joint[300:, 300:].evaluate_kernel(), joint[300:, :300].evaluate_kernel()
        mean, prior = model.mean_module(test_x), model.forward(x)
        strategy = exact_gp.prediction_strategy([x], prior, y, model.likelihood)
        expected = strategy.exact_prediction(mean, *parts)
        expected = expected[0], expected[1].to_dense()
    errors: list[BaseException] = []

    def serve(strategy: NTKPredictionStrategy, barrier: threading.Barrier) -> None:
        try:
            with torch.no_grad():
                barrier.wait()
                for _ in range(3):
                    actual = strategy.exact_prediction(mean, *parts)
                    assert_close(actual[0], expected[0], 1e-10)
                    assert_close(actual[1].to_dense(), expected[1], 1e-10)
        except BaseException as error:
            errors.append(error)

    for _ in range(10):
        cold, barrier = exact_gp.prediction_strategy([x], prior, y, model.likelihood), threading.Barrier(4)
        threads = [threading.Thread(target=serve, args=(cold, barrier)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]


@pytest.mark.parametrize("inner", [True, False])
def test_evaluating_a_kernel_matrix_leaves_the_kernel_alone(inner):
    """GPyTorch takes `active_dims` away while it evaluates, and two threads at once leave a kernel without any."""
    network_of_three = torch.nn.Linear(3, 1).double()
    kernel = NTKKernel(network_of_three, active_dims=(1, 2, 3) if inner else None)
    scaled = ScaleKernel(kernel, active_dims=None if inner else (1, 2, 3)).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    expected = NTKKernel(network_of_three)(x[:, 1:]).to_dense() * scaled.outputscale
    for evaluated in (scaled, scaled + RBFKernel().double()):
        before = [part.active_dims for part in evaluated.modules() if isinstance(part, Kernel)]
        evaluated(x).evaluate_kernel()
        after = [part.active_dims for part in evaluated.modules() if isinstance(part, Kernel)]
        assert all(one is other for one, other in zip(before, after, strict=True))
    assert_close(scaled(x).to_dense(), expected, 1e-12)
