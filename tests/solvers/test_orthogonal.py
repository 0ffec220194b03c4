"""Far more scale than noise: posteriors and likelihoods against arithmetic of sixty digits, or a clear error."""

import gpytorch
import mpmath
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from linear_operator.utils.errors import NotPSDError
from torch import Tensor, nn

from ntk_gp import NTKKernel, settings
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import System
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.orthogonal import FunctionSpaceBasis, weight_space_factor
from ntk_gp.solvers.weight_space import WeightSpaceSolver

pytestmark = pytest.mark.engine_independent

RATIOS = [1e0, 1e4, 1e8, 1e10, 1e12, 1e14, 1e16]
SIZES = [12, 50]  # of points, for 29 parameters


def make_network(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 7), activation(), nn.Linear(7, 1)).double()


class Problem:
    """A system whose Jacobian is known to the last bit, and its posterior to sixty digits.

    The scale is a power of four and the noise one of two: the square roots that whiten are exact.
    """

    def __init__(
        self,
        activation: type[nn.Module],
        n: int,
        ratio: float,
        dtype: torch.dtype = torch.float64,
        solved: bool = True,
    ):
        generator = torch.Generator().manual_seed(1)
        x, test_x = (torch.randn(1, m, 2, generator=generator, dtype=dtype) for m in (n, 5))
        self.noise = 4.0 ** round(torch.tensor(ratio).log2().item() / -4)
        self.scale = 4.0 ** round((torch.tensor(ratio).log2().item() + torch.tensor(self.noise).log2().item()) / 2)
        noise = torch.full((1, n), self.noise, dtype=torch.float64)
        linearization = Linearization(FrozenNetwork(make_network(activation)))
        weights = torch.full((1, 1), self.scale, dtype=torch.float64)
        self.system = System(linearization, x, weights, noise, dtype)
        self.test = self.system.jacobian_at(test_x)
        self.residual = torch.randn(1, n, generator=generator, dtype=torch.float64)
        if solved:
            self._solve()

    def _solve(self) -> None:
        with mpmath.workdps(60):
            train, test = (mpmath.matrix(jacobian.rows()[0].tolist()) for jacobian in (self.system.jacobian, self.test))
            n, scale = train.rows, mpmath.mpf(self.scale)
            factor = mpmath.cholesky(scale * train * train.T + mpmath.mpf(self.noise) * mpmath.eye(n))
            right = [list(row) for row in (scale * train * test.T).tolist()]
            right = mpmath.matrix([[*row, r] for row, r in zip(right, self.residual[0].tolist(), strict=True)])
            half = _forward(factor, right)
            inner = half.T * half
            m = test.rows
            prior = scale * test * test.T
            self.covariance = _tensor(prior - inner[:m, :m]).unsqueeze(0)
            self.variance = self.covariance.diagonal(dim1=-2, dim2=-1)
            self.mean = _tensor(inner[:m, m]).reshape(1, -1)
            self.inv_quad = float(inner[m, m])
            self.logdet = float(2 * sum(mpmath.log(factor[i, i]) for i in range(n)))


def _forward(factor: mpmath.matrix, right: mpmath.matrix) -> mpmath.matrix:
    """L⁻¹ right."""
    half = right.copy()
    for i in range(factor.rows):
        for j in range(right.cols):
            known = mpmath.fsum(factor[i, k] * half[k, j] for k in range(i))
            half[i, j] = (half[i, j] - known) / factor[i, i]
    return half


def _tensor(matrix: mpmath.matrix) -> Tensor:
    return torch.tensor([[float(entry) for entry in row] for row in matrix.tolist()], dtype=torch.float64)


def errors(solver, problem: Problem) -> dict[str, float]:
    weights = solver.mean_weights(problem.residual.unsqueeze(1))[:, 0]
    mean = (problem.test.rows() @ weights.unsqueeze(-1)).squeeze(-1)
    covariance, root = solver.covariance(problem.test, problem.test), problem.variance.sqrt()
    inv_quad = float((problem.residual * solver.solve(problem.residual.unsqueeze(-1))[..., 0]).sum())
    return {
        "variance": float((solver.variance(problem.test) / problem.variance - 1).abs().max()),
        "covariance": float(((covariance - problem.covariance) / root.unsqueeze(-1) / root.unsqueeze(-2)).abs().max()),
        # Where the data say next to nothing, the mean is as ill-determined as its deviation is large.
        "mean": float(((mean - problem.mean).abs() / (problem.mean.abs().max() + root)).max()),
        "inv_quad": abs(inv_quad / problem.inv_quad - 1),
        "logdet": float((solver.logdet() - problem.logdet).abs().max()) / problem.system.num_rows,
    }


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ratio", RATIOS)
def test_right_at_any_ratio(activation, n, dtype, ratio):
    problem = Problem(activation, n, ratio, dtype)
    for way in (FunctionSpaceSolver, WeightSpaceSolver):
        found = errors(way(problem.system), problem)
        tolerance = 1e-8 if dtype == torch.float64 else 5e-3
        mean = max(1e-8 if dtype == torch.float64 else 1e-5, 1e-12 * ratio**0.5)
        limits = {"variance": tolerance, "covariance": 5 * tolerance, "mean": mean, "inv_quad": 1e-5, "logdet": 1e-5}
        assert all(found[name] <= limits[name] for name in limits), (way, found)


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
@pytest.mark.parametrize("n", SIZES)
def test_where_cholesky_fails_features_answer(way, n):
    solver = way(Problem(nn.ReLU, n, 1e16).system)
    assert isinstance(getattr(solver, "basis", None), FunctionSpaceBasis) or solver.is_orthogonalised


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
def test_at_ordinary_ratios_nothing_is_orthogonalised(way, monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", None)
    for n in SIZES:
        solver = way(Problem(nn.ReLU, n, 1e4).system)
        assert max(errors(solver, Problem(nn.ReLU, n, 1e4)).values()) < 1e-8


@pytest.mark.parametrize("budget", [1, 200])
def test_blocks_make_the_same_factor(budget, monkeypatch):
    """Of a few rows at a time, and of all at once; the right-hand sides beside them."""
    system = Problem(nn.ReLU, 150, 1e4, solved=False).system
    rhs = torch.randn(1, 150, 3, dtype=torch.float64)
    monkeypatch.setattr("ntk_gp.solvers.orthogonal._ROWS", budget)
    factor, half = weight_space_factor(system, rhs)
    features = system.jacobian.rows() * system.root_variances.unsqueeze(-2)
    scaled = features * system.noise.rsqrt().unsqueeze(-1)
    tall = torch.cat([scaled, torch.eye(scaled.shape[-1], dtype=torch.float64)[None]], dim=-2)
    basis, triangle = torch.linalg.qr(tall)
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()
    torch.testing.assert_close(factor, (triangle * signs.unsqueeze(-1)).mT, rtol=1e-6, atol=1e-6)
    padded = torch.cat([rhs * system.noise.rsqrt().unsqueeze(-1), rhs.new_zeros(1, scaled.shape[-1], 3)], dim=-2)
    expected = signs.unsqueeze(-1) * (basis.mT @ padded)
    torch.testing.assert_close(half, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("way", [FunctionSpaceSolver, WeightSpaceSolver])
def test_without_memory_it_is_said(way):
    system = Problem(nn.ReLU, 50, 1e16).system
    with (
        settings.memory_budget(8 * 3 * 50**2 if way is FunctionSpaceSolver else 8 * 3 * 29**2),
        pytest.raises(NotPSDError, match=r"largest prior variance is .*smallest noise .*memory_budget.*outputscale"),
    ):
        way(system)


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, scale: float, noise: float):
        likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-14))
        super().__init__(x, y, likelihood.double())
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = ScaleKernel(NTKKernel(make_network(nn.ReLU))).double()
        self.covar_module.outputscale = scale
        self.likelihood.noise = noise

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ratio", [1e4, 1e12, 1e14])
def test_the_marginal_likelihood(n, ratio):
    """While fitting, too: eigenvalues of K, on which steps are cheap, are no use below its rounding."""
    problem = Problem(nn.ReLU, n, ratio)
    model = Model(problem.system.x[0], problem.residual[0], problem.scale, problem.noise).train()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    expected = -0.5 * (problem.inv_quad + problem.logdet) / n - 0.5 * torch.tensor(2 * torch.pi).log().item()
    value = mll(model(problem.system.x[0]), problem.residual[0])
    assert abs(float(value) / expected - 1) < 1e-6
    (slope,) = torch.autograd.grad(value, model.likelihood.raw_noise)
    step = 1e-4
    values = []
    for sign in (1, -1):
        model.likelihood.noise = problem.noise * (1 + sign * step)
        values.append(float(mll(model(problem.system.x[0]), problem.residual[0]).detach()))
    by_noise = (values[0] - values[1]) / (2 * step * problem.noise)
    chain = torch.autograd.grad(
        model.likelihood.noise_covar.raw_noise_constraint.transform(model.likelihood.raw_noise).sum(),
        model.likelihood.raw_noise,
    )[0]
    assert abs(float(slope / chain) / by_noise - 1) < 1e-4
