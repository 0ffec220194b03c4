"""`ntk_gp.testing` finds what is wrong, and says where; and it needs no test framework."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from ntk_gp.jacobian.rules import register_rule
from ntk_gp.jacobian.rules.registry import _RULES
from ntk_gp.jacobian.structured import StructuredJacobian
from ntk_gp.solvers import System
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from ntk_gp.testing import SolverProblem, check_rule, check_solver, explicit_jacobian
from tests import references
from tests.adapted import network

pytestmark = pytest.mark.names_engine


def _off(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight.T


OFF = torch.overrides.wrap_torch_function(lambda x, weight: (x, weight))(lambda x, weight: _off(weight, x))


class Off(nn.Module):
    """A layer whose rule tests register."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 3) + 0.5)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(0.3 * OFF(x, self.weight)))


@pytest.fixture
def registered():
    """Registers a rule that is wrong by a factor at the inputs above a bound, as one of the package's own."""

    def register(factor: float, above: float = 0.0) -> None:
        def rule(use, x, weight):
            return use.matrix(weight, None, torch.where(x[..., :1] > above, factor * x, x))

        register_rule(OFF, rule, parameters=("weight",))
        _RULES[OFF].is_own = True  # whose captures are compared at a few rows only

    yield register
    _RULES.pop(OFF, None)


def inputs(n: int = 200) -> Tensor:
    """(n, 3), of which one row is above 2 in the first column."""
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    x[n // 2, 0] = 2.5
    return x


def test_a_right_rule_passes(registered):
    registered(1.0)
    assert check_rule(Off(), inputs()) == {"weight": "rule", "head.weight": "linear", "head.bias": "linear"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_rule_that_is_wrong_at_one_row_is_found_out(registered, dtype, place, monkeypatch):
    """By so little, of so many rows, that the engine itself does not see it in float32; in float64 it may not look."""
    for room in ("captured", "plan"):
        monkeypatch.setattr(f"ntk_gp.jacobian.structured.{room}.wrong_products", lambda *_: ({}, set()))
    monkeypatch.setattr("ntk_gp.jacobian.structured.captured.wrong_derivatives", lambda *_: {})
    registered(1 + 3e-4, above=2.0)
    x = inputs().roll({"first": 100, "middle": 0, "last": 99}[place], dims=0)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    with pytest.raises(AssertionError, match=r"rows\(\).* of weight, served by rule, in float.*relative error is"):
        check_rule(Off(), x, x[:1], tolerances={dtype: tolerance})


def test_a_parameter_that_no_rule_serves_is_named_with_the_reason(registered):
    with pytest.raises(AssertionError, match=r"Left to autodiff, in torch.float64: weight\.\n.*no rule knows"):
        check_rule(Off(), inputs())
    assert check_rule(Off(), inputs(), allow_autodiff=True)["weight"] == "autodiff"
    registered(1.01)
    with pytest.raises(AssertionError, match=r"weight is left to autodiff: .*differ from autograd's"):
        check_rule(Off(), inputs())


@pytest.mark.parametrize(
    ("operation", "wrong"),
    [
        ("jvp", lambda right, jacobian, u: 1.01 * right(jacobian, u)),
        ("vjp", lambda right, jacobian, v: right(jacobian, v).flip(-1)),
        ("gram", lambda right, jacobian, other, s: right(jacobian, other, s) + 1e-6 * jacobian.num_rows),
        ("diagonal", lambda right, jacobian, s: right(jacobian, s).abs().sqrt()),
        ("cross_diagonal", lambda right, jacobian, other, s: right(jacobian, other, s)[..., :-1]),
        ("kernel_matmul", lambda right, jacobian, other, rhs, s: right(jacobian, other, rhs, s) * float("nan")),
    ],
)
def test_an_operation_that_is_wrong_is_named(operation, wrong, monkeypatch):
    right = getattr(StructuredJacobian, operation)
    monkeypatch.setattr(StructuredJacobian, operation, lambda *args: wrong(right, *args))
    with pytest.raises(AssertionError, match=rf"^{operation}.* in float64: (the relative error is|the shape is)"):
        check_rule(network(outputs=2), inputs(6), output="all")


def test_a_gram_matrix_that_is_wrong_for_one_parameter_names_it(monkeypatch):
    right = StructuredJacobian.gram

    def gram(jacobian, other, variances):
        of_biases = torch.zeros_like(variances)
        of_biases[:, 1] = variances[:, 1]
        return right(jacobian, other, variances) + right(jacobian, other, of_biases)

    monkeypatch.setattr(StructuredJacobian, "gram", gram)
    with pytest.raises(AssertionError, match=r"gram of 0.bias, served by linear, in float64"):
        check_rule(network(), inputs(6), group_by=lambda name: name)


def test_the_network_is_not_changed_and_its_own_logging_neither(caplog):
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    check_rule(net, inputs(6))
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not caplog.records


@pytest.mark.parametrize("parameters", [None, "2.*", ["*.bias"], lambda name, p: p.dim() == 2])
def test_explicit_jacobians(parameters):
    net, x = network(outputs=2), inputs(6).unsqueeze(0)
    names = [n for n, p in net.named_parameters() if parameters is None or _chosen(n, p, parameters)]
    expected = references.jacobian(net, x, [net.get_parameter(name) for name in names])
    torch.testing.assert_close(explicit_jacobian(net, x, parameters=parameters), expected, rtol=0, atol=1e-15)
    one = explicit_jacobian(net, x, parameters=parameters, output=1)
    torch.testing.assert_close(one, expected[:, 1::2], rtol=0, atol=1e-15)


def _chosen(name: str, parameter: Tensor, parameters) -> bool:
    if callable(parameters):
        return parameters(name, parameter)
    return name.startswith("2.") if parameters == "2.*" else name.endswith("bias")


class Broken(WeightSpaceSolver):
    """Right but for the method that a test replaces."""

    def extended(self, system: System) -> None:
        return None


@pytest.mark.parametrize(
    ("method", "wrong", "says"),
    [
        ("solve", lambda right, solver, rhs: 1.001 * right(solver, rhs), "the relative error is"),
        ("logdet", lambda right, solver: right(solver).float(), "the dtype is torch.float32"),
        ("mean_weights", lambda right, solver, r: right(solver, r).mT, "the shape is"),
        ("covariance", lambda right, solver, a, b: right(solver, a, b).tril(), "entries are wrong"),
        ("variance", lambda right, solver, a: -right(solver, a), "the relative error is"),
        ("logdet_derivatives", lambda right, solver: right(solver)[::-1], "the shape is"),
        ("extended", lambda right, solver, system: right(solver, system), "the result is a WeightSpaceSolver"),
        ("whitened_size", lambda right, solver: 1.5, "expected a whole number"),
    ],
)
def test_a_solver_that_is_wrong_is_found_out(method, wrong, says, monkeypatch):
    right = getattr(WeightSpaceSolver, method)
    monkeypatch.setattr(Broken, method, lambda *args: wrong(right, *args), raising=False)
    with pytest.raises(AssertionError, match=rf"Broken\..* with 12 points, 2 outputs.*{says}"):
        check_solver(Broken, sizes=[12], outputs=[2], batches=[(1, 1, 1)])


def test_a_solver_that_tensors_would_be_taken_for_is_refused(monkeypatch):
    monkeypatch.setattr(Broken, "half", lambda self: self, raising=False)
    with pytest.raises(AssertionError, match="has an attribute 'half'"):
        check_solver(Broken, sizes=[12], outputs=[1], batches=[(1, 1, 1)])


def test_derivatives_at_test_inputs_are_checked(monkeypatch):
    right = WeightSpaceSolver.variance
    monkeypatch.setattr(Broken, "variance", lambda *args: right(*args).detach(), raising=False)
    with pytest.raises(AssertionError, match="derivatives with respect to test inputs"):
        check_solver(Broken, sizes=[12], outputs=[1], batches=[(1, 1, 1)])


def test_problems_are_the_same_each_time():
    state = torch.random.get_rng_state()
    first, second = SolverProblem(12, outputs=2), SolverProblem(12, outputs=2)
    assert torch.equal(first.matrix, second.matrix) and torch.equal(first.rhs, second.rhs)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_test_framework_is_needed():
    code = (
        "import sys; sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "import torch; from ntk_gp.testing import check_rule\n"
        "print(check_rule(torch.nn.Linear(2, 1), torch.ones(3, 2)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "{'weight': 'linear', 'bias': 'linear'}\n", result.stderr
