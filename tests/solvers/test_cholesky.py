"""Factors by panels, in float64 throughout and partly in float32."""

import pytest
import torch
from torch import nn

from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import cholesky as module
from ntk_gp.solvers.cholesky import cholesky, cholesky_solve
from ntk_gp.solvers.function_space import FunctionSpaceSolver
from ntk_gp.solvers.system import System

pytestmark = pytest.mark.engine_independent

PANEL = 16
NOISE = 1e-2


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 2 * PANEL)
    monkeypatch.setattr(module, "_PANEL", PANEL)


def kernel_matrix(n: int, batch: int = 1) -> torch.Tensor:
    """One whose spectrum falls fast, as that of an NTK."""
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
    return (features * torch.logspace(0, -8, n, dtype=torch.float64)) @ features.mT


def with_noise(kernel: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return kernel + torch.diag_embed(noise)


@pytest.mark.parametrize("n", [2 * PANEL, 100, 8 * PANEL, 8 * PANEL + 1])
def test_float64_factor_is_lapacks(n):
    noise = torch.linspace(NOISE, 2 * NOISE, 3 * n, dtype=torch.float64).reshape(3, n)
    matrix = with_noise(kernel_matrix(n, 3), noise)
    expected = torch.linalg.cholesky(matrix)
    factor, info = cholesky(matrix.clone(), noise)
    assert not info.any()
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor, expected, rtol=1e-11, atol=1e-13)


def test_a_large_factor_takes_the_place_of_the_matrix():
    noise = torch.full((1, 100), NOISE, dtype=torch.float64)
    matrix = with_noise(kernel_matrix(100), noise)
    assert cholesky(matrix, noise)[0].data_ptr() == matrix.data_ptr()


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("noise", [1e-1, 1e-2])
def test_single_precision_changes_the_matrix_by_no_more_than_its_bound(noise, tolerance):
    n = 400
    noises = torch.full((1, n), noise, dtype=torch.float64)
    matrix = with_noise(kernel_matrix(n), noises)
    factor, info = cholesky(matrix.clone(), noises, tolerance)
    assert not info.any()
    exact = cholesky(matrix.clone(), noises)[0]
    differs = float((factor - exact).abs().max())
    assert differs > 1e-12, "nothing was done in single precision"
    change = torch.linalg.matrix_norm(factor @ factor.mT - matrix, 2)
    assert float(change) < tolerance * noise


def test_single_precision_waits_until_the_rest_is_small():
    n = 400
    noise = torch.full((1, n), NOISE, dtype=torch.float64)
    matrix = with_noise(kernel_matrix(n), noise)
    exact = cholesky(matrix.clone(), noise)[0]
    first = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        different = (cholesky(matrix.clone(), noise, tolerance)[0] - exact).abs().amax(-2)[0] > 1e-12
        first.append(int(different.nonzero()[0]))
    assert 0 < first[0] < first[1] < first[2]
    # None is so small that a posterior variance would keep eight digits.
    assert torch.equal(cholesky(matrix.clone(), noise, 1e-9)[0], exact)


@pytest.mark.parametrize("row", [3, 70])
def test_info_says_where_the_matrix_is_not_positive_definite(row):
    noise = torch.full((2, 100), NOISE, dtype=torch.float64)
    matrix = with_noise(kernel_matrix(100, 2), noise)
    matrix[1, row, row] = -1.0
    expected = torch.linalg.cholesky_ex(matrix)[1]
    assert torch.equal(cholesky(matrix.clone(), noise)[1], expected.long())


@pytest.mark.parametrize("batch", [1, 3])
def test_cholesky_solve(batch):
    factor = torch.linalg.cholesky(with_noise(kernel_matrix(30, batch), torch.full((batch, 30), 0.1).double()))
    rhs = torch.randn(batch, 30, 4, dtype=torch.float64)
    torch.testing.assert_close(cholesky_solve(factor, rhs), torch.cholesky_solve(rhs, factor), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_float32_inputs_are_factorised_partly_in_single_precision(dtype):
    network = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 1)).to(dtype)
    x = torch.randn(1, 300, 2, dtype=dtype)
    system = System(Linearization(FrozenNetwork(network)), x, torch.ones(1, 1), torch.full((1, 300), NOISE))
    solver = FunctionSpaceSolver(system)
    exact = torch.linalg.cholesky(system.dense())
    differs = float((solver.cholesky - exact).abs().max())
    assert (differs > 1e-9) == (dtype == torch.float32)
    jacobian = system.jacobian_at(torch.randn(1, 20, 2, dtype=dtype))
    variance = FunctionSpaceSolver(system, exact).variance(jacobian)
    torch.testing.assert_close(
        solver.variance(jacobian), variance, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0
    )
