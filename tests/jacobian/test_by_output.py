"""Outputs as batches, from one capture for all of them, against explicit Jacobians of each output, in float64."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ntk_gp import settings
from ntk_gp.jacobian.base import Jacobian
from ntk_gp.jacobian.by_output import LinearizationByOutput
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.jacobian.structured import ChunkedJacobian, StructuredJacobian
from ntk_gp.network import numbered
from tests.jacobian.explicit import Subject, assert_close, variances_for
from tests.networks import ADVERSARIAL, CASES, Case, mlp

TRICKS = ("points_in_the_middle", "changed_in_place", "data_dependent", "cast")
SEVERAL = [
    pytest.param(case, id=case.name)
    for case in (*CASES, *(case for case in ADVERSARIAL if case.name in TRICKS))
    if case.options.get("output") == "all"
]


def rows(x: Tensor, outputs: int) -> Tensor:
    """x (B, n, d) for each output: (B·C, n, d + 1)."""
    return numbered(x.unsqueeze(1), torch.arange(outputs)[:, None, None]).flatten(0, 1)


def by_output(explicit: Tensor, outputs: int) -> Tensor:
    """(B, n·C, P) to (B·C, n, P)."""
    return explicit.unflatten(1, (-1, outputs)).transpose(1, 2).flatten(0, 1)


def check(subject: Subject, jacobians: tuple[Jacobian, Jacobian], explicit: tuple[Tensor, Tensor], tol: float) -> None:
    """Every operation, with one weighting and with one for each batch."""
    (jacobian, other), (J, K) = jacobians, explicit
    batch = len(J)
    generator = torch.Generator().manual_seed(0)
    for count in {1, batch}:
        weights = subject.variances(count)
        symmetric, crossed = subject.weighted(J, J, weights), subject.weighted(K, J, weights)
        assert_close(jacobian.gram(jacobian, weights), symmetric, tol)
        assert_close(other.gram(jacobian, weights), crossed, tol)
        assert_close(jacobian.diagonal(weights), symmetric.diagonal(dim1=-2, dim2=-1), tol)
        few = jacobian[: K.shape[1]]
        paired = subject.weighted(J[:, : K.shape[1]], K, weights).diagonal(dim1=-2, dim2=-1)
        assert_close(few.cross_diagonal(other, weights), paired, tol)
        v = torch.randn(batch, J.shape[1], 2, generator=generator, dtype=torch.float64)
        assert_close(jacobian.kernel_matmul(jacobian, v, weights), symmetric @ v, tol)
    assert_close(jacobian.rows(), J, tol)
    u = torch.randn(batch, 2, J.shape[2], generator=generator, dtype=torch.float64)
    assert_close(jacobian.jvp(u), u @ J.mT, tol)
    assert_close(jacobian.jvp(u[:1]), u[:1] @ J.mT, tol)
    assert_close(jacobian.vjp(v.mT), v.mT @ J, tol)


@pytest.mark.parametrize("case", SEVERAL)
def test_every_operation_equals_the_explicit_jacobians(case: Case):
    subject = Subject(case.network(), **case.options)
    linearization = LinearizationByOutput(Linearization(subject.frozen))
    x, other = case.inputs(5), case.inputs(4, seed=7)
    outputs = subject.frozen.num_outputs(x)
    jacobians = tuple(linearization.jacobian(rows(points, outputs)) for points in (x, other))
    explicit = tuple(by_output(subject.explicit(points), outputs) for points in (x, other))
    check(subject, jacobians, explicit, case.tolerance)


@pytest.mark.parametrize("name", ["mlp_groups", "resnet", "language", "tied_autoencoder"])
def test_batches_of_inputs_share_what_they_can(name: str):
    (case,) = (case for case in CASES if case.name == name)
    subject = Subject(case.network(), **case.options)
    linearization = LinearizationByOutput(Linearization(subject.frozen))
    x = case.inputs(3, batch=2)
    outputs = subject.frozen.num_outputs(x)
    J = by_output(subject.explicit(x), outputs)
    check(subject, (linearization.jacobian(rows(x, outputs)),) * 2, (J, J), case.tolerance)
    # Inputs of its own for each output, and outputs that no order tells.
    numbers = torch.tensor([1, 0, 1])
    x = case.inputs(3, batch=3)
    J = subject.explicit(x).unflatten(1, (-1, outputs))[torch.arange(3), :, numbers]
    jacobian = linearization.jacobian(numbered(x, numbers[:, None, None]))
    check(subject, (jacobian, jacobian), (J, J), case.tolerance)


def test_rows_of_one_batch_may_ask_for_different_outputs():
    subject = Subject(mlp(3, 6, 4).double(), output="all")
    x, numbers = torch.randn(1, 5, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    J = subject.explicit(x).unflatten(1, (5, 4))[:, torch.arange(5), numbers]
    jacobian = LinearizationByOutput(Linearization(subject.frozen)).jacobian(
        torch.cat([x, numbers[None, :, None].double()], dim=-1)
    )
    assert_close(jacobian.rows(), J)


class Counted(nn.Module):
    """An MLP that takes down, for all of its copies, how many rows each call had."""

    rows: ClassVar[list[int]] = []

    def __init__(self, outputs: int):
        super().__init__()
        self.layers = mlp(3, 8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        Counted.rows.append(len(x))
        return self.layers(x)


@pytest.mark.names_engine
def test_one_forward_pass_serves_all_outputs():
    network = Counted(5).double()
    linearization = LinearizationByOutput(Linearization(Subject(network, output="all").frozen, "structured"))
    x = torch.randn(1, 200, 3, dtype=torch.float64)
    linearization.jacobian(rows(x, 5))  # where it is tried
    Counted.rows.clear()
    held = linearization.jacobian(rows(x + 1, 5))
    assert isinstance(held, StructuredJacobian) and held.terms
    assert [count for count in Counted.rows if count > 16] == [200]
    inputs = [term.inputs for term in held.terms if hasattr(term, "inputs")]
    assert inputs and all(tensor.stride(0) == 0 for tensor in inputs)
    assert held.nbytes < 200 * 8 * (4 + 9 + 5 * (8 + 8 * 4 + 5 + 9 * 5))


@pytest.mark.names_engine
@pytest.mark.parametrize("same_inputs", [True, False])
def test_normalised_weights_keep_their_structure(same_inputs: bool):
    network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), weight_norm(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 3))
    subject = Subject(network.double(), output="all")
    linearization = LinearizationByOutput(Linearization(subject.frozen, "structured"))
    x = torch.randn(1 if same_inputs else 3, 5, 3, dtype=torch.float64)
    jacobian = linearization.jacobian(rows(x, 3) if same_inputs else numbered(x, torch.arange(3)[:, None, None]))
    assert "CorrectedTerm" in {type(term).__name__ for term in jacobian.terms}
    J = subject.explicit(x).unflatten(1, (-1, 3))
    J = J[0].transpose(0, 1) if same_inputs else J[torch.arange(3), :, torch.arange(3)]
    check(subject, (jacobian, jacobian[1:3]), (J, J[:, 1:3]), 1e-10)


@pytest.mark.names_engine
@pytest.mark.parametrize("name", ["mlp_groups", "language"])
def test_factors_that_do_not_fit_are_captured_again(name: str):
    (case,) = (case for case in CASES if case.name == name)
    subject = Subject(case.network(), **case.options)
    base = Linearization(subject.frozen, "structured")
    linearization = LinearizationByOutput(base)
    x = case.inputs(9)
    outputs = subject.frozen.num_outputs(x)
    J = by_output(subject.explicit(x), outputs)
    plan = base.engine.plan(subject.frozen.at(x), x)
    with settings.memory_budget(12 * plan.bytes_per_point):
        jacobian = linearization.jacobian(rows(x, outputs), keep=False)
        assert isinstance(jacobian, ChunkedJacobian)
        check(subject, (jacobian, jacobian[:4]), (J, J[:, :4]), case.tolerance)


def test_copies_and_pickles_compute_the_same():
    network = mlp(3, 6, 4).double()
    linearization = LinearizationByOutput(Linearization(Subject(network, output="all").frozen))
    x = rows(torch.randn(1, 5, 3, dtype=torch.float64), 4)
    expected = linearization.jacobian(x).rows()
    copied = copy.deepcopy(linearization)
    assert copied.network.base is copied.base.network is not linearization.base.network
    for other in (copied, pickle.loads(pickle.dumps(linearization))):
        assert torch.equal(other.jacobian(x).rows(), expected)
        assert variances_for(other.base.network, 2).shape == (2, 1)
