"""What decides: settings that the user makes, never those that come with an import."""

import json
import subprocess
import sys
import textwrap

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood

from ntk_gp import NTKKernel, settings
from ntk_gp.bridge.exactly_solved import exactly_solved
from ntk_gp.solvers.iterative import IterativeSolver, tolerance
from tests.adapted import LARGE, AdaptedGP, assert_close, closed_form, data, network

pytestmark = pytest.mark.engine_independent

_SCRIPT = textwrap.dedent("""
    import json, sys, warnings
    warnings.simplefilter("ignore")
    {before}
    import gpytorch, torch
    from gpytorch.kernels import MaternKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from ntk_gp import NTKKernel
    from tests.adapted import AdaptedGP, data, network

    def results(n, kind, fast):
        net, (x, y), test_x = network(), data(n), data(5, seed=1)[0]
        kernel = ScaleKernel(NTKKernel(net, variance_groups="layer" if kind == "layers" else None)).double()
        if kind == "sum":
            kernel = kernel + MaternKernel().double()
        if kind == "sum, ntk last":
            kernel = MaternKernel().double() + kernel
        if kind == "product":
            kernel = kernel * MaternKernel().double()
        model = AdaptedGP(x, y, net, kernel).train()
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        some = y.where(torch.arange(n) % 20 > 0, torch.nan)
        for policy, targets in (("mask", some),) if fast else (("ignore", y),):
            with gpytorch.settings.observation_nan_policy(policy):
                value = mll(model(x), targets)
            yield from (value, *torch.autograd.grad(value, list(model.parameters())))
        model.eval()
        with torch.no_grad(), gpytorch.settings.fast_pred_var(fast):
            posterior = model(test_x)
            yield from (posterior.mean, posterior.variance)

    def everything():
        kinds = ("plain", "layers", "sum", "sum, ntk last", "product")
        cases = [(50, kind, fast) for kind in kinds for fast in (False, True)]
        cases += [(900, "plain", False), (900, "layers", True), (900, "sum", False), (900, "product", True)]
        return torch.cat([r.detach().reshape(-1) for case in cases for r in results(*case)]).tolist()

    assert ("botorch" in sys.modules) == {imported}
    runs = [everything()]
    if not {imported}:
        import botorch
        runs.append(everything())
    print(json.dumps(runs))
""")


def _results(before: str = "") -> torch.Tensor:
    script = _SCRIPT.format(before=before, imported=bool(before))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)


@pytest.mark.names_engine  # it is run in processes of its own
def test_importing_botorch_changes_no_result():
    """Values, gradients, means and variances, plain and fast, below and above every size that GPyTorch looks at."""
    expected, after = _results()
    (before,) = _results(before="import botorch")
    torch.testing.assert_close(before, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)


class TestTolerance:
    def test_defaults_are_this_packages(self):
        assert tolerance() == settings.solve_tolerance.value()
        with gpytorch.settings.cg_tolerance(gpytorch.settings.eval_cg_tolerance.value()):
            assert tolerance() == settings.solve_tolerance.value()

    def test_the_users_come_first(self):
        with settings.solve_tolerance(1e-7):
            assert tolerance() == 1e-7
            with gpytorch.settings.cg_tolerance(1e-3):
                assert tolerance() == 1e-3

    def test_in_predictions(self):
        net, (x, y), test_x = network(), data(LARGE), data(5, seed=1)[0]
        model = AdaptedGP(x, y, net).eval()
        mean, _ = closed_form(
            net, x, y, test_x, model.likelihood.noise.detach(), model.covar_module.outputscale.detach()
        )
        with gpytorch.settings.max_cholesky_size(10), gpytorch.settings.eval_cg_tolerance(1e-12):
            assert_close(model(test_x).mean, mean, 1e-9)
            solver = model.prediction_strategy.solver
        assert isinstance(solver, IterativeSolver)
        assert solver.report.tolerance == 1e-12
        assert solver.report.residual <= 1e-12


@pytest.mark.parametrize("size", [41, 59, 10**6])
def test_a_cholesky_size_that_fits_stays_exact(size):
    """P = 41 is factorised then, whatever N is."""
    net, (x, y), test_x = network(), data(LARGE), data(5, seed=1)[0]
    model = AdaptedGP(x, y, net).eval()
    with gpytorch.settings.max_cholesky_size(size):
        model(test_x)
        assert not isinstance(model.prediction_strategy.solver, IterativeSolver)


def test_a_small_cholesky_size_fits_by_iteration_too():
    net, (x, y) = network(), data(LARGE)
    model = AdaptedGP(x, y, net).train()
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    exact = mll(model(x), y)
    with gpytorch.settings.max_cholesky_size(10), gpytorch.settings.num_trace_samples(500):
        estimated = mll(model(x), y)
        gradients = torch.autograd.grad(estimated, list(model.parameters()))
    assert float(estimated) != float(exact)
    assert abs(float(estimated) - float(exact)) <= 0.01
    for a, b in zip(gradients, torch.autograd.grad(exact, list(model.parameters())), strict=True):
        assert_close(a, b, 0.1)


def test_a_tolerance_for_sums_that_do_not_fit():
    net, (x, y) = network(), data(810)
    model = AdaptedGP(x, y, net, (MaternKernel() + NTKKernel(net)).double()).train()
    matrix = model.likelihood(model(x)).lazy_covariance_matrix.to_dense()
    solver = exactly_solved(model.likelihood(model(x)).lazy_covariance_matrix.evaluate_kernel())
    residuals = []
    with settings.memory_budget(8 * 810**2), torch.no_grad():
        stock = gpytorch.settings.eval_cg_tolerance.value()
        for chosen in (stock, settings.solve_tolerance.value(), 1e-6, 1e-2):
            with gpytorch.settings.cg_tolerance(chosen):
                residuals.append(float((matrix @ solver.solve(y) - y).norm() / y.norm()))
    default, own, tight, loose = residuals
    assert tight <= 2e-6 < own <= 2e-4
    assert default == own  # GPyTorch's default for predictions, which is no choice of the user's
    assert loose > 2 * own  # the same number, chosen


def test_fast_computations_off_is_exact_as_ever():
    net, (x, y), test_x = network(), data(LARGE), data(5, seed=1)[0]
    model = AdaptedGP(x, y, net).eval()
    noise, scale = model.likelihood.noise.detach(), model.covar_module.outputscale.detach()
    mean, covariance = closed_form(net, x, y, test_x, noise, scale)
    with gpytorch.settings.fast_computations(False, False, False):
        assert_close(model(test_x).mean, mean)
        assert_close(model(test_x).covariance_matrix, covariance)


def test_a_rank_for_fast_variances():
    net, (x, y), test_x = network(), data(LARGE), data(5, seed=1)[0]
    model = AdaptedGP(x, y, net).eval()
    with gpytorch.settings.fast_pred_var(), gpytorch.settings.max_root_decomposition_size(7):
        model(test_x).variance  # noqa: B018
        assert model.prediction_strategy.fast_variance.rank == 7


@pytest.mark.parametrize(
    "compose", [lambda k: k, lambda k: ScaleKernel(k).double(), lambda k: k + MaternKernel().double()]
)
def test_eager_evaluation_changes_nothing(compose):
    net, (x, y), test_x = network(), data(LARGE), data(5, seed=1)[0]
    model = AdaptedGP(x, y, net, compose(NTKKernel(net))).eval()
    with torch.no_grad():
        expected = model(test_x)
        model.train().eval()
        for size in (0, 10**6):
            with gpytorch.settings.max_eager_kernel_size(size), gpytorch.settings.lazily_evaluate_kernels(size == 0):
                posterior = model(test_x)
                assert_close(posterior.mean, expected.mean, 1e-9)
                assert_close(posterior.covariance_matrix, expected.covariance_matrix, 1e-8)
            model.train().eval()
