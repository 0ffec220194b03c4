"""Explicit Jacobians in float64, one point at a time, and what a Jacobian of the structured engine must equal."""

from functools import partial

import torch
from torch import Tensor
from torch.func import jacrev

from ntk_gp.jacobian.structured import StructuredEngine, StructuredJacobian
from ntk_gp.network import FrozenNetwork


def explicit(network: FrozenNetwork, x: Tensor) -> Tensor:
    """J at x (B, n, d), (B, n·C, P): each point by itself, by reverse mode."""
    network.check(x)
    function = network.function(x.dtype, x.device)
    rows = []
    with function.tracing():
        for point in x.reshape(-1, 1, x.shape[-1]):
            pieces = jacrev(lambda parameters, point=point: function(parameters, point)[0])(function.parameters)
            rows.append(function.flatten(pieces))
    return torch.cat(rows).reshape(x.shape[0], -1, function.num_parameters)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm()) + 1e-300


def variances_for(network: FrozenNetwork, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 0.5 + torch.rand(count, network.num_groups, generator=generator, dtype=torch.float64)


def weighted(J1: Tensor, J2: Tensor, network: FrozenNetwork, x: Tensor, weights: Tensor) -> Tensor:
    function = network.function(x.dtype, x.device)
    return (J1 * function.expand_variances(weights).unsqueeze(-2)) @ J2.mT


def check_every_operation(
    network: FrozenNetwork, x: Tensor, other: Tensor, tolerance: float = 1e-10
) -> StructuredJacobian:
    """Compares all products at x and between x and other (fewer points) with explicit Jacobians."""
    close = partial(assert_close, tolerance=tolerance)
    engine = StructuredEngine(network)
    J, K = explicit(network, x), explicit(network, other)
    jacobian, jacobian2 = engine.linearize(x), engine.linearize(other)
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(1, 3, J.shape[-1], generator=generator, dtype=torch.float64)
    v = torch.randn(1, 3, J.shape[-2], generator=generator, dtype=torch.float64)
    weights = variances_for(network, 1)
    close(jacobian.rows(), J)
    close(jacobian.jvp(u), u @ J.mT)
    close(jacobian.vjp(v), v @ J)
    close(jacobian.gram(jacobian, weights), weighted(J, J, network, x, weights))
    close(jacobian2.gram(jacobian, weights), weighted(K, J, network, x, weights))
    close(jacobian.diagonal(weights), weighted(J, J, network, x, weights).diagonal(dim1=-2, dim2=-1))
    close(jacobian2.kernel_matmul(jacobian, v.mT, weights), weighted(K, J, network, x, weights) @ v.mT)
    many = v.repeat(1, 200, 1).mT  # so many columns that the cost model takes the other way
    close(jacobian.kernel_matmul(jacobian, many, weights), weighted(J, J, network, x, weights) @ many)
    close(
        jacobian[: other.shape[1]].cross_diagonal(jacobian2, weights),
        weighted(J[:, : K.shape[1]], K, network, x, weights).diagonal(dim1=-2, dim2=-1),
    )
    assert isinstance(jacobian, StructuredJacobian)
    return jacobian
