"""Small variances come out as they are, with the noise, in samples and in densities; others are guarded as ever."""

import warnings

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from linear_operator.operators import DiagLinearOperator
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from tests import references

TINY = 1e-14


def make_network(outputs: int = 1, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), activation(), nn.Linear(8, outputs))


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, noise: float, scale: float = 1.0, added=None):
        self.outputs = y.shape[-1] if y.dim() > 1 else 1
        if self.outputs > 1:
            likelihood = MultitaskGaussianLikelihood(self.outputs, rank=0, noise_constraint=GreaterThan(TINY))
        else:
            likelihood = GaussianLikelihood(noise_constraint=GreaterThan(TINY))
        super().__init__(x, y, likelihood)
        output = "all" if self.outputs > 1 else None
        self.mean_module = NetworkMean(network, output=output)
        self.covar_module = ScaleKernel(NTKKernel(network, output=output))
        self.covar_module.outputscale = scale
        if added is not None:
            self.covar_module = self.covar_module + added
        self.to(x.dtype)
        if self.outputs > 1:
            self.likelihood.noise, self.likelihood.task_noises = noise / 2, noise / 2 * torch.ones(self.outputs).to(x)
        else:
            self.likelihood.noise = noise

    def forward(self, x: Tensor) -> MultivariateNormal:
        cls = MultitaskMultivariateNormal if self.outputs > 1 else MultivariateNormal
        return cls(self.mean_module(x), self.covar_module(x))


class Case:
    """A model, and its posterior by the singular values of the features."""

    def __init__(self, dtype=torch.float32, n=200, noise=1e-6, scale=1.0, unit=1.0, outputs=1, m=20):
        network = make_network(outputs)
        x, self.test_x = torch.randn(n, 3, dtype=dtype), torch.randn(m, 3, dtype=dtype)
        y = unit * x.sin().sum(-1)
        y = y if outputs == 1 else torch.stack([y] * outputs, dim=-1)
        self.model = Model(x, y, network, noise, scale).eval()
        self.noise = noise
        double = make_network(outputs).double()
        self.scale = float(self.model.covar_module.outputscale.double())
        features = references.jacobian(double, torch.cat([x, self.test_x]).double()) * self.scale**0.5
        _, values, right = torch.linalg.svd(features[: n * outputs] / noise**0.5, full_matrices=True)
        shrunk = torch.ones(len(right), dtype=torch.float64)
        shrunk[: len(values)] = 1 / (1 + values.square())
        test = features[n * outputs :] @ right.mT
        self.covariance = (test * shrunk) @ test.mT
        self.variance = self.covariance.diagonal().reshape((m, outputs) if outputs > 1 else (m,))


CASES = [
    {"noise": 1e-6},
    {"noise": 1e-8},
    {"noise": 1e-6, "n": 1000},
    {"noise": 1e-8, "n": 1000},
    {"noise": 1e-8, "n": 12},
    {"noise": 1e-8, "scale": 1e-6, "unit": 1e-3},
    {"noise": 1e-11, "scale": 1e-6, "unit": 1e-3},
    {"noise": 1e-8, "outputs": 2},
    {"noise": 1e-12, "dtype": torch.float64},
    {"noise": 1e-12, "dtype": torch.float64, "outputs": 2, "n": 40},
]


@pytest.fixture(autouse=True)
def without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        yield


def relative(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() / expected - 1).abs().max())


@pytest.mark.parametrize("options", CASES, ids=str)
def test_variances(options):
    case = Case(**options)
    with torch.no_grad():
        posterior = case.model(case.test_x)
        predictive = case.model.likelihood(posterior)
    assert relative(posterior.variance, case.variance) < 1e-2
    assert relative(posterior.stddev, case.variance.sqrt()) < 1e-2
    lower, upper = posterior.confidence_region()
    assert relative((upper - lower).double(), 4 * case.variance.sqrt()) < 0.3  # a difference of float32 means
    assert relative(predictive.variance, case.variance + case.noise) < 1e-2
    assert relative(predictive.stddev, (case.variance + case.noise).sqrt()) < 1e-2
    for distribution, variance in ((posterior, case.variance), (predictive, case.variance + case.noise)):
        for index in (slice(1, 4), torch.tensor([5, 2])):
            part = distribution[..., index] if case.model.outputs == 1 else distribution[..., index, :]
            assert relative(part.variance, variance[index]) < 1e-2
        if case.model.outputs > 1:
            assert relative(distribution[..., 1].variance, variance[..., 1]) < 1e-2
    assert relative((posterior * 2).variance, 4 * case.variance) < 1e-2
    assert relative(posterior.expand(torch.Size([2])).variance, case.variance.expand(2, *case.variance.shape)) < 1e-2


@pytest.mark.parametrize("options", CASES, ids=str)
def test_samples(options):
    """Their spread, which a jitter of 1e-6 would swamp; 2000 of them tell it to some 10 %."""
    case = Case(**options)
    with torch.no_grad():
        posterior = case.model(case.test_x)
        for distribution, variance in (
            (posterior, case.variance),
            (case.model.likelihood(posterior), case.variance + case.noise),
        ):
            root = distribution.lazy_covariance_matrix.root_decomposition().root.to_dense().double()
            assert relative(root.square().sum(-1), variance.reshape(-1)) < 1e-2
            spread = (distribution.rsample(torch.Size([2000])) - distribution.mean).double().square().mean(0)
            # float32 means are rounded before the spread is added to them
            rounding = torch.finfo(distribution.mean.dtype).eps * distribution.mean.abs().double()
            excess = (spread.sqrt() - variance.sqrt()).abs() - 2 * rounding
            assert (excess < 0.15 * variance.sqrt()).all()


@pytest.mark.parametrize("options", [{"m": 5, **options} for options in CASES], ids=str)
def test_densities(options):
    case = Case(**options)
    with torch.no_grad():
        predictive = case.model.likelihood(case.model(case.test_x))
        mean = predictive.mean.reshape(-1).double()
        covariance = case.covariance + case.noise * torch.eye(len(mean), dtype=torch.float64)
        value = mean + torch.linalg.cholesky(covariance) @ torch.linspace(-1, 1, len(mean)).double()
        value = value.to(predictive.mean.dtype)
        expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(value.double())
        assert abs(float(predictive.log_prob(value.reshape(predictive.mean.shape)) - expected)) < 0.02 * len(mean)


def test_a_least_variance_that_is_set():
    case = Case(noise=1e-8)
    for chosen in (1e-6, 1e-3):  # the first is the default's number
        with (
            gpytorch.settings.min_variance(float_value=chosen),
            pytest.warns(NumericalWarning, match="Negative variance"),
        ):
            variance = case.model(case.test_x).variance
        assert float(variance.min()) == pytest.approx(chosen)
    with gpytorch.settings.min_variance(double_value=1.0):  # of another dtype
        assert relative(case.model(case.test_x).variance, case.variance) < 1e-2


@pytest.mark.parametrize("prior", [True, False])
def test_prior_variances(prior):
    case = Case(scale=1e-12)
    features = references.jacobian(make_network().double(), case.test_x.double()) * case.scale**0.5
    with torch.no_grad(), gpytorch.settings.prior_mode(prior):
        distribution = case.model(case.test_x) if prior else case.model.forward(case.test_x)
    assert relative(distribution.variance, features.square().sum(-1)) < 1e-4


def test_differences_in_the_inputs_precision_stay_guarded():
    """The posterior of a sum of kernels may come out negative in float32."""
    case = Case(noise=1e-8, n=60)
    model = Model(*case.model.train_inputs, case.model.train_targets, make_network(), 1e-8, added=MaternKernel()).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variance = model(case.model.train_inputs[0]).variance
    assert (variance >= 1e-6).all()


def test_what_has_no_ntk_is_guarded():
    distribution = MultivariateNormal(torch.zeros(3), DiagLinearOperator(torch.full((3,), 1e-9)))
    with pytest.warns(NumericalWarning, match="Negative variance"):
        assert (distribution.variance >= 1e-6).all()


def test_no_variance_at_all():
    """A kernel that vanishes at an input: rounded up there, and only there, under a warning that says why."""
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False))
    x = 1e-5 * torch.randn(6, 3)
    model = Model(x, x.sum(-1), network, 0.1).eval()
    test_x = torch.cat([torch.zeros(1, 3), x[:2]])
    with torch.no_grad(), pytest.warns(NumericalWarning, match=r"1 of 3 variances are zero.*Jacobian vanishes"):
        variance = model(test_x).variance
    assert float(variance[0]) == pytest.approx(1e-6)
    assert (variance[1:] < 1e-7).all()


@pytest.mark.parametrize("n", [12, 200])
@pytest.mark.parametrize("noise", [1e-4, pytest.param(1e-8, marks=pytest.mark.thorough), 1e-11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_and_gradients(n, noise, dtype):
    """In either space: variances that require gradients are the same, and so are their gradients."""
    case = Case(noise=noise, n=n, dtype=dtype, m=6)
    near = case.model.train_inputs[0][:2] + 1e-1  # where few training points leave next to nothing
    x = torch.cat([case.test_x, near]).reshape(4, 2, 3).requires_grad_()
    with torch.no_grad():
        known = case.model(x).variance
    variance = case.model(x).variance
    assert relative(variance.detach()[:3].reshape(-1), case.variance) < 1e-2
    assert relative(variance.detach(), known.double()) < 1e-2
    (gradient,) = torch.autograd.grad(variance.log().sum(), x)
    assert torch.isfinite(gradient).all()
    if dtype == torch.float64:
        step = 1e-6 * torch.randn_like(x)
        with torch.no_grad():
            ends = [case.model(x + sign * step).variance.log().sum() for sign in (1, -1)]
        slopes = gradient * step
        assert abs(float(slopes.sum() - (ends[0] - ends[1]) / 2)) < 1e-2 * float(slopes.norm())
