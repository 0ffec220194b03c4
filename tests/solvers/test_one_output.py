"""Outputs that share features and no parameters: one system for all of them, against dense algebra of all outputs."""

from __future__ import annotations

import pickle

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor, nn

import ntk_gp
from ntk_gp import NetworkMean, NTKKernel, adapted_network, draw_functions
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import System, choose_solver
from ntk_gp.solvers.one_output import OneOutputSolver
from ntk_gp.testing import explicit_jacobian
from tests.adapted import assert_close
from tests.test_structure import Work

pytestmark = pytest.mark.engine_independent
C, WIDTH = 3, 20


def network(bias: bool = True, sums: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, C, bias=bias)]
        return nn.Sequential(*layers, *([Summed()] if sums else [])).double()


class Summed(nn.Module):
    """Adds the sum of all outputs to each of them where they are large."""

    def forward(self, out: Tensor) -> Tensor:
        large = out.detach().abs().sum(-1, keepdim=True) > 100
        return torch.where(large, out.sum(-1, keepdim=True) + out, out)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return 4 * rand(*shape, 2, seed=seed) - 2


def weight_or_bias(name: str) -> str:
    return name.split(".")[1]


NOISES = ["constant", "for each output", "for each point", "for each row"]


def noise_of(kind: str, n: int, batch: int = 1) -> Tensor:
    shape = {"constant": (1, 1), "for each output": (1, C), "for each point": (n, 1), "for each row": (n, C)}[kind]
    return (0.05 + 0.1 * rand(batch, *shape, seed=3)).expand(batch, n, C).flatten(1)


class Problem:
    def __init__(self, n: int, noise: str, batches: tuple[int, int, int] = (1, 1, 1), net: nn.Module | None = None):
        net = network() if net is None else net
        self.x, self.test_x = inputs(batches[0], n), inputs(batches[0], 5, seed=1)
        variances = 0.5 + rand(batches[1], 2, seed=2)
        self.noise = noise_of(noise, n, batches[2])
        frozen = FrozenNetwork(net, output="all", parameters="last_layer", group_by=weight_or_bias)
        self.groups = torch.tensor([frozen.group_names.index("weight")] * C * WIDTH + [1] * C)
        self.system = System(Linearization(frozen), self.x, variances, self.noise)
        jacobian, test = (explicit_jacobian(net, x, parameters="2.*", output="all") for x in (self.x, self.test_x))
        self.jacobian, self.weights = jacobian, variances[:, self.groups].unsqueeze(-2)
        self.matrix = (jacobian * self.weights) @ jacobian.mT + torch.diag_embed(self.noise)
        self.matrix = self.matrix.expand(max(batches), -1, -1)
        cross = (jacobian * self.weights) @ test.mT
        self.covariance = (test * self.weights) @ test.mT - cross.mT @ torch.linalg.solve(self.matrix, cross)
        self.rhs = rand(max(batches), n * C, 2, seed=5)


ONE = (1, 1, 1)
CASES = [
    *((n, ONE, noise) for n in (9, 30) for noise in NOISES),
    (9, (2, 1, 1), "for each output"),
    (9, (1, 2, 1), "constant"),
    (30, (2, 2, 2), "for each row"),
]


@pytest.mark.parametrize(("n", "batches", "noise"), CASES)
def test_every_method(n, batches, noise):
    problem = Problem(n, noise, batches)
    solver = choose_solver(problem.system)
    assert isinstance(solver, OneOutputSolver)
    assert solver.one.system.num_rows == n
    assert solver.one.system.batch == max(batches) * (1 if noise in ("constant", "for each point") else C)
    solution = torch.linalg.solve(problem.matrix, problem.rhs)
    for made in (solver, pickle.loads(pickle.dumps(solver))):
        assert_close(made.solve(problem.rhs), solution, 1e-10)
        assert_close(made.logdet(), problem.matrix.logdet(), 1e-10)
        expected = (problem.jacobian * problem.weights).mT @ solution
        assert_close(made.mean_weights(problem.rhs.mT), expected.mT, 1e-10)
        jacobian = made.system.jacobian_at(problem.test_x)
        assert_close(made.covariance(jacobian, jacobian), problem.covariance, 1e-9)
        assert_close(made.covariance(jacobian[slice(0, 2)], jacobian), problem.covariance[:, : 2 * C], 1e-9)
        assert_close(made.variance(jacobian), problem.covariance.diagonal(dim1=-2, dim2=-1), 1e-9)
    inverse = problem.matrix.inverse()
    by_group, by_noise = solver.logdet_derivatives()
    parts = [problem.jacobian[..., problem.groups == group] for group in (0, 1)]
    assert_close(by_group, torch.stack([(inverse * (p @ p.mT)).sum((-2, -1)) for p in parts], dim=-1), 1e-9)
    assert_close(by_noise, inverse.diagonal(dim1=-2, dim2=-1), 1e-9)


def test_derivatives_with_respect_to_test_inputs():
    problem = Problem(9, "for each output")
    solver = choose_solver(problem.system)

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = solver.system.jacobian_at(x)
        return solver.variance(jacobian), solver.covariance(jacobian, jacobian)

    assert torch.autograd.gradcheck(terms, problem.test_x[:, :2].clone().requires_grad_(), atol=1e-6, fast_mode=True)


def test_inputs_at_which_outputs_share_parameters():
    """A network that is another function at later inputs: these are served by the system of all outputs."""
    problem = Problem(9, "constant", net=network(sums=True))
    solver = choose_solver(problem.system)
    assert isinstance(solver, OneOutputSolver)
    far = torch.cat([problem.test_x[:, :1], torch.full((1, 1, 2), 1e4, dtype=torch.float64)], dim=1)
    test = explicit_jacobian(network(sums=True), far, parameters="2.*", output="all")
    cross = (problem.jacobian * problem.weights) @ test.mT
    expected = (test * problem.weights) @ test.mT - cross.mT @ torch.linalg.solve(problem.matrix, cross)
    jacobian = solver.system.jacobian_at(far)
    assert_close(solver.covariance(jacobian, jacobian), expected, 1e-9)


def test_outputs_that_share_parameters_are_not_apart():
    frozen = FrozenNetwork(network(), output="all")
    system = System(Linearization(frozen), inputs(1, 9), torch.ones(1, 1).double(), noise_of("constant", 9))
    assert not isinstance(choose_solver(system), OneOutputSolver)


class MultitaskGP(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, net: nn.Module, likelihood, parameters="last_layer", **options):
        super().__init__(x, y, likelihood)
        self.mean_module = NetworkMean(net, output="all")
        kernel = NTKKernel(net, output="all", parameters=parameters, **options)
        self.covar_module = kernel if options else gpytorch.kernels.ScaleKernel(kernel)

    def forward(self, x: Tensor) -> MultitaskMultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def model_of(n: int, has_task_noise: bool, **options) -> MultitaskGP:
    likelihood = MultitaskGaussianLikelihood(C, has_task_noise=has_task_noise)
    model = MultitaskGP(inputs(n), rand(n, C, seed=7), network(), likelihood.double(), **options).double()
    likelihood.noise = 0.1
    if has_task_noise:
        likelihood.task_noises = torch.tensor([0.05, 0.1, 0.3], dtype=torch.float64)
    return model


def covariance_of(model: MultitaskGP, x1: Tensor, x2: Tensor) -> Tensor:
    """With its graph."""
    j1, j2 = (explicit_jacobian(network(), x, parameters="2.*", output="all") for x in (x1, x2))
    if isinstance(model.covar_module, NTKKernel):
        groups = model.covar_module.variance.flatten()
        return (j1 * torch.cat([groups[:1].expand(C * WIDTH), groups[1:].expand(C)])) @ j2.mT
    return model.covar_module.outputscale * j1 @ j2.mT


@pytest.mark.parametrize(
    ("n", "has_task_noise", "options"),
    [
        (7, True, {}),
        (24, False, {"variance_groups": "parameter"}),
        (24, True, {"variance_groups": "parameter"}),
        (24, False, {}),
    ],
)
def test_models(n, has_task_noise, options):
    """Marginal likelihood with its derivatives, and posterior, equal the dense ones."""
    model = model_of(n, has_task_noise, **options)
    x, y = model.train_inputs[0], model.train_targets
    residual = (y - network()(x)).detach().reshape(-1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    noise = model.likelihood.noise.expand(C) + (model.likelihood.task_noises if has_task_noise else 0.0)
    matrix = covariance_of(model, x, x) + torch.diag(noise.repeat(n))
    dense = torch.distributions.MultivariateNormal(torch.zeros(n * C, dtype=torch.float64), matrix)
    expected = dense.log_prob(residual) / (n * C)
    expected_gradients = torch.autograd.grad(expected, parameters)
    value = ExactMarginalLogLikelihood(model.likelihood, model.train())(model(x), y)
    assert_close(value.detach(), expected.detach(), 1e-10)
    gradients = torch.autograd.grad(value, parameters)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_close(one, other, 1e-8)

    test_x = inputs(4, seed=9)
    with torch.no_grad():
        posterior = model.eval()(test_x)
        cross = covariance_of(model, x, test_x)
        mean = network()(test_x).reshape(-1) + cross.mT @ torch.linalg.solve(matrix, residual)
        covariance = covariance_of(model, test_x, test_x) - cross.mT @ torch.linalg.solve(matrix, cross)
        assert_close(posterior.mean.reshape(-1), mean, 1e-9)
        assert_close(posterior.variance.reshape(-1), covariance.diagonal(), 1e-8)
        assert_close(posterior.covariance_matrix, covariance, 1e-8)
        assert_close(adapted_network(model)(test_x).reshape(-1), mean, 1e-9)
        assert draw_functions(model, 2)(test_x).shape == (2, 4, C)
    assert isinstance(model.prediction_strategy.solver, OneOutputSolver)
    assert f"one system serves each of {C} outputs" in str(ntk_gp.solver_report(model))


@pytest.mark.parametrize(("n", "has_task_noise"), [(15, False), (60, True)])
def test_nothing_larger_than_one_output_is_factorised(n, has_task_noise):
    model = model_of(n, has_task_noise)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    with Work() as work:
        mll(model.train()(model.train_inputs[0]), model.train_targets).backward()
        model.eval()(inputs(4, seed=9)).variance.sum()
    assert work.largest == min(n, WIDTH + 1)
    size = min(n, WIDTH + 1)
    assert work.flops < 60 * C * n * (WIDTH + 1) ** 2 + 40 * C * size**3 + 4e5


def test_forced_solvers():
    for name in ("function_space", "weight_space"):
        with ntk_gp.settings.solver(name):
            solver = choose_solver(Problem(9, "for each row").system)
        assert solver.name == name
