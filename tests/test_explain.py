"""`ntk_gp.solver_report` says what the model then does, and why; it does none of it itself."""

import contextlib
from collections.abc import Callable

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import (
    InducingPointKernel,
    Kernel,
    MaternKernel,
    MultitaskKernel,
    RBFKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.means import MultitaskMean, ZeroMean
from gpytorch.models import ExactGP
from gpytorch.models.exact_prediction_strategies import LinearPredictionStrategy
from torch import Size, Tensor

import ntk_gp
from ntk_gp import NTKKernel, settings
from ntk_gp.solvers import SOLVERS
from tests.adapted import LARGE, SMALL, AdaptedGP, data, network

pytestmark = pytest.mark.engine_independent

NAMES = [kind.name for kind in SOLVERS]


def model_of(n: int, kernel: Callable[[torch.nn.Module], Kernel] | None = None, **options) -> AdaptedGP:
    net, (x, y) = network(), data(n)
    return AdaptedGP(x, y, net, None if kernel is None else kernel(net).double(), **options)


def verdicts(report: ntk_gp.solvers.SolverReport) -> dict[str, str]:
    return {candidate.name: candidate.verdict for candidate in report.candidates}


@contextlib.contextmanager
def nothing_is_built(monkeypatch):
    with monkeypatch.context() as patch:
        for kind in SOLVERS:
            patch.setattr(kind, "__init__", lambda *_: pytest.fail("a solver was built"))
        yield


FORCED = {name: lambda name=name: settings.solver(name) for name in NAMES}
SETTINGS = {
    "default": contextlib.nullcontext,
    "little memory": lambda: settings.memory_budget(20_000),
    "less memory": lambda: settings.memory_budget(1000),
    "cholesky size": lambda: gpytorch.settings.max_cholesky_size(10),
    **FORCED,
}


@pytest.mark.parametrize("n", [5, SMALL, LARGE, 200])
@pytest.mark.parametrize("setting", SETTINGS)
class TestWhatIsSaidIsDone:
    def test_before_and_after(self, n, setting, monkeypatch):
        if (n, setting) == (200, "less memory"):
            pytest.skip("conjugate gradients block by block, for long; with 60 points, too")
        model = model_of(n)
        with SETTINGS[setting](), torch.no_grad():
            with nothing_is_built(monkeypatch):
                before = ntk_gp.solver_report(model)
                assert model.training and model.prediction_strategy is None
                assert ntk_gp.solver_report(model.eval()) == before
            model(data(3, seed=1)[0])
            assert model.prediction_strategy.solver.name == before.solver
            after = ntk_gp.solver_report(model)
        assert (before.is_in_use, after.is_in_use) == (False, True)
        assert (after.solver, after.reason, after.candidates) == (before.solver, before.reason, before.candidates)

    def test_costs_are_the_solvers_own(self, n, setting):
        model = model_of(n)
        with SETTINGS[setting]():
            report = ntk_gp.solver_report(model)
            system = model.likelihood(model(*model.train_inputs)).lazy_covariance_matrix.evaluate_kernel().system
            for kind, candidate in zip(SOLVERS, report.candidates, strict=True):
                assert candidate.name == kind.name
                assert candidate.flops == kind.cost(system)
                assert candidate.nbytes == kind.nbytes_needed(system)
            assert report.memory_budget == settings.memory_budget.bytes(torch.device("cpu"))
        assert (report.num_rows, report.num_parameters, report.batch) == (n, 41, 1)
        assert [name for name, verdict in verdicts(report).items() if verdict == "taken"] == [report.solver]


class TestReasons:
    def test_costs(self):
        report = ntk_gp.solver_report(model_of(400))
        ours = {candidate.name: candidate.flops for candidate in report.candidates}
        assert report.reason == "exact, with the least flops"
        ratio = ours["function_space"] / ours["weight_space"]
        assert verdicts(report)["function_space"] == f"{ratio:,.0f} times the flops"
        assert "nothing exact" in verdicts(report)["iterative"]

    def test_memory(self):
        with settings.memory_budget(2000):
            report = ntk_gp.solver_report(model_of(400))
        assert (report.solver, report.reason) == ("iterative", "nothing exact fits")
        assert verdicts(report)["function_space"] == "needs 2.56 MB, more than ntk_gp.settings.memory_budget"
        assert verdicts(report)["weight_space"] == "needs 26.9 kB, more than ntk_gp.settings.memory_budget"

    def test_one_that_fits(self):
        with settings.memory_budget(30_000):
            report = ntk_gp.solver_report(model_of(400))
        assert (report.solver, report.reason) == ("weight_space", "exact, and the only such one that can serve")

    def test_the_users_cholesky_size(self):
        with gpytorch.settings.max_cholesky_size(10):
            report = ntk_gp.solver_report(model_of(400))
        assert report.reason == "gpytorch.settings.max_cholesky_size is less than N and P"
        assert "max_cholesky_size" in verdicts(report)["weight_space"]

    def test_one_that_is_set(self):
        with settings.solver("iterative"):
            report = ntk_gp.solver_report(model_of(400))
        assert report.reason == "ntk_gp.settings.solver is set to it"
        assert {v for n, v in verdicts(report).items() if n != "iterative"} == {
            "not the one that ntk_gp.settings.solver is set to"
        }

    def test_one_that_is_set_and_cannot_serve(self):
        with settings.solver("function_space"), settings.memory_budget(2000):
            report = ntk_gp.solver_report(model_of(400))
        assert report.solver is None
        assert "ntk_gp.settings.solver is 'function_space', which cannot" in report.reason
        assert "needs 2.56 MB" in verdicts(report)["function_space"]
        assert str(report).startswith("Nothing can solve K + D")

    def test_settings_of_before(self):
        """A model keeps its solver until it is prepared anew."""
        model = model_of(400).eval()
        model(data(3, seed=1)[0])
        with settings.solver("function_space"):
            report = ntk_gp.solver_report(model)
            assert report.solver == "weight_space" and "by the settings of then" in report.reason
            assert "would be taken now: call model.train()" in verdicts(report)["function_space"]
            assert ntk_gp.solver_report(model.train()).solver == "function_space"

    def test_batches(self):
        net, (x, y) = network(), data(SMALL, 3)
        kernel = ScaleKernel(NTKKernel(net, batch_shape=Size([3])), batch_shape=Size([3])).double()
        model = AdaptedGP(x, y, net, kernel)
        report = ntk_gp.solver_report(model)
        assert (report.solver, report.batch) == ("function_space", 3)
        assert verdicts(report)["iterative"] == "solves no batches of systems, and there are 3"
        assert "P = 41 parameters, 3 batches: " in str(report)
        with settings.memory_budget(1000):
            report = ntk_gp.solver_report(model)
        assert report.solver is None
        assert "raise it, or use smaller batches" in report.reason

    def test_several_outputs_are_rows(self):
        net = network(outputs=2)
        x, y = data(SMALL, outputs=2)
        likelihood = MultitaskGaussianLikelihood(2).double()
        report = ntk_gp.solver_report(AdaptedGP(x, y, net, None, likelihood, output="all"))
        assert (report.num_rows, report.num_parameters) == (2 * SMALL, 50)


def test_it_reads_well():
    with settings.memory_budget("1 GB"):
        lines = str(ntk_gp.solver_report(model_of(400))).splitlines()
    assert lines[0] == (
        "weight_space would solve K + D with N = 400 rows, P = 41 parameters: exact, with the least flops"
    )
    assert [line.split()[0] for line in lines[1:-1]] == NAMES
    assert lines[2] == "  weight_space    8.6e+05 flops    40.3 kB   taken"
    assert lines[-1] == "  memory budget                       1 GB"


class MultitaskGP(ExactGP):
    def __init__(self, x: Tensor, y: Tensor, net: torch.nn.Module):
        super().__init__(x, y, MultitaskGaussianLikelihood(num_tasks=2).double())
        self.mean_module = MultitaskMean(ZeroMean(), num_tasks=2)
        self.covar_module = MultitaskKernel(NTKKernel(net), num_tasks=2).double()

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


class BlocksGP(MultitaskGP):
    """Two independent tasks."""

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        kernel = self.covar_module.data_covar_module
        parts = MultivariateNormal(x.new_zeros(2, len(x)), kernel(x.expand(2, -1, -1)))
        return MultitaskMultivariateNormal.from_batch_mvn(parts)


class OwnStrategy(NTKKernel):
    def prediction_strategy(self, *args):
        return LinearPredictionStrategy(*args)


def inducing(net: torch.nn.Module) -> Kernel:
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    return InducingPointKernel(NTKKernel(net), data(5)[0], likelihood)


def not_positive() -> ExactGP:
    noise = torch.zeros(SMALL, dtype=torch.float64)
    with gpytorch.settings.min_fixed_noise(0.0, 0.0, 0.0):
        return model_of(SMALL, likelihood=FixedNoiseGaussianLikelihood(noise))


OTHERS = {
    "sum": (lambda: model_of(SMALL, lambda net: NTKKernel(net) + MaternKernel()), "one dense Cholesky factor"),
    "product": (lambda: model_of(SMALL, lambda net: NTKKernel(net) * MaternKernel()), "one dense Cholesky factor"),
    "multitask": (lambda: MultitaskGP(*data(SMALL, outputs=2), network()), "eigenvalues of each factor"),
    "inducing": (lambda: model_of(SMALL, inducing), "Inducing points: solved by GPyTorch's Woodbury formula"),
    "plain": (lambda: model_of(SMALL, lambda net: RBFKernel()), "The model has no NTKKernel in it"),
    "blocks": (lambda: BlocksGP(*data(SMALL, outputs=2), network()), "Interleaved blocks: each is solved by itself"),
    "own strategy": (lambda: model_of(SMALL, OwnStrategy), "by GPyTorch's LinearPredictionStrategy"),
    "no noise": (not_positive, "Noise that is not positive"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_solved_in_another_way(kind):
    make, sentence = OTHERS[kind]
    report = ntk_gp.solver_report(make())
    assert report.solver is None and report.candidates == ()
    assert sentence in report.reason and str(report) == report.reason


def test_a_sum_that_does_not_fit():
    model = model_of(810, lambda net: NTKKernel(net) + MaternKernel())
    with settings.memory_budget(100_000):
        assert "GPyTorch's conjugate gradients" in ntk_gp.solver_report(model).reason


def test_missing_targets():
    model = model_of(SMALL)
    model.train_targets[3] = torch.nan
    with gpytorch.settings.observation_nan_policy("mask"):
        assert "one dense Cholesky factor" in ntk_gp.solver_report(model).reason


class TestErrors:
    def test_what_is_no_model(self):
        with pytest.raises(TypeError, match=r"gpytorch.models.ExactGP, got ScaleKernel"):
            ntk_gp.solver_report(model_of(SMALL).covar_module)

    def test_no_data(self):
        with pytest.raises(ValueError, match="no training data"):
            ntk_gp.solver_report(AdaptedGP(None, None, network()))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_predictions_after_it_are_differentiable(mode):
    model = model_of(LARGE).eval()
    with mode():
        ntk_gp.solver_report(model)
    x = data(3, seed=1)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).mean.sum(), x)
    assert gradient.isfinite().all()
