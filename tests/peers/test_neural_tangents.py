"""Empirical kernels, training in closed form, and infinite width, beside neural-tangents in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from ntk_gp import GradientFlow, NTKKernel, largest_stable_rate
from tests.adapted import data, network
from tests.peers.processes import ask

PATH = Path(__file__).parents[2] / "notebooks" / "infinite_width.py"
spec = importlib.util.spec_from_file_location("infinite_width", PATH)
infinite_width = importlib.util.module_from_spec(spec)
spec.loader.exec_module(infinite_width)

PEER = "neural_tangents"


def close(actual, expected, tolerance: float = 1e-8) -> None:
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("outputs", [1, 2])
def test_gradient_descent_mse(outputs):
    """Its loss is half the mean square, over all points and outputs."""
    net, (x, y), test_x = network(outputs=outputs), data(12, outputs=outputs), data(5, seed=1)[0]
    kernel = NTKKernel(net, output="all")
    times = torch.tensor([0.0, 1.0, 30.0, 1000.0], dtype=torch.float64)
    with torch.no_grad():
        matrix, cross = kernel(x).to_dense(), kernel(test_x, x).to_dense()
        answer = ask(
            PEER,
            "gradient_descent",
            matrix=matrix.reshape(12, outputs, 12, outputs).transpose(1, 2),
            cross=cross.reshape(5, outputs, 12, outputs).transpose(1, 2),
            y=y,
            start=net(x),
            test_start=net(test_x),
            times=times,
        )
    flow = GradientFlow(net, x, y, loss="half_mse")
    close(flow.predict(x, times), answer["train"].reshape(4, *flow.predict(x, 0.0).shape))
    close(flow.predict(test_x, times), answer["test"].reshape(4, *flow.predict(test_x, 0.0).shape))


def test_max_learning_rate():
    net, (x, _) = network(), data(12)
    answer = ask(PEER, "largest_rate", matrix=NTKKernel(net)(x).to_dense())
    assert largest_stable_rate(net, x, loss="half_mse") == pytest.approx(float(answer["rate"]), rel=1e-10)


# trace_axes, diagonal_axes, and what they make of k(n, a, b, m, c, d): traces are divided by the size of their axes.
AXES = [
    ("", "", "nabmcd->nmacbd", 1),
    ("-1", "", "nabmcb->nmac", 3),
    ("", "-1", "nabmcb->nmacb", 1),
    ("1", "2", "nabmab->nmb", 2),
    ("1 2", "", "nabmab->nm", 6),
    ("", "1 2", "nabmab->nmab", 1),
]


@pytest.mark.parametrize("implementation", ["JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES"])
def test_empirical_ntk_fn(implementation):
    net, x, test_x = network(outputs=6), data(7)[0], data(4, seed=1)[0]
    traced, diagonal, forms, sizes = zip(*AXES, strict=True)
    options = {"trace_axes": traced, "diagonal_axes": diagonal, "implementation": implementation}
    answer = ask(PEER, "empirical_kernels", x=x, test_x=test_x, **options, **net.state_dict())
    kernel = NTKKernel(net, output="all")(x, test_x).to_dense().reshape(7, 2, 3, 4, 2, 3)
    for k, (form, size) in enumerate(zip(forms, sizes, strict=True)):
        close(torch.einsum(form, kernel) / size, answer[str(k)])


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("layers", [2, 4])
def test_infinitely_wide_networks(activation, layers):
    """Both kernels, and `gradient_descent_mse_ensemble`, which begins at random functions of the other kernel."""
    options = {"layers": layers, "activation": activation, "weight_variance": 1.7, "bias_variance": 0.2}
    tangent, initial = (infinite_width.InfiniteWidthKernel(kind=kind, **options) for kind in ("ntk", "nngp"))
    (x, y), test_x = data(12), data(5, seed=1)[0]
    answer = ask(PEER, "infinite_width", x=x, y=y, test_x=test_x, time=40.0, **options)
    close(tangent(x, test_x).to_dense(), answer["ntk"])
    close(initial(x, test_x).to_dense(), answer["nngp"])
    flow = GradientFlow(tangent, x, y, initial_kernel=initial, loss="half_mse")
    distribution = flow.distribution(test_x, 40.0)
    close(distribution.mean, answer["mean"])
    close(distribution.covariance_matrix, answer["covariance"])
