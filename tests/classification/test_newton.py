"""The search for the mode: it converges from anywhere, and never falls."""

import itertools
import warnings

import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning

import ntk_gp
from ntk_gp.classification import newton
from ntk_gp.classification.approximation import LatentPrior
from ntk_gp.classification.function_space import FunctionSpace
from ntk_gp.classification.log_densities import log_density
from ntk_gp.classification.newton import find_mode

from .problems import LIKELIHOODS, Problem, Reference

pytestmark = pytest.mark.engine_independent

CASES = ("plain", "one class", "one label", "sure and wrong")


def problem_of(name: str, case: str) -> Problem:
    n, sureness = 1 if case == "one label" else 6, 100.0 if case == "sure and wrong" else 1.0
    problem = Problem(name, n, sureness=sureness)
    if case == "one class":  # separable
        problem.labels = torch.zeros_like(problem.labels)
    return problem


def prior_of(model):
    density = log_density(model.likelihood, model.train_targets)
    model.train()
    return LatentPrior(model(*model.train_inputs), density), density


@pytest.fixture
def objectives(monkeypatch) -> list[float]:
    """The value at each position that the search has been at."""
    values = []
    original = newton._Objective.step_length

    def recorded(self, position, step, slope):
        values.append(self.value(position))
        return original(self, position, step, slope)

    monkeypatch.setattr(newton._Objective, "step_length", recorded)
    return values


@pytest.mark.parametrize("space", ["function_space", "weight_space"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_converges_and_never_falls(name, case, scale, space, objectives):
    model = problem_of(name, case).model(scale=scale)
    with ntk_gp.settings.solver(space), warnings.catch_warnings():
        warnings.simplefilter("error", NumericalWarning)
        approximation = model.eval().approximation
    assert approximation.distance <= 1e-9
    assert approximation.steps <= 30
    # a = ∇ log p(y | f̂), and f̂ = m + K a: the mode is where both hold.
    prior, density = prior_of(model)
    weights = approximation.curvature.mean_weights(approximation.position)
    expected = prior.system.features(density.gradient(approximation.latent_mean).reshape(1, -1, 1)).reshape(-1)
    size = float(prior.system.root_variances.max())
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8 * size)
    for before, after in itertools.pairwise(objectives):
        assert after >= before - 1e-12 * abs(before)


def test_both_spaces_have_one_mode():
    problem = problem_of("softmax", "sure and wrong")
    found = []
    for space in ("function_space", "weight_space"):
        with ntk_gp.settings.solver(space):
            found.append(problem.model().eval().approximation.latent_mean)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_reference_agrees_where_whole_steps_lead_astray():
    problem = problem_of("logistic", "sure and wrong")
    reference = Reference("logistic", problem.gram(problem.variances), problem.values(problem.x), problem.labels)
    found = problem.model().eval().approximation.latent_mean.reshape(-1)
    torch.testing.assert_close(found, reference.f, rtol=1e-8, atol=1e-8)


def test_a_better_start_is_taken_and_a_worse_one_is_not(objectives):
    prior, density = prior_of(Problem("softmax").model())
    mean = prior.mean.detach()
    mode = find_mode(prior.space, density, mean)
    again = find_mode(prior.space, density, mean, mode.position.coordinates)
    assert mode.steps > 1 and again.steps == 0
    far = find_mode(prior.space, density, mean, mode.position.coordinates + 1e3)
    assert far.steps == mode.steps


def test_a_search_that_ends_too_soon_says_so(monkeypatch):
    monkeypatch.setattr(newton, "_MOST_STEPS", 2)
    with pytest.warns(NumericalWarning, match="has not reached the mode: after 2 Newton steps"):
        Problem("softmax").model(scale=1e4).eval().approximation  # noqa: B018


@pytest.mark.engine_independent
def test_a_prior_beyond_float64_says_so():
    space = FunctionSpace(torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double() * 1e20)
    with pytest.raises(RuntimeError, match="smaller outputscale"):
        space.curved(torch.ones(2, 1, 1).double())
