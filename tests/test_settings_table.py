"""The table of docs/settings.md: it is whole, and what it says is so."""

import contextlib
import inspect
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import gpytorch
import linear_operator
import pytest
import torch
from gpytorch import settings as theirs
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from ntk_gp import settings, stock
from ntk_gp.solvers.iterative import IterativeSolver, tolerance
from ntk_gp.solvers.love import LanczosVariance
from tests.adapted import LARGE, SMALL, AdaptedGP, assert_close, data, network

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only]

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
OWN, ALL = PAGE.read_text().split("## Who decides")
ROWS = re.findall(r"^\| `([\w.]+)` \| ([a-z ]+) \|", ALL, flags=re.MULTILINE)
TABLE = dict(ROWS)


def every_setting() -> set[str]:
    """Names of all settings of both packages, those of `fast_computations` one by one."""
    found = set()
    for module in (theirs, linear_operator.settings):
        for name, value in vars(module).items():
            if inspect.isclass(value) and hasattr(value, "__enter__") and value not in _BASES:
                found.add(name)
    flags = {n for n, v in vars(theirs.fast_computations).items() if inspect.isclass(v)}
    found = {name for name in found if not name.startswith("_fast_")} - {"fast_computations"}
    return found | {f"fast_computations.{flag}" for flag in flags}


_BASES = {
    getattr(module, name)
    for module in (theirs, linear_operator.settings)
    for name in ("_dtype_value_context", "_feature_flag", "_value_context")
}


def test_this_packages_own_have_a_row_each():
    classes = {name for name, value in vars(settings).items() if inspect.isclass(value) and hasattr(value, "__enter__")}
    own = {name for name in classes if getattr(settings, name).__module__ == settings.__name__}
    assert own == set(re.findall(r"^\| `(\w+)` \|", OWN, flags=re.MULTILINE))


def test_the_table_has_every_setting_once():
    """A setting that a new version brings is to be looked at, and put there."""
    assert len(ROWS) == len(TABLE)
    assert set(TABLE) == every_setting()
    assert set(TABLE.values()) == {"honoured", "no effect", "elsewhere"}
    assert {name for name, kind in ROWS if kind == "honoured"} == set(EFFECTS)
    assert {name for name, kind in ROWS if kind == "no effect"} == set(OTHER_VALUES)


def make_model(n: int = LARGE, **options) -> AdaptedGP:
    x, y = data(n)
    return AdaptedGP(x, y, network(), **options).eval()


TEST_X = data(5, seed=1)[0]


def likelihood_of(model: AdaptedGP) -> Tensor:
    mll = ExactMarginalLogLikelihood(model.likelihood, model.train())
    return mll(model(*model.train_inputs), model.train_targets)


def iterative(setting: contextlib.AbstractContextManager) -> IterativeSolver:
    model = make_model()
    with theirs.max_cholesky_size(10), setting, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(TEST_X)
        return model.prediction_strategy.solver


def effect_of_tolerance() -> None:
    with theirs.cg_tolerance(1e-3):
        assert tolerance() == 1e-3
    with theirs.cg_tolerance(1):  # the default's number, chosen
        assert tolerance() == 1
    assert tolerance() == settings.solve_tolerance.value()


def effect_of_prediction_tolerance() -> None:
    for chosen in (1e-9, 0.01):  # the latter is the default's number
        assert iterative(theirs.eval_cg_tolerance(chosen)).report.tolerance == chosen
    assert iterative(contextlib.nullcontext()).report.tolerance == settings.solve_tolerance.value()


def effect_of_steps() -> None:
    assert iterative(theirs.max_cg_iterations(1)).report.steps == 1


def effect_of_cholesky_size() -> None:
    x, y = torch.randn(810, 3, dtype=torch.float64), torch.randn(810, dtype=torch.float64)
    wide = network(width=170)  # 851 parameters
    for size, kind in ((800, True), (809, True), (810, False), (stock.stock(800), False)):
        model = AdaptedGP(x, y, wide).eval()
        with theirs.max_cholesky_size(size):
            model(TEST_X)
            assert isinstance(model.prediction_strategy.solver, IterativeSolver) == kind, size


def _estimates(setting: Callable[[int], contextlib.AbstractContextManager], value: int) -> float:
    with theirs.max_cholesky_size(10), setting(value):
        return float(likelihood_of(make_model()).detach())


def effect_of_quadrature() -> None:
    setting = theirs.max_lanczos_quadrature_iterations
    assert _estimates(setting, 1) != _estimates(setting, 20)


def effect_of_probes() -> None:
    assert _estimates(theirs.num_trace_samples, 1) != _estimates(theirs.num_trace_samples, 20)


def effect_of_rank() -> None:
    for rank in (7, 100):  # the latter is the default's number
        model = make_model()
        with theirs.fast_pred_var(), theirs.max_root_decomposition_size(rank):
            model(TEST_X).variance  # noqa: B018
        assert isinstance(model.prediction_strategy.fast_variance, LanczosVariance)
        assert model.prediction_strategy.fast_variance.rank == min(rank, LARGE, 41) or rank == 100


def effect_of_fast_variances() -> None:
    model = make_model()
    with theirs.fast_pred_var():
        assert model(TEST_X).lazy_covariance_matrix.source is model.prediction_strategy.fast_variance


def effect_of_least_variance() -> None:
    distribution = make_model()(TEST_X)
    for chosen in (10.0, 1e-10):  # the latter is the default's number
        small = gpytorch.distributions.MultivariateNormal(distribution.loc, distribution.lazy_covariance_matrix * 1e-14)
        assert (small.variance < 1e-10).all()
        with theirs.min_variance(double_value=chosen), pytest.warns(NumericalWarning):
            assert (small.variance == chosen).all()


def effect_of_detached_caches() -> None:
    x, y = data(SMALL)
    y.requires_grad_()
    for detached in (True, False):
        model = AdaptedGP(x, y, network()).eval()
        with theirs.detach_test_caches(detached):
            mean = model(TEST_X).mean
        gradient = torch.autograd.grad(mean.sum(), y, allow_unused=True)[0] if mean.requires_grad else None
        assert (gradient is None) == detached


def effect_of_skipped_variances() -> None:
    with theirs.skip_posterior_variances():
        assert not make_model()(TEST_X).lazy_covariance_matrix.to_dense().any()


def effect_of_prior_mode() -> None:
    model = make_model()
    with theirs.prior_mode():
        assert_close(model(TEST_X).mean, model.mean_module(TEST_X))


def effect_of_missing_targets() -> None:
    x, y = data(LARGE)
    some = y.where(torch.arange(LARGE) % 7 > 0, torch.nan)
    with pytest.raises(ValueError, match="observation_nan_policy"):
        AdaptedGP(x, some, network()).eval()(TEST_X)
    with theirs.observation_nan_policy("mask"):
        mean = AdaptedGP(x, some, network()).eval()(TEST_X).mean
    observed = ~torch.isnan(some)
    assert_close(mean, AdaptedGP(x[observed], y[observed], network()).eval()(TEST_X).mean, 1e-7)


def effect_of_checks() -> None:
    model = make_model().train()
    with pytest.raises(RuntimeError, match="train on the training inputs"):
        model(TEST_X)
    with theirs.debug(False):
        model(TEST_X)


def effect_of_dense_likelihoods() -> None:
    with (
        theirs.fast_computations.log_prob(False),
        mock.patch("torch.distributions.multivariate_normal._batch_mahalanobis", side_effect=InterruptedError),
        pytest.raises(InterruptedError),
    ):
        likelihood_of(make_model())


def _log_density_of_a_singular_posterior() -> Tensor:
    x = data(LARGE, seed=3)[0]
    distribution = make_model()(x)  # 60 points, 41 parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericalWarning)
        return distribution.log_prob(distribution.mean.detach())


def effect_of_jitter() -> None:
    values = []
    for jitter in (1e-8, 1e-4):
        with theirs.cholesky_jitter(double_value=jitter):
            values.append(float(_log_density_of_a_singular_posterior().detach()))
    assert values[0] > values[1] + 10


def effect_of_tries() -> None:
    with theirs.cholesky_jitter(double_value=1e-25):
        with theirs.cholesky_max_tries(1), pytest.raises(NotPSDError):
            _log_density_of_a_singular_posterior()
        with theirs.cholesky_max_tries(25):
            _log_density_of_a_singular_posterior()


def effect_of_contour_quadrature() -> None:
    module = sys.modules["linear_operator.utils.contour_integral_quad"]
    patched = mock.patch.object(module, "contour_integral_quad", side_effect=InterruptedError)
    with theirs.ciq_samples(), patched, pytest.raises(InterruptedError):
        make_model()(TEST_X).sample()


def effect_of_least_fixed_noise() -> None:
    with theirs.min_fixed_noise(double_value=0.5), pytest.warns(NumericalWarning):
        likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.full((LARGE,), 0.1).double())
    model = make_model(likelihood=likelihood)
    prior = model.train()(*model.train_inputs)
    assert_close(model.likelihood(prior).variance, prior.variance + 0.5)


EFFECTS = {
    "cg_tolerance": effect_of_tolerance,
    "eval_cg_tolerance": effect_of_prediction_tolerance,
    "max_cg_iterations": effect_of_steps,
    "max_cholesky_size": effect_of_cholesky_size,
    "max_lanczos_quadrature_iterations": effect_of_quadrature,
    "num_trace_samples": effect_of_probes,
    "max_root_decomposition_size": effect_of_rank,
    "fast_pred_var": effect_of_fast_variances,
    "min_variance": effect_of_least_variance,
    "detach_test_caches": effect_of_detached_caches,
    "skip_posterior_variances": effect_of_skipped_variances,
    "prior_mode": effect_of_prior_mode,
    "observation_nan_policy": effect_of_missing_targets,
    "debug": effect_of_checks,
    "fast_computations.log_prob": effect_of_dense_likelihoods,
    "cholesky_jitter": effect_of_jitter,
    "cholesky_max_tries": effect_of_tries,
    "ciq_samples": effect_of_contour_quadrature,
    "min_fixed_noise": effect_of_least_fixed_noise,
}

OTHER_VALUES = {
    "trace_mode": True,
    "fast_computations.solves": False,
    "fast_computations.covar_root_decomposition": False,
    "fast_pred_samples": True,
    "lazily_evaluate_kernels": False,
    "max_eager_kernel_size": 0,
    "deterministic_probes": True,
    "max_preconditioner_size": 0,
    "min_preconditioning_size": 1,
    "preconditioner_tolerance": 1.0,
    "terminate_cg_by_size": True,
    "skip_logdet_forward": True,
    "tridiagonal_jitter": 1.0,
    "linalg_dtypes": torch.float32,
    "_linalg_dtype_cholesky": torch.float32,
    "_linalg_dtype_symeig": torch.float32,
    "verbose_linalg": True,
}


@pytest.mark.parametrize("name", EFFECTS)
def test_honoured(name):
    EFFECTS[name]()


def results() -> list[Tensor]:
    """Values and gradients of the likelihood, means, variances and samples; exact, and by iteration."""
    found = []
    for size in (stock.stock(800), 10):
        with theirs.max_cholesky_size(size), settings.solve_tolerance(1e-10):
            model = make_model()
            value = likelihood_of(model)
            found += [value, *torch.autograd.grad(value, list(model.parameters()))]
            model.eval()
            with torch.no_grad():
                posterior = model(TEST_X)
                torch.manual_seed(0)
                found += [posterior.mean, posterior.variance, posterior.sample(torch.Size([2]))]
                found += [model.likelihood(posterior).log_prob(posterior.mean)]
    return [tensor.detach().reshape(-1) for tensor in found]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return results()


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_no_effect(name, expected):
    setting: type = theirs
    for part in name.split("."):
        setting = getattr(setting, part)
    with setting(OTHER_VALUES[name]):
        for actual, known in zip(results(), expected, strict=True):
            assert_close(actual, known, 1e-7)


_SCRIPT = textwrap.dedent("""
    {before}
    import gpytorch
    from ntk_gp import NTKKernel, stock
    {after}
    import torch
    NTKKernel(torch.nn.Linear(2, 1))
    size = gpytorch.settings.max_cholesky_size
    print(stock.chosen_cholesky_size())
    for value in (800, 4096, 17):
        with size(value):
            print(stock.chosen_cholesky_size())
        print(stock.chosen_cholesky_size())
""")


@pytest.mark.names_engine  # in processes of their own
@pytest.mark.parametrize(
    ("before", "after", "preset"),
    [
        ("", "", None),
        pytest.param("import botorch", "", None, marks=pytest.mark.thorough),
        ("", "import botorch", None),
        pytest.param(
            "import gpytorch; gpytorch.settings.max_cholesky_size._set_value(2000)",
            "",
            2000,
            marks=pytest.mark.thorough,
        ),
        ("", "gpytorch.settings.max_cholesky_size._set_value(2000)", 2000),
    ],
)
def test_a_choice_is_known_from_a_default(before, after, preset):
    """In whichever order things are imported; the numbers that are defaults, too."""
    if "botorch" in before + after:
        pytest.importorskip("botorch")
    script = _SCRIPT.format(before=before, after=after)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(x) for x in (preset, 800, preset, 4096, preset, 17, preset)]


def test_marked_defaults_are_the_same_numbers():
    with theirs.max_cholesky_size(stock.stock(800)):
        assert theirs.max_cholesky_size.value() == 800
        assert repr(theirs.max_cholesky_size.value()) == "800"
    for dtype, value in ((torch.float32, 1e-6), (torch.float64, 1e-10), (torch.half, 1e-3)):
        assert theirs.min_variance.value(dtype) == value
        assert f"{theirs.min_variance.value(dtype)}" == f"{value}"
        assert stock.chosen_min_variance(dtype) is None
        with theirs.min_variance(value, value, value):
            assert stock.chosen_min_variance(dtype) == value
