"""The kernels of infinitely wide networks: against integrals, known values, and wide networks."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ntk_gp import NTKKernel
from tests import references

pytest.importorskip("gpytorch")
PATH = Path(__file__).parents[1] / "notebooks" / "infinite_width.py"
spec = importlib.util.spec_from_file_location("infinite_width", PATH)
infinite_width = importlib.util.module_from_spec(spec)
spec.loader.exec_module(infinite_width)

pytestmark = pytest.mark.engine_independent

FUNCTIONS = {
    "relu": (lambda u: u.clamp_min(0), lambda u: (u > 0).double()),
    "erf": (torch.erf, lambda u: 2 / math.sqrt(math.pi) * torch.exp(-(u**2))),
}


def integral(a: float, b: float, c: float, function) -> float:
    """E[g(u) g(v)] by a sum over a fine grid of polar coordinates, in which kinks of ReLU lie along rays."""
    root = torch.linalg.cholesky(torch.tensor([[a, c], [c, b]], dtype=torch.float64))
    angles = (torch.arange(4000, dtype=torch.float64) + 0.5) * 2 * math.pi / 4000
    radii = (torch.arange(400, dtype=torch.float64) + 0.5) * 10 / 400
    directions = torch.stack([angles.cos(), angles.sin()])  # (2, angles)
    u, v = (root @ directions).unsqueeze(-1) * radii
    weights = torch.exp(-radii.square() / 2) * radii * (10 / 400) / 4000
    return float((function(u) * function(v) * weights).sum())


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 1.0, 0.3), (2.0, 0.5, -0.7), (0.4, 3.0, 1.0)])
def test_moments_are_gaussian_integrals(activation, a, b, c):
    value, slope = infinite_width.ACTIVATIONS[activation].moments(*(torch.tensor(v).double() for v in (a, b, c)))
    function, derivative = FUNCTIONS[activation]
    assert float(value) == pytest.approx(integral(a, b, c, function), abs=3e-5)
    assert float(slope) == pytest.approx(integral(a, b, c, derivative), abs=3e-4)


def test_relu_at_one_point():
    """E[φ(u)²] = a/2 and E[φ'(u)²] = 1/2: with two layers, Σ = σ_w² (σ_w² |x|²/d + σ_b²)/2 + σ_b²."""
    x = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    kernel = infinite_width.InfiniteWidthKernel(2, "relu", "nngp", 2.0, 0.3)
    first = 2.0 * 6 / 3 + 0.3
    assert kernel(x).to_dense().item() == pytest.approx(2.0 * first / 2 + 0.3, rel=1e-12)
    tangent = infinite_width.InfiniteWidthKernel(2, "relu", "ntk", 2.0, 0.3)(x).to_dense().item()
    assert tangent == pytest.approx(2.0 * first / 2 + 0.3 + 2.0 * first * 0.5, rel=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_diagonal_and_symmetry(activation, kind):
    x = torch.randn(6, 3, dtype=torch.float64)
    kernel = infinite_width.InfiniteWidthKernel(4, activation, kind)
    matrix = kernel(x).to_dense()
    torch.testing.assert_close(kernel(x, diag=True), matrix.diagonal(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(matrix, matrix.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel(x[:2], x[3:]).to_dense(), matrix[:2, 3:], rtol=1e-12, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def error(activation: str, width: int, layers: int, x: Tensor, seed: int) -> float:
    torch.manual_seed(seed)
    network = infinite_width.make_network(x.shape[-1], width, layers, activation).double()
    limit = infinite_width.InfiniteWidthKernel(layers, activation)(x).to_dense()
    with torch.no_grad():
        return infinite_width.relative_change(limit, NTKKernel(network)(x).to_dense())


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_kernels_of_wide_networks_come_close_as_one_over_the_root_of_the_width(activation):
    x = torch.randn(8, 3, dtype=torch.float64)
    widths = [32, 128, 512]
    errors = torch.tensor([[error(activation, width, 3, x, seed) for seed in range(8)] for width in widths])
    roots = errors.square().mean(-1).sqrt()
    assert -0.6 < infinite_width.slope(widths, roots) < -0.4
    assert float(roots[-1]) < 0.2


def test_functions_at_random_weights_have_the_covariance():
    x = torch.randn(4, 3, dtype=torch.float64)
    functions = []
    for seed in range(600):
        torch.manual_seed(seed)
        with torch.no_grad():
            functions.append(infinite_width.make_network(3, 64, 2, "relu").double()(x))
    functions = torch.stack(functions)
    expected = infinite_width.InfiniteWidthKernel(2, "relu", "nngp")(x).to_dense()
    found = functions.mT @ functions / len(functions)
    # Of two layers it holds at any width; so large is the standard error of products of Gaussians, and more with tails.
    allowed = 5 * ((expected.diagonal().outer(expected.diagonal()) + expected.square()) / len(functions)).sqrt()
    assert ((found - expected).abs() < allowed).all()


def test_kernel_of_a_network_is_that_of_its_jacobian():
    """The parametrisation is served by the same rules as any other."""
    network = infinite_width.make_network(3, 5, 3, "erf").double()
    x = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(NTKKernel(network)(x).to_dense(), references.kernel(network, x), rtol=1e-11, atol=1e-11)


def test_alignment_and_slope():
    y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    assert infinite_width.alignment(3.0 * y.outer(y), y) == pytest.approx(1.0)
    assert infinite_width.alignment(torch.eye(3).double(), y) == pytest.approx(1 / math.sqrt(3))
    assert infinite_width.slope([10, 100, 1000], torch.tensor([3.0, 0.3, 0.03])) == pytest.approx(-1.0)


@pytest.mark.parametrize(("option", "value"), [("activation", "gelu"), ("kind", "cntk")])
def test_what_is_unknown_is_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        infinite_width.InfiniteWidthKernel(**{option: value})
