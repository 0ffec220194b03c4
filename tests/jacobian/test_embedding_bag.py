"""Embedding bags in all their forms: values and gradients are torch's, and they are served by rules."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.replacements.elementary import embedding_bag
from tests.jacobian.explicit import Subject, assert_close


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("max", False)])
def test_values_and_gradients_of_bags_of_any_length(mode: str, weighted: bool, padding_idx: int | None):
    table = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    indices, offsets = torch.randint(7, (11,)), torch.tensor([0, 3, 3, 9])
    options = {"mode": mode, "padding_idx": padding_idx}
    if weighted:
        options["per_sample_weights"] = torch.randn(11, dtype=torch.float64)
    for include in (False, True):
        starts = torch.cat([offsets, torch.tensor([11])]) if include else offsets
        ours, theirs = (
            function(indices, table, starts, include_last_offset=include, **options)
            for function in (embedding_bag, F.embedding_bag)
        )
        torch.testing.assert_close(ours, theirs)
        gradients = [torch.autograd.grad(bags.sin().sum(), table)[0] for bags in (ours, theirs)]
        torch.testing.assert_close(*gradients)


class Bags(nn.Module):
    def __init__(self, mode: str, weighted: bool, packed: bool, padding_idx: int | None):
        super().__init__()
        self.options = {"mode": mode, "padding_idx": padding_idx}
        self.weighted, self.packed = weighted, packed
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.body, self.head = nn.Linear(5, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        indices, weights = (2 * x.detach().abs()).long().clamp(max=5), x.sin() if self.weighted else None
        offsets = None
        if self.packed:
            offsets, indices = 5 * torch.arange(len(x)), indices.flatten()
            weights = None if weights is None else weights.flatten()
        bags = F.embedding_bag(indices, self.weight, offsets, per_sample_weights=weights, **self.options)
        return self.head(torch.tanh(bags + self.body(x)))


FORMS = [
    form
    for form in itertools.product(("sum", "mean", "max"), (False, True), (False, True), (None, 2))
    if form[0] == "sum" or not form[1]
]


@pytest.mark.parametrize(("mode", "weighted", "packed", "padding_idx"), FORMS)
def test_every_operation_and_input_gradients(mode: str, weighted: bool, packed: bool, padding_idx: int | None):
    network = Subject(Bags(mode, weighted, packed, padding_idx).double())
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    served = network.check(x, 0.9 * x[:, 1:4])
    assert [name for name, by in served.items() if by == "autodiff"] == []
    linearization, ones = Linearization(network.frozen), torch.ones(1, 1, dtype=torch.float64)
    points, step = x.clone().requires_grad_(), torch.zeros_like(x)
    fixed = linearization.jacobian(x)
    linearization.gram(linearization.jacobian(points), fixed, ones).sum().backward()
    step[0, 2, 3] = 1e-6
    up, down = (linearization.gram(linearization.jacobian(y), fixed, ones).sum() for y in (x + step, x - step))
    assert_close(points.grad[0, 2, 3], (up - down) / 2e-6, 1e-5)
