"""Every way to solve with K + D, against dense float64 algebra on explicit Jacobians."""

import pickle
from itertools import product

import gpytorch
import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from ntk_gp import settings
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import Solver, Spectrum, System, choose_solver
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.iterative import IterativeSolver
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from ntk_gp.testing import SolverProblem as Problem
from ntk_gp.testing import check_solver
from ntk_gp.testing.solvers import BATCHES
from tests.adapted import LARGE, SMALL, assert_close

pytestmark = pytest.mark.engine_independent

EXACT = [FunctionSpaceSolver, WeightSpaceSolver]
WAYS = [*EXACT, IterativeSolver]


@pytest.fixture(autouse=True)
def converged():
    with settings.solve_tolerance(1e-12):
        yield


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_contract(way, n, outputs):
    check_solver(way, sizes=[n], outputs=[outputs], batches=BATCHES)


@pytest.mark.parametrize("way", EXACT)
def test_more_data_extends(way):
    problem = Problem(LARGE)
    system = problem.beginning(LARGE - 5)
    assert problem.system.starts_with(system)
    extended = way(system).extended(problem.system)
    assert isinstance(extended, way) or way.extended is Solver.extended


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("outputs", [1, 2])
def test_the_contract_of_conjugate_gradients(n, outputs):
    """Estimated log-determinants, and their derivatives, are held to their standard errors below."""
    way = IterativeSolver
    check_solver(way, sizes=[n], outputs=[outputs], batches=[(1, 1, 1)], tolerance=1e-9, logdet_tolerance=0.3)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("outputs", [1, 2])
def test_conjugate_gradients_reach_their_tolerance(n, outputs):
    problem = Problem(n, outputs=outputs)
    solver = IterativeSolver(problem.system)
    assert_close(solver.solve(problem.rhs), torch.linalg.solve(problem.matrix, problem.rhs), 1e-9)
    jacobian = problem.system.jacobian_at(problem.test_x)
    assert_close(solver.covariance(jacobian, jacobian), problem.covariance, 1e-9)
    assert_close(solver.variance(jacobian), problem.covariance.diagonal(dim1=-2, dim2=-1), 1e-9)
    with settings.solve_tolerance(1e-3):
        solution = solver.solve(problem.rhs)
    residual = (problem.matrix @ solution - problem.rhs).norm(dim=-2) / problem.rhs.norm(dim=-2)
    assert residual.max() <= 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_any_unit_of_the_targets(way, scale):
    problem = Problem(200)
    system = System(problem.system.linearization, problem.x, scale * problem.group_variances, scale * problem.noise)
    solver = way(system)
    assert_close(solver.solve(problem.rhs) * scale, torch.linalg.solve(problem.matrix, problem.rhs))
    variance = solver.variance(system.jacobian_at(problem.test_x)) / scale
    assert_close(variance, problem.covariance.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("noise", [0.1, 1e-4])
@pytest.mark.parametrize("outputs", [1, 2])
def test_float32_inputs_are_iterated_with_in_single_precision(outputs, noise, monkeypatch):
    """The residual that ends it is that of float64, far below what float32 resolves."""
    problem = Problem(LARGE, outputs=outputs, noise=noise)
    problem.system.x = problem.x.float().double()
    problem.system.dtype = torch.float32
    used = []
    original = Linearization.kernel_matmul
    monkeypatch.setattr(
        Linearization, "kernel_matmul", lambda self, *args: used.append(args[0].x.dtype) or original(self, *args)
    )
    rhs = problem.rhs[:1]
    solver = IterativeSolver(problem.system)
    with settings.solve_tolerance(1e-9):
        solution = solver.solve(rhs)
    assert solver.report.converged
    assert used.count(torch.float32) > used.count(torch.float64) > 0
    left = rhs - problem.system.dense() @ solution
    assert (left.norm(dim=-2) <= 1.01e-9 * rhs.norm(dim=-2)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_a_factor_of_the_same_precision_is_extended(dtype):
    whole = Problem(LARGE).system
    part = System(whole.linearization, whole.x[:, :SMALL], whole.variances, whole.noise[:, :SMALL], dtype)
    assert whole.starts_with(part) == (dtype == whole.dtype)


def test_each_column_converges():
    problem = Problem(LARGE, noise=1e-4)
    rhs = problem.rhs * torch.tensor([1.0, 1e-9, 1e9, 0.0])
    with settings.solve_tolerance(1e-6):
        solution = IterativeSolver(problem.system).solve(rhs)
    residual = (problem.matrix @ solution - rhs).norm(dim=-2)
    assert (residual <= 1.01e-6 * rhs.norm(dim=-2)).all()


def test_no_convergence_warns_with_the_residual():
    problem = Problem(LARGE, noise=1e-8)
    solver = IterativeSolver(problem.system)
    solver.preconditioner.factors = torch.ones_like(solver.preconditioner.factors)
    with (
        gpytorch.settings.max_cg_iterations(3),
        settings.memory_budget(1000),
        pytest.warns(NumericalWarning, match="relative residual of") as caught,
    ):
        solution = solver.solve(problem.rhs)
    residual = ((problem.matrix @ solution - problem.rhs).norm(dim=-2) / problem.rhs.norm(dim=-2)).max()
    assert f"{float(residual):.1e}" in str(caught[0].message)
    assert "memory_budget" in str(caught[0].message)
    assert solver.report.residual == pytest.approx(float(residual), rel=1e-6)
    assert not solver.report.converged


def test_no_convergence_falls_back_where_an_exact_way_fits(recwarn):
    problem = Problem(LARGE, noise=1e-3)
    solver = IterativeSolver(problem.system)
    with gpytorch.settings.max_cg_iterations(1):
        solution = solver.solve(problem.rhs)
    assert not solver.report.converged
    assert_close(solution, torch.linalg.solve(problem.matrix, problem.rhs))
    assert not [w for w in recwarn if "Conjugate gradients" in str(w.message)]


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_the_error_estimate_is_of_the_errors_size(n):
    problem = Problem(n, noise=1e-3)
    solver = IterativeSolver(problem.system)
    with settings.solve_tolerance(1e-3), settings.memory_budget(1000):
        solution = solver.solve(problem.rhs)
    exact = torch.linalg.solve(problem.matrix, problem.rhs)
    energies = [(z * (problem.matrix @ z)).sum(-2) for z in (solution - exact, exact)]
    error = float((energies[0] / energies[1]).max().sqrt())
    assert error / 10 <= solver.report.error <= 10 * error


@pytest.mark.parametrize(("n", "outputs"), list(product([SMALL, LARGE], [1, 2])))
def test_estimated_log_determinants(n, outputs):
    """Few landmarks, so that something is left to estimate: within five standard errors of the probes."""
    problem = Problem(n, outputs=outputs)
    budget = 4 * 8 * problem.system.num_rows * 5
    with settings.memory_budget(budget):
        solver = IterativeSolver(problem.system)
    assert solver.preconditioner.basis.shape[-1] <= 5
    with gpytorch.settings.num_trace_samples(400):
        logdet = solver.logdet()
        by_group, by_noise = solver.logdet_derivatives()
    preconditioner, identity = solver.preconditioner, torch.eye(n * outputs, dtype=torch.float64)
    whitened = preconditioner.scale.mT * problem.matrix[0] * preconditioner.scale
    left = preconditioner.root(preconditioner.root(whitened).mT)
    values, vectors = torch.linalg.eigh(left)
    log = (vectors * values.log()) @ vectors.mT
    deviation = (2 * (log - log * identity).square().sum() / 400).sqrt()
    assert abs(logdet - problem.matrix.logdet()) <= 5 * deviation + 1e-6
    exact_by_group, exact_by_noise = FunctionSpaceSolver(problem.system).logdet_derivatives()
    assert_close(by_group, exact_by_group, 0.1)
    assert_close(by_noise, exact_by_noise, 0.3)


@pytest.mark.parametrize("way", WAYS)
def test_derivatives_with_respect_to_test_inputs(way):
    problem = Problem(SMALL, outputs=2)
    solver = way(problem.system)
    x = problem.test_x.clone().requires_grad_()

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = problem.system.jacobian_at(x)
        return solver.variance(jacobian), solver.covariance(jacobian, jacobian)

    # Products come from the engine until storing K has paid, and then from K: not to the last bit.
    assert torch.autograd.gradcheck(terms, x, atol=1e-6, nondet_tol=1e-6, fast_mode=True)


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize(("x_batch", "batch"), [(1, 1), (1, 3), (3, 3)])
def test_spectrum(n, outputs, x_batch, batch):
    problem = Problem(n, (x_batch, 1, 1), outputs, unit_variances=True)
    spectrum = Spectrum(problem.system)
    scale, noise = (torch.rand(batch, 1, dtype=torch.float64) + 0.2 for _ in range(2))
    diagonal = torch.diag_embed(problem.noise)
    matrix = scale.unsqueeze(-1) * (problem.matrix - diagonal) + noise.unsqueeze(-1) * diagonal
    rhs = torch.randn(batch, n * outputs, 2, dtype=torch.float64)
    inv_quad, logdet = spectrum.inv_quad_logdet(rhs, scale, noise)
    assert_close(inv_quad, (rhs * torch.linalg.solve(matrix, rhs)).sum(-2))
    assert_close(logdet, matrix.logdet())


class TestChoice:
    def choice(self, n: int, **options) -> type[Solver]:
        return type(choose_solver(Problem(n, **options).system))

    def test_the_smaller_space(self):
        assert self.choice(SMALL) is FunctionSpaceSolver
        assert self.choice(400) is WeightSpaceSolver

    def test_memory(self):
        with settings.memory_budget(8 * 2 * 41**2 - 1):
            assert self.choice(LARGE) is IterativeSolver
        with settings.memory_budget(8 * 2 * 41**2):
            assert self.choice(LARGE) is WeightSpaceSolver

    def test_batches_that_do_not_fit_say_so(self):
        with settings.memory_budget(8 * 1000), pytest.raises(MemoryError, match=r"memory_budget"):
            self.choice(LARGE, batches=(3, 1, 1))

    @pytest.mark.parametrize(("limit", "expected"), [(30, IterativeSolver), (41, WeightSpaceSolver)])
    def test_the_users_cholesky_size(self, limit, expected):
        with gpytorch.settings.max_cholesky_size(limit):
            assert self.choice(LARGE * 4) is expected

    def test_a_few_points_more_extend_the_solver_in_use(self, monkeypatch):
        problem = Problem(LARGE)
        old = System(problem.system.linearization, problem.x[:, :-1], problem.group_variances, problem.noise[:, :-1])
        solver = choose_solver(old)
        calls = []
        original = type(solver).extended
        monkeypatch.setattr(type(solver), "extended", lambda *args: calls.append(1) or original(*args))
        assert_close(choose_solver(problem.system).solve(problem.rhs), problem.matrix.inverse() @ problem.rhs)
        assert calls == [1]

    def test_much_new_data_does_not_tie_to_the_old_way(self):
        """A hundred times as many points as before are solved as if they had come at once."""
        problem = Problem(1200)
        old = System(problem.system.linearization, problem.x[:, :10], problem.group_variances, problem.noise[:, :10])
        first = choose_solver(old)
        assert type(first) is FunctionSpaceSolver
        assert type(choose_solver(problem.system)) is WeightSpaceSolver

    @pytest.mark.parametrize("change", ["x", "variances", "noise"])
    def test_other_data_do_not_extend(self, change):
        problem = Problem(LARGE)
        arguments = {
            "x": problem.x[:, :-1].clone(),
            "variances": problem.group_variances.clone(),
            "noise": problem.noise[:, :-1],
        }
        arguments[change] = arguments[change].clone()
        arguments[change][0, 0] += 1e-3
        old = System(problem.system.linearization, **arguments)
        assert not problem.system.starts_with(old)


@pytest.mark.parametrize("way", WAYS)
def test_pickling(way):
    problem = Problem(SMALL)
    solver = way(problem.system)
    restored = pickle.loads(pickle.dumps(solver))
    assert_close(restored.solve(problem.rhs), solver.solve(problem.rhs), 1e-13)
    jacobian = restored.system.jacobian_at(problem.test_x)
    assert_close(restored.variance(jacobian), problem.covariance.diagonal(dim1=-2, dim2=-1), 1e-8)


@pytest.mark.parametrize("way", WAYS)
def test_variances_are_never_negative(way):
    """At the training points, with hardly any noise, rounding is all that is left."""
    problem = Problem(30, noise=1e-11)
    with settings.solve_tolerance(1e-6), gpytorch.settings.max_cg_iterations(50):
        variance = way(problem.system).variance(problem.system.jacobian_at(problem.x))
    assert (variance >= 0).all()


@pytest.mark.parametrize("way", EXACT)
def test_a_prior_variance_of_zero(way):
    problem = Problem(SMALL)
    variances = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    system = System(problem.system.linearization, problem.x, variances, problem.noise)
    parts = [problem.jacobian[..., problem.groups == g] for g in (0, 1)]
    inverse = (parts[0] @ parts[0].mT + torch.diag_embed(problem.noise)).inverse()
    solver = way(system)
    assert_close(solver.solve(problem.rhs), inverse @ problem.rhs)
    by_group, _ = solver.logdet_derivatives()
    assert_close(by_group, torch.stack([(inverse * (p @ p.mT)).sum((-2, -1)) for p in parts], dim=-1))


@pytest.mark.parametrize("way", [*WAYS, Spectrum])
def test_a_jacobian_that_overflows_names_the_inputs(way):
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()

    class RootOf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.bias = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + (x.abs() + self.bias).sqrt()

    x = torch.linspace(1.0, 3.0, 30, dtype=torch.float64).reshape(1, -1, 1)
    x[0, 17] = 0.0  # sqrt has no derivative there
    ones = torch.ones(1, 1, dtype=torch.float64)
    system = System(Linearization(FrozenNetwork(RootOf())), x, ones, ones.expand(1, 30))
    with pytest.raises(ValueError, match=r"Jacobian is NaN or infinite at some training inputs, .* in rows \[17\]"):
        way(system)
