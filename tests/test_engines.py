"""`--engine` forces an engine on every suite, and what a user is told about the engines."""

import pytest
import torch
from torch import nn

from ntk_gp import NTKKernel
from ntk_gp.jacobian.autodiff import AutodiffEngine
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.network import FrozenNetwork


class Mixed(nn.Module):
    """One parameter that a rule serves, and one that is used in a way that no rule knows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.exponent = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.logaddexp(self.linear(x), self.exponent).sum(-1)


def test_the_engine_that_was_asked_for(pytestconfig):
    expected = AutodiffEngine if pytestconfig.getoption("--engine") == "autodiff" else StructuredEngine
    assert type(NTKKernel(nn.Linear(2, 1))._linearization.engine) is expected
    assert type(Linearization(FrozenNetwork(nn.Linear(2, 1))).engine) is expected


@pytest.mark.parametrize("engine", ["structured", "autodiff"])
def test_report(engine):
    report = NTKKernel(Mixed(), engine=engine).engine_report(torch.randn(5, 3))
    assert [entry["parameter"] for entry in report] == ["exponent", "linear.weight", "linear.bias"]
    by_autodiff = [entry["served_by"] == "autodiff" for entry in report]
    assert by_autodiff == ([True, False, False] if engine == "structured" else [True, True, True])
    assert all((entry["bytes"] == 0) == autodiff for entry, autodiff in zip(report, by_autodiff, strict=True))
    assert all(entry["gram_flops"] > 0 for entry in report)


def test_an_unknown_engine_is_refused_by_name():
    with pytest.raises(ValueError, match=r"engine must be 'structured' or 'autodiff', got 'jax'"):
        NTKKernel(nn.Linear(2, 1), engine="jax")


def test_the_former_name_of_the_default_is_understood():
    with pytest.warns(DeprecationWarning, match="engine='structured'"):
        kernel = NTKKernel(nn.Linear(2, 1), engine="auto")
    assert type(kernel._linearization.engine) is type(NTKKernel(nn.Linear(2, 1))._linearization.engine)
