"""Adapted networks and drawn functions of classifiers."""

import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel

import ntk_gp
from ntk_gp import GainKernel, adapted_network, draw_functions

from .problems import Problem

SPACES = ("function_space", "weight_space")


@pytest.fixture(params=SPACES)
def space(request):
    with ntk_gp.settings.solver(request.param):
        yield request.param


@pytest.mark.parametrize("name", ["softmax", "logistic"])
@pytest.mark.parametrize("gain", [False, True])
def test_adapted_network_is_the_posterior_mean(name, gain, space):
    problem = Problem(name)
    kernel = ScaleKernel(problem.kernel())
    if gain:
        kernel = kernel + GainKernel(problem.network, output=problem.output)
    model = problem.model(kernel).eval()
    found = adapted_network(model)(problem.test_x)
    torch.testing.assert_close(found, model(problem.test_x).mean, rtol=1e-9, atol=1e-9)


def test_draws_have_the_posterior_moments(space):
    """Their covariance is (Σ⁻¹ + Jᵀ H J)⁻¹, known from the normals that they are linear in."""
    problem = Problem("softmax", n=6, width=2)
    model = problem.model().eval()
    curvature = model.approximation.curvature
    factor = curvature.draw_weights(torch.eye(curvature.num_normals).double())
    variances = problem.variances[problem.groups]
    root = model.approximation.density.curvature_root(model.approximation.latent_mean)
    hessian = torch.block_diag(*(root @ root.mT))
    precision = torch.diag(1 / variances) + problem.jacobian.mT @ hessian @ problem.jacobian
    torch.testing.assert_close(factor.mT @ factor, torch.linalg.inv(precision), rtol=1e-9, atol=1e-9)


def test_drawn_functions(space):
    problem = Problem("softmax")
    model = problem.model().eval()
    functions = draw_functions(model, 4000, generator=torch.Generator().manual_seed(0))(problem.test_x)
    assert functions.shape == (4000, 5, 3)
    posterior = model(problem.test_x)
    error = (functions.mean(0) - posterior.mean) / posterior.stddev
    assert error.abs().max() < 4 / 4000**0.5
    ratio = functions.std(0) / posterior.stddev
    assert (ratio - 1).abs().max() < 0.05
    prior = draw_functions(model, 4000, prior=True, generator=torch.Generator().manual_seed(0))(problem.test_x)
    expected = problem.gram(problem.variances)
    expected = (problem.test_jacobian.square() * problem.variances[problem.groups]).sum(-1).sqrt().view(5, 3)
    assert (prior.std(0) / expected - 1).abs().max() < 0.05


def test_what_has_no_weights():
    problem = Problem("logistic")
    with pytest.raises(TypeError, match="Expected an NTKKernel"):
        adapted_network(problem.model(ScaleKernel(RBFKernel())).eval())
    with pytest.raises(RuntimeError, match="train mode"):
        draw_functions(problem.model(), 2)


def test_forward_that_does_more():
    problem = Problem("logistic")

    class Doubled(type(problem.model())):
        def forward(self, x):
            return super().forward(2 * x)

    model = problem.model()
    model.__class__ = Doubled
    with pytest.raises(ValueError, match="does more than apply"):
        adapted_network(model.eval())
