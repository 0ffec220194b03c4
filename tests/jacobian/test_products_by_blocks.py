"""Gram matrices and products with them take the cheapest way, at the costs that choices are made by."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks
from ntk_gp import settings
from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.jacobian.structured.blocks import rows_of_blocks
from ntk_gp.jacobian.structured.chunked import ChunkedJacobian
from ntk_gp.jacobian.structured.held import StructuredJacobian
from ntk_gp.network import FrozenNetwork
from ntk_gp.testing import explicit_jacobian
from tests.jacobian.explicit import assert_close

F64 = torch.float64
# Of the benchmark, and how many points, for counting operations. Below are convolutions, and what is neither.
NETWORKS = {"5-50-50-1": 60, "5-200-200-10": 20, networks.RESNET: 4, networks.TRANSFORMER: 24}


def convolutions(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Unflatten(1, (2, 8, 8))]
    for channels_in, channels in ((2, 6), (6, 8), (8, 8)):
        layers += [nn.Conv2d(channels_in, channels, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs)).double()


def linearized(network: nn.Module, x: Tensor) -> StructuredJacobian | ChunkedJacobian:
    return StructuredEngine(FrozenNetwork(network, output="all")).linearize(x)


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def one(name: str) -> StructuredJacobian:
    jacobian = linearized(
        networks.build(name).double(), torch.randn(1, NETWORKS[name], networks.input_size(name), dtype=F64)
    )
    assert isinstance(jacobian, StructuredJacobian)
    return jacobian


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_what_is_done(name):
    jacobian, weights = one(name), torch.ones(1, 1, dtype=F64)
    counted = flops(lambda: jacobian.gram(jacobian, weights))
    assert counted / 2 <= jacobian.gram_cost(jacobian) <= 2 * counted
    rhs = torch.randn(1, jacobian.num_rows, 1, dtype=F64)
    counted = flops(lambda: jacobian.kernel_matmul(jacobian, rhs, weights))
    assert counted / 2 <= jacobian.product_cost(jacobian) <= 2 * counted


@pytest.mark.parametrize("name", NETWORKS)
def test_columns_never_cost_much_more_than_the_matrix(name):
    jacobian, weights = one(name), torch.ones(1, 1, dtype=F64)
    rhs = torch.randn(1, jacobian.num_rows, 500, dtype=F64)
    matrix = flops(lambda: jacobian.gram(jacobian, weights))
    product = 2 * jacobian.num_rows**2 * rhs.shape[-1]
    assert flops(lambda: jacobian.kernel_matmul(jacobian, rhs, weights)) <= 1.5 * (matrix + product)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (1, 3, 2)], ids=str)
def test_blocks_that_the_budget_has_room_for(shape, rows):
    batch, weightings, outputs = shape
    network = convolutions(outputs)
    x, other = torch.randn(batch, 7, 128, dtype=F64), torch.randn(batch, 5, 128, dtype=F64)
    J, K = explicit_jacobian(network, x, output="all"), explicit_jacobian(network, other, output="all")
    weights = 0.5 + torch.rand(weightings, 1, dtype=F64)
    jacobian, jacobian2 = linearized(network, x), linearized(network, other)
    rhs = torch.randn(1, 7 * outputs, 200, dtype=F64)
    results = max(batch, weightings)
    with settings.memory_budget(8 * rows * results * outputs * jacobian.num_rows * 8):
        assert rows_of_blocks(jacobian, jacobian, results) == rows
        assert jacobian._formed(jacobian, 200)
        assert_close(jacobian.kernel_matmul(jacobian, rhs, weights), (J * weights[..., None]) @ J.mT @ rhs)
        assert_close(jacobian2.kernel_matmul(jacobian, rhs, weights), (K * weights[..., None]) @ J.mT @ rhs)


def test_a_smaller_budget_makes_columns_the_cheaper_way_at_their_cost():
    """Gradients are formed once more for each block."""
    network, weights = convolutions(), torch.ones(1, 1, dtype=F64)
    jacobian = linearized(network, torch.randn(1, 24, 128, dtype=F64))
    rhs = torch.randn(1, 24, 6, dtype=F64)
    ways = set()
    for rows in (24, 1):
        with settings.memory_budget(8 * rows * 24 * 8):
            formed = set(jacobian._formed(jacobian, 6))
            costs = zip(jacobian._forming_costs(jacobian), jacobian.terms, strict=True)
            expected = sum(
                cost if i in formed else 2 * 24 * 6 * term.product_cost() for i, (cost, term) in enumerate(costs)
            )
            counted = flops(lambda: jacobian.kernel_matmul(jacobian, rhs, weights))
            assert counted / 2 <= expected + 2 * 24**2 * 6 * bool(formed) <= 2 * counted
            ways.add(len(formed))
    assert len(ways) > 1


def test_captured_chunk_by_chunk():
    network, weights = convolutions(), torch.ones(1, 1, dtype=F64)
    x, rhs = torch.randn(1, 24, 128, dtype=F64), torch.randn(1, 24, 300, dtype=F64)
    engine = StructuredEngine(FrozenNetwork(network))
    J = explicit_jacobian(network, x)
    with settings.memory_budget(math.ceil(100 * engine.plan(engine.network.at(x), x).bytes_per_point)):
        jacobian = engine.linearize(x)
        assert isinstance(jacobian, ChunkedJacobian) and jacobian._block_points()[1] < 24
        matrix = flops(lambda: jacobian.gram(jacobian, weights))
        counted = flops(lambda: jacobian.kernel_matmul(jacobian, rhs, weights))
        assert_close(jacobian.kernel_matmul(jacobian, rhs, weights), J @ J.mT @ rhs)
    assert counted <= 1.5 * (matrix + 2 * 24**2 * 300)


def test_pairs_of_positions_are_formed_once_where_the_matrix_is_symmetric():
    network = nn.Sequential(
        nn.Unflatten(1, (6, 200)), nn.Linear(200, 200), nn.Tanh(), nn.Flatten(), nn.Linear(1200, 1)
    ).double()
    x, weights = torch.randn(1, 8, 1200, dtype=F64), torch.ones(1, 1, dtype=F64)
    jacobian, copy = linearized(network, x), linearized(network, x)
    J = explicit_jacobian(network, x)
    assert_close(jacobian.gram(jacobian, weights), J @ J.mT)
    assert flops(lambda: jacobian.gram(jacobian, weights)) <= 0.65 * flops(lambda: jacobian.gram(copy, weights))


def test_outputs_share_products_of_wide_patches():
    """Pairs of 16 positions are dearer than gradients of 64×576 for one output, and cheaper for ten."""
    factored = {}
    for outputs in (1, 10):
        torch.manual_seed(0)
        head = nn.Tanh(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, outputs)
        network = nn.Sequential(nn.Unflatten(1, (64, 4, 4)), nn.Conv2d(64, 64, 3, padding=1), *head).double()
        x, other = torch.randn(1, 3, 1024, dtype=F64), torch.randn(1, 2, 1024, dtype=F64)
        J, K = explicit_jacobian(network, x, output="all"), explicit_jacobian(network, other, output="all")
        jacobian, weights = linearized(network, x), torch.ones(1, 1, dtype=F64)
        assert_close(jacobian.gram(jacobian, weights), J @ J.mT)
        assert_close(jacobian.gram(linearized(network, other), weights), J @ K.mT)
        factored[outputs] = jacobian.terms[0].num_products
    assert factored == {1: 0, 10: 16}
