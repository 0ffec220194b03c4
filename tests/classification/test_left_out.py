"""The posterior without each label: against dense algebra, and beside models fitted without it."""

import math

import pytest
import torch

import ntk_gp

from .problems import LIKELIHOODS, Problem, Reference
from .test_predictions import softmax_probit


def cavities(reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """By natural parameters of all latent values at once, less those of one label."""
    outputs = reference.mean.shape[-1]
    precision = torch.linalg.inv(reference.matrix) + reference.hessian
    gradient = torch.func.grad(reference.value)(reference.f)
    means, covariances = [], []
    for rows in torch.arange(len(reference.f)).split(outputs):
        own = torch.zeros_like(precision)
        own[rows[:, None], rows] = reference.hessian[rows[:, None], rows]
        natural = precision @ reference.f - own @ reference.f
        natural[rows] -= gradient[rows]
        covariance = torch.linalg.inv(precision - own)
        means.append((covariance @ natural)[rows])
        covariances.append(covariance[rows[:, None], rows])
    return torch.stack(means), torch.stack(covariances)


def probabilities(name: str, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    if name == "softmax":
        return softmax_probit(mean, covariance)
    mean, variance = mean[:, 0], covariance[:, 0, 0]
    if name == "logistic":
        return torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt())
    return torch.distributions.Normal(0.0, 1.0).cdf(mean / (1 + variance).sqrt())


@pytest.mark.parametrize("space", ["function_space", "weight_space"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_is_dense_algebra(name, space):
    problem = Problem(name, n=6, width=8)
    matrix = problem.gram(problem.variances)
    reference = Reference(name, matrix, problem.values(problem.x), problem.labels)
    with ntk_gp.settings.solver(space):
        found = problem.model().eval().leave_one_out_proba()
    torch.testing.assert_close(found, probabilities(name, *cavities(reference)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_is_close_to_fitting_without_each(name):
    """Closer than the posterior with all labels is, which has seen them."""
    problem = Problem(name, n=8, sureness=0.3)
    model = problem.model(scale=0.5).eval()
    left_out = model.leave_one_out_proba()
    with_all = model.predict_proba(problem.x)
    refitted = []
    for i in range(len(problem.x)):
        others = torch.arange(len(problem.x)) != i
        model.set_train_data(problem.x[others], problem.labels[others], strict=False)
        refitted.append(model.predict_proba(problem.x[i : i + 1])[0])
    refitted = torch.stack(refitted)
    assert (left_out - refitted).abs().max() < 0.02
    assert (left_out - refitted).abs().max() < 0.2 * (with_all - refitted).abs().max()


def test_by_monte_carlo():
    model = Problem("softmax").model().eval()
    drawn = model.leave_one_out_proba("monte_carlo", samples=4000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.sum(-1), torch.ones(8).double())
    assert 1e-6 < (drawn - model.leave_one_out_proba()).abs().max() < 0.05


def test_in_train_mode_it_asks_for_eval():
    with pytest.raises(RuntimeError, match=r"model\.eval"):
        Problem("softmax").model().leave_one_out_proba()


@pytest.mark.parametrize("apply", [ntk_gp.averaged, ntk_gp.scale_to_data, lambda model: ntk_gp.compare({"a": model})])
def test_what_takes_residuals_says_what_to_do_for_labels(apply):
    with pytest.raises(TypeError, match=r"ExactGP, got Classifier. Labels have no residuals.*leave_one_out_proba"):
        apply(Problem("softmax").model())
