"""Dirichlet classification by GPyTorch's own likelihood, with a kernel for each class, against closed forms."""

import gpytorch
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import DirichletClassificationLikelihood
from gpytorch.means import ConstantMean
from torch import Size, Tensor, nn

from ntk_gp import NTKKernel, draw_functions
from ntk_gp.testing import explicit_jacobian
from tests import references

CLASSES = 3


class DirichletGP(gpytorch.models.ExactGP):
    """As in GPyTorch's documentation, but for the kernel."""

    def __init__(self, x: Tensor, labels: Tensor, network: nn.Module):
        likelihood = DirichletClassificationLikelihood(labels, learn_additional_noise=True, dtype=torch.float64)
        super().__init__(x, likelihood.transformed_targets, likelihood)
        self.mean_module = ConstantMean(batch_shape=Size([CLASSES]))
        self.covar_module = ScaleKernel(NTKKernel(network, output="batch"), batch_shape=Size([CLASSES]))
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def problem() -> tuple[nn.Module, DirichletGP, Tensor, Tensor]:
    """A network with three logits, a model after a few steps of fitting, and test inputs with their classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
        centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=torch.float64)
        labels = torch.arange(12) % CLASSES
        x, z = (centres[labels] + 0.4 * torch.randn(12, 2, dtype=torch.float64) for _ in range(2))
    model = DirichletGP(x, labels, network)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        (-objective(model.train()(x), model.likelihood.transformed_targets)).sum().backward()
        optimizer.step()
    return network, model.eval(), z, labels


def test_the_posterior_of_each_class_is_that_of_its_logit():
    network, model, z, _ = problem()
    x, likelihood = model.train_inputs[0], model.likelihood
    J = explicit_jacobian(network, torch.cat([x, z])).unflatten(0, (-1, CLASSES)).transpose(0, 1)
    scales, constants = model.covar_module.outputscale.detach(), model.mean_module.constant.detach()
    noise, targets = likelihood.noise.detach(), likelihood.transformed_targets
    assert len(scales.unique()) == len(constants.unique()) == CLASSES
    with torch.no_grad():
        prediction = model(z)
        kernels = model.covar_module.base_kernel(x).to_dense()
        terms = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)(model.train()(x), targets)
        model.eval()
    for c in range(CLASSES):
        K, m = scales[c] * J[c] @ J[c].mT, constants[c].expand(len(J[c]))
        mean, covariance = references.posterior(m, K, torch.diag(noise[c]), targets[c])
        torch.testing.assert_close(prediction.mean[c], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(prediction.covariance_matrix[c], covariance, rtol=1e-10, atol=1e-10)
        A = K[: len(x), : len(x)] + torch.diag(noise[c])
        expected = references.log_marginal_likelihood(targets[c] - constants[c], A)
        torch.testing.assert_close(terms[c], expected, rtol=1e-10, atol=1e-10)
        assert (kernels[c] - kernels[c - 1]).norm() > 0.02 * kernels[c].norm()


def test_probabilities_by_sampling():
    _, model, z, labels = problem()
    with torch.no_grad():
        torch.manual_seed(0)
        samples = model(z).sample(Size([500]))  # (draws, C, m)
        probabilities = samples.softmax(-2).mean(0)
        functions = draw_functions(model, 500, generator=torch.Generator().manual_seed(1))(z).softmax(-2).mean(0)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(len(z), dtype=torch.float64))
    assert torch.equal(probabilities.argmax(0), labels)
    torch.testing.assert_close(functions, probabilities, rtol=0.0, atol=0.1)
