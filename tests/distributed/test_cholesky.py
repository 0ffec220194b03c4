"""The Cholesky factor over ranks, against dense algebra in one process."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ntk_gp.distributed.cholesky import BlockRows, DistributedCholesky, Layout, traffic
from ntk_gp.distributed.group import Group
from tests.distributed.harness import Ranks

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case]

BLOCK, COLUMNS = 16, 3
# Rows of each of two ranks: whole blocks, others, fewer than a block, none.
SIZES = [(64, 64), (51, 50), (70, 33), (5, 4), (1, 0), (0, 20)]


def matrix_of(size: int) -> Tensor:
    """Positive definite, with a condition number of about 1e4."""
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return root @ root.mT / max(size, 1) + 1e-3 * torch.eye(size, dtype=torch.float64)


def vectors_of(size: int) -> Tensor:
    return torch.randn(size, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rows_of(matrix: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    return matrix.split(sizes)[group.rank]


def distributed(matrix: Tensor, sizes: tuple[int, ...], group: Group) -> BlockRows:
    return BlockRows.from_rows(group, Layout(sizes, BLOCK), rows_of(matrix, sizes, group))


def everything(sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """All that a factor gives, with the bytes that went into each."""
    group = Group()
    matrix, vectors = matrix_of(sum(sizes)), vectors_of(sum(sizes))
    other = matrix.square()
    results: dict[str, Tensor] = {}
    sent: dict[str, Counter] = {}

    def call(name: str, function: Callable) -> Tensor:
        group.traffic.clear()
        result = function()
        sent[name] = Counter(group.traffic)
        return result

    factor = call("factorise", lambda: DistributedCholesky(distributed(matrix, sizes, group)))
    assert factor.info == 0
    local = factor.local(vectors)
    forward = call("forward", lambda: factor.forward(local))
    backward = call("backward", lambda: factor.backward(local))
    results["solve"] = call("solve", lambda: factor.solve(vectors))
    inverse = call("inverse", factor.inverse)
    rows = call("inverse factor", lambda: [row for _, row in factor.inverse_factor()])
    whole = matrix.new_zeros(matrix.shape)
    for block, row in zip(factor.layout.blocks, rows, strict=True):
        whole[block.columns, : row.shape[1]] = row
    results["inverse factor"] = whole
    results["forward"] = group.gather(forward, 0, sizes)
    results["backward"] = group.gather(backward, 0, sizes)
    results["logdet"] = factor.logdet()
    results["diagonal"] = factor.diagonal()
    results["diagonal of the inverse"] = inverse.diagonal()
    layout, start = factor.layout, sum(sizes[: group.rank])
    products = matrix.new_zeros(())
    for block in layout.blocks:
        rows = layout.rows_of_rank(group.rank, block.index)
        columns = layout.order()[block.columns]
        products += inverse.column_product(block, other[start + rows.start : start + rows.stop][:, columns])
    results["trace"] = group.sum(products)
    held = sum(piece.numel() for piece in factor.rows.pieces)
    return {"results": results, "sent": sent, "held": held, "nbytes": factor.nbytes}


def expected(sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """The same by torch.linalg, of the matrix in the order of elimination."""
    matrix, vectors = matrix_of(sum(sizes)), vectors_of(sum(sizes))
    order = Layout(sizes, BLOCK).order()
    back = order.argsort()
    factor = torch.linalg.cholesky(matrix[order][:, order])
    inverse = torch.linalg.inv(matrix)
    return {
        "solve": torch.linalg.solve(matrix, vectors),
        "forward": torch.linalg.solve_triangular(factor, vectors[order], upper=False)[back],
        "backward": torch.linalg.solve_triangular(factor.mT, vectors[order], upper=True)[back],
        "logdet": torch.linalg.slogdet(matrix).logabsdet,
        "inverse factor": torch.linalg.solve_triangular(factor, torch.eye(len(order)).double(), upper=False),
        "diagonal": factor.diagonal()[back],
        "diagonal of the inverse": inverse.diagonal(),
        "trace": (inverse * matrix.square()).sum(),
    }


def check(started: Ranks, sizes: tuple[int, ...]) -> None:
    answers = started.run(everything, sizes)
    for name, wanted in expected(sizes).items():
        values = [answer["results"][name] for answer in answers]
        assert all(torch.equal(values[0], value) for value in values), name
        error = (values[0] - wanted).norm() / wanted.norm()
        assert error < 1e-10 or wanted.numel() == 0, (name, float(error))
    layout = Layout(sizes, BLOCK)
    for rank, answer in enumerate(answers):
        for name, counted in traffic(layout, rank, COLUMNS).items():
            assert +answer["sent"][name] == +counted, (rank, name)
        assert answer["nbytes"] == 8 * answer["held"] == 8 * layout.numbers_held(rank)


@pytest.mark.parametrize("sizes", SIZES)
def test_two_ranks(two, sizes):
    check(two, sizes)


@pytest.mark.parametrize("sizes", [(40, 39, 39, 39), (20, 0, 7, 1)])
def test_four_ranks(four, sizes):
    check(four, sizes)


def failure(position: int, value: float) -> int:
    group, sizes = Group(), (50, 47)
    matrix = matrix_of(sum(sizes))
    matrix[position, position] = value
    return DistributedCholesky(distributed(matrix, sizes, group)).info


@pytest.mark.parametrize("value", [-1.0, float("nan")])
@pytest.mark.parametrize("position", [0, 60, 96])
def test_all_ranks_know_where_a_matrix_is_not_positive_definite(two, position, value):
    place = int((Layout((50, 47), BLOCK).order() == position).nonzero())
    assert two.run(failure, position, value) == [place + 1] * 2


class TestLayout:
    @pytest.mark.parametrize("sizes", [*SIZES, (40, 30, 20, 10)])
    def test_each_row_has_its_place(self, sizes):
        layout = Layout(sizes, BLOCK)
        assert torch.equal(layout.order().sort().values, torch.arange(sum(sizes)))
        assert [block.columns.start for block in layout.blocks] == [
            0,
            *(block.columns.stop for block in layout.blocks[:-1]),
        ]
        assert all(block.rows.stop - block.rows.start == block.size for block in layout.blocks)

    @pytest.mark.parametrize("ranks_", [2, 4, 16])
    def test_work_and_memory_are_shared_evenly(self, ranks_):
        """A rank has the numbers, and the flops of a factorisation, of its share to a few parts in a hundred."""
        layout = Layout([10_000] * ranks_)
        size = layout.size
        held = [layout.numbers_held(rank) for rank in range(ranks_)]
        flops = [sum(2.0 * b.size * b.columns.start**2 / 2 for b in layout.of_rank(rank)) for rank in range(ranks_)]
        assert max(held) < 1.03 * (size**2 / 2 / ranks_ + size * layout.block / 2)
        assert max(flops) < 1.03 * size**3 / 3 / ranks_

    @pytest.mark.parametrize("outputs", [1, 3, 10, 300])
    def test_blocks_consist_of_whole_points(self, outputs):
        assert Layout([outputs * 500] * 2, multiple=outputs).block % outputs == 0

    def test_traffic_is_about_half_the_matrix(self):
        """Of each rank's share; one that sends nothing has nobody to send to."""
        layout = Layout([4000] * 4)
        sent = [traffic(layout, rank)["factorise"].total() for rank in range(4)]
        about = 8 * 3 * layout.size**2 / (2 * 4)
        assert all(about < each < 1.1 * about for each in sent)
        assert not any(counted.total() for counted in traffic(Layout([100]), 0).values())
