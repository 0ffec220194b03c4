"""Modes, and weighted draws, of densities that are known."""

import math
import warnings

import pytest
import torch

from ntk_gp.averaging.laplace import curvature, weighted_draws
from ntk_gp.averaging.optimum import maximise
from ntk_gp.averaging.proposals import StudentT, reduced, uniform_points

pytestmark = pytest.mark.engine_independent


class Density:
    """A log density by autograd, with its gradient, in the form that searches want."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, u):
        self.calls += 1
        u = u.detach().requires_grad_()
        value = self.function(u)
        (gradient,) = torch.autograd.grad(value, u)
        return value.item(), gradient

    def value(self, u):
        return self.function(u.detach()).item()

    def draws(self, starts, draws=64, seed=0):
        return weighted_draws(self, self.value, starts, draws, seed)


def gaussian(d: int) -> tuple[Density, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(d)
    root = torch.randn(d, d, dtype=torch.float64)
    covariance = root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)
    mean = torch.randn(d, dtype=torch.float64)
    precision = covariance.inverse()
    return Density(lambda u: -(u - mean) @ precision @ (u - mean) / 2), mean, covariance, precision


@pytest.mark.parametrize("d", [1, 3, 8])
def test_gaussians(d):
    density, mean, covariance, precision = gaussian(d)
    optimum = maximise(density, torch.zeros(d, dtype=torch.float64))
    assert optimum.has_converged
    torch.testing.assert_close(optimum.u, mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(curvature(density, mean), precision, rtol=1e-7, atol=1e-7)
    draws = density.draws([torch.zeros(d, dtype=torch.float64)], 256)
    exact = d / 2 * math.log(2 * math.pi) + covariance.logdet().item() / 2
    assert abs(draws.log_integral - exact) < 4 * draws.log_integral_error < 0.4
    average = draws.weights @ draws.u
    error = (covariance.diagonal() / draws.effective_sample_size).sqrt()
    assert ((average - mean).abs() < 4 * error).all()
    assert draws.effective_sample_size > 0.6 * 256


def test_a_curved_valley_is_followed():
    """Rosenbrock's function, whose mode is at (1, 1)."""
    density = Density(lambda u: -100 * (u[1] - u[0] ** 2) ** 2 - (1 - u[0]) ** 2)
    optimum = maximise(density, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    torch.testing.assert_close(optimum.u, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-3)
    assert optimum.has_converged and density.calls < 150


def test_a_search_steps_back_from_where_there_is_no_density():
    density = Density(lambda u: (u.log() - u).sum())  # NaN below zero
    optimum = maximise(density, torch.tensor([0.05], dtype=torch.float64))
    torch.testing.assert_close(optimum.u, torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-4)
    assert not math.isfinite(maximise(density, torch.tensor([-1.0], dtype=torch.float64)).value)


def test_what_rises_forever_has_not_converged():
    density = Density(lambda u: u.sum())
    assert not maximise(density, torch.zeros(2, dtype=torch.float64), max_steps=20).has_converged


def test_a_search_ends_at_what_is_known():
    density, mean, *_ = gaussian(2)
    found = maximise(density, mean + 1, is_known=lambda u: bool((u - mean).norm() < 0.5))
    assert not found.is_new
    assert maximise(density, mean + 1, is_known=lambda u: False).is_new


def test_two_modes_have_their_weights():
    """Two Gaussians with 30 and 70 %, five apart."""
    centers = torch.tensor([[-2.5, 0.0], [2.5, 1.0]], dtype=torch.float64)
    logs = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    density = Density(lambda u: (logs - (u - centers).square().sum(-1) / 2).logsumexp(0))
    draws = density.draws([centers[0] + 1], draws=256)
    assert draws.log_integral == pytest.approx(math.log(2 * math.pi), abs=4 * draws.log_integral_error)
    share = draws.weights[draws.u[:, 0] < 0].sum().item()  # up to the overlap, 0.6 %
    assert share == pytest.approx(0.3, abs=0.006 + 4 * math.sqrt(0.21 / draws.effective_sample_size))


def test_a_skewed_density_is_adapted_to():
    """log-gamma in four variables, with a shape that makes the left tail long: the integral is known, Γ(a)⁴."""
    shape = 0.15
    density = Density(lambda u: (shape * u - u.exp()).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = density.draws([torch.full((4,), math.log(shape), dtype=torch.float64)], draws=64)
    assert draws.log_integral == pytest.approx(4 * math.lgamma(shape), abs=4 * draws.log_integral_error)
    assert len(draws.u) <= 64
    assert draws.effective_sample_size > 6.4


def test_draws_that_are_worth_little_warn():
    """A thin shell: nothing that is drawn around a point of it stays in."""
    density = Density(lambda u: -((u.norm() - 5) / 1e-3).square() / 2)
    start = torch.tensor([5.0, 0.1, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"32 draws of the hyperparameters are worth \d"):
        draws = density.draws([start], draws=32)
    assert draws.effective_sample_size < 5


def test_density_nowhere():
    density = Density(lambda u: u.sum() * math.nan)
    with pytest.raises(RuntimeError, match="not a finite number"):
        density.draws([torch.zeros(2, dtype=torch.float64)])


def test_student_t_is_normalised_and_drawn_as_it_says():
    """The mean of the density ratio to itself with another root is one, within four standard errors."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 0.5]], dtype=torch.float64)
    one = StudentT(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), root)
    other = StudentT(one.center + 0.1, 0.8 * root)
    u = one.draw(uniform_points(4, 8192, 0, root))
    ratio = (other.log_density(u) - one.log_density(u)).exp()
    assert ratio.mean().item() == pytest.approx(1.0, abs=4 * ratio.std().item() / 8192**0.5)
    covariance = (u - one.center).mT @ (u - one.center) / len(u)
    torch.testing.assert_close(covariance, root @ root.mT * 8 / 6, rtol=0.1, atol=0.03)
    reference = torch.distributions.StudentT(8.0, 0.5, 2.0)
    line = torch.linspace(-3, 3, 7, dtype=torch.float64)
    single = StudentT(torch.tensor([0.5]).double(), torch.tensor([[2.0]]).double())
    torch.testing.assert_close(single.log_density(line.unsqueeze(-1)), reference.log_prob(line), rtol=1e-6, atol=1e-6)


class TestReduced:
    def test_few_weights_stay(self):
        weights = torch.tensor([0.5, 0.0, 0.5])
        assert torch.equal(reduced(weights, 2), weights)

    def test_large_ones_are_kept(self):
        torch.manual_seed(0)
        weights = torch.rand(200, dtype=torch.float64).pow(6)
        weights /= weights.sum()
        new = reduced(weights, 40)
        assert int((new > 0).sum()) <= 40
        assert new.sum().item() == pytest.approx(1.0)
        largest = weights.topk(10).indices
        torch.testing.assert_close(new[largest], weights[largest], rtol=1e-6, atol=0)

    def test_averages_stay(self):
        """Of a function that changes slowly along the points."""
        weights = torch.linspace(1, 2, 500, dtype=torch.float64).softmax(0)
        values = torch.linspace(-1, 1, 500, dtype=torch.float64)
        new = reduced(weights, 50)
        assert (new @ values).item() == pytest.approx((weights @ values).item(), abs=0.02)
