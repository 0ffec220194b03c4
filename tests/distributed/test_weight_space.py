"""Weight space over ranks, against dense algebra in one process."""

import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_operator.utils.errors import NotPSDError
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

import ntk_gp
from ntk_gp import NTKKernel, draw_functions, settings
from ntk_gp.distributed import weight_space
from ntk_gp.distributed.cholesky import Layout, traffic
from ntk_gp.distributed.graph import ForwardSolve, OnEachRank, SumOverRanks
from ntk_gp.distributed.traffic import Traffic
from ntk_gp.distributed.weight_space import DistributedWeightSpaceSolver
from ntk_gp.solvers import System, choose_solver, orthogonal, solver_class
from ntk_gp.solvers.weight_space import WeightSpaceSolver, feature_moment
from ntk_gp.testing import SolverProblem as Problem
from tests.adapted import LARGE, assert_close, data, network
from tests.distributed import problems
from tests.distributed.answers import sharded, small_blocks

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case]

NAME = "distributed_weight_space"


@small_blocks
def strips() -> tuple[int, int, dict[str, Tensor]]:
    """With as little memory as it says that it needs, and with more: how many strips, and how far results differ."""
    problem = Problem(61)
    found, counts = [], []
    with settings.distributed(), settings.solver(NAME):
        needed = round(DistributedWeightSpaceSolver.nbytes_needed(problem.system)) + 1
        for budget in (needed, None):
            with settings.memory_budget(budget):
                counts.append(len(list(weight_space._strips(problem.system))))
                solver = DistributedWeightSpaceSolver(problem.system)
                found.append([solver.solve(problem.rhs), solver.logdet(), *solver.logdet_derivatives()])
    differences = [(one - other).norm() / other.norm() for one, other in zip(*found, strict=True)]
    return counts[0], counts[1], max(differences)


def test_little_memory_takes_more_strips(four):
    for many, one, difference in four.run(strips):
        assert many >= 4 and one == 1
        assert difference < 1e-12


@small_blocks
def samples(solver: str | None) -> Tensor:
    with settings.solver(solver):
        model = problems.model_of("layers", LARGE).eval()
        x = data(5, seed=1)[0]
        with torch.no_grad():
            torch.manual_seed(3)
            functions = draw_functions(model, 4)(x)
            drawn = model(x).rsample(torch.Size([3]))
            return torch.cat([functions.reshape(-1), drawn.reshape(-1), ntk_gp.adapted_network(model)(x).reshape(-1)])


def sampled() -> tuple[Tensor, Tensor]:
    alone = samples("weight_space")
    with settings.distributed():
        return samples(NAME), alone


def test_samples(two):
    (first, alone), (second, _) = two.run(sampled)
    assert torch.equal(first, second)
    assert_close(first, alone, 1e-10)


@small_blocks
def second_derivatives() -> tuple[Tensor, Tensor]:
    """Of a function of variances by features, and what ranks find."""
    problem = Problem(61)
    with settings.distributed() as group:
        solver = DistributedWeightSpaceSolver(problem.system)
        features = torch.randn(
            3, solver.system.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        sizes = Layout.even(features.shape[-1], group.size).sizes

        def by_ranks(rows: Tensor) -> Tensor:
            own = OnEachRank.apply(rows, solver._summed).split(sizes, -1)[group.rank]
            squares = ForwardSolve.apply(own.mT.unsqueeze(0), solver.factors).square().sum(-2)
            return SumOverRanks.apply(squares, solver._summed).pow(3).sum()

        whitened = problem.jacobian[0] * solver.system.root_variances
        precision = whitened.mT @ (whitened / problem.system.noise.mT) + torch.eye(features.shape[-1]).double()

        def densely(rows: Tensor) -> Tensor:
            return (rows * torch.linalg.solve(precision, rows.mT).mT).sum(-1).pow(3).sum()

        found = []
        for function in (by_ranks, densely):
            rows = features.clone().requires_grad_()
            (slope,) = torch.autograd.grad(function(rows), rows, create_graph=True)
            found.append(torch.autograd.grad((slope * features.cos()).sum(), rows)[0])
    return found[0], found[1]


def test_second_derivatives(two):
    (first, expected), (second, _) = two.run(second_derivatives)
    assert torch.equal(first, second)
    assert_close(first, expected, 1e-10)


# Bytes.


@small_blocks
def sent(batches: tuple[int, int, int]) -> list[tuple[Counter, Counter]]:
    """The bytes that this rank sends, and those that it should: making the solver, and what it gives."""
    problem = Problem(61, batches)
    with settings.distributed() as group:
        system, found = problem.system, []
        jacobian = system.jacobian_at(problem.test_x)
        batch, points, size = system.batch, problem.test_x.shape[1], system.num_parameters
        model, layout = Traffic(61, 1, size, group.size), Layout.even(size, group.size)
        most, others = max(layout.sizes), group.size - 1

        def count(call: Callable[[], Any], name: str, columns: int, **beside: int) -> Any:
            group.traffic.clear()
            result = call()
            each = traffic(layout, group.rank, columns)[name]
            expected = Counter({name: batch * value for name, value in each.items()}) + Counter(beside)
            found.append((+group.traffic, expected))
            return result

        scattered = max(len(system.x), len(system.noise)) * model.scattered_feature_moment(group.rank)
        beside = {"gather": 8 * others * batch * most, "sum": model.summed(batch), "scatter sums": scattered}
        solver = count(lambda: DistributedWeightSpaceSolver(system), "factorise", 1, **beside)
        count(lambda: solver._precision_solve(system.x.new_ones(batch, size, 2)), "solve", 2)
        count(lambda: solver.variance(jacobian), "forward", points, sum=model.summed(batch * points))
        count(
            solver.logdet_derivatives,
            "inverse factor",
            1,
            gather=batch * model.gathered(model.most_rows),
            sum=model.summed(batch * size),
        )
    return found


@pytest.mark.parametrize("batches", [(3, 1, 1), (1, 3, 1)])
def test_bytes_are_those_of_the_model(two, batches):
    for found in two.run(sent, batches):
        for counted, expected in found:
            assert counted == expected


@small_blocks
def after_fitting() -> tuple[set[str], float]:
    """What a solver sends where JᵀJ is known from fitting, and how far its solution is off."""
    problem = Problem(61, (3, 1, 1))
    system = problem.system
    system.noise = system.noise[:, :1].expand_as(system.noise) * (1 + torch.arange(3.0).double().unsqueeze(-1))
    with settings.distributed() as group:
        feature_moment(system)
        group.traffic.clear()
        solver = DistributedWeightSpaceSolver(system)
        operations = set(group.traffic)
        solution = solver.solve(problem.rhs)
    features = problem.jacobian * system.root_variances.unsqueeze(-2)
    expected = torch.linalg.solve(features @ features.mT + torch.diag_embed(system.noise), problem.rhs)
    return operations, float((solution - expected).norm() / expected.norm())


def test_the_sum_is_shared_with_fitting(two):
    for operations, error in two.run(after_fitting):
        assert "broadcast" in operations and "scatter sums" not in operations
        assert error < 1e-10


def test_less_is_sent_than_for_a_factor_on_each_rank():
    model = Traffic(10**6, 1, 20_000, 8)
    scattered = max(map(model.scattered_feature_moment, range(8)))
    assert 0.39 * model.feature_moment() < scattered < 0.41 * model.feature_moment()


# Rounding.


@small_blocks
def with_little_noise(noise: float, has_memory: bool) -> dict[str, Any]:
    problem = Problem(30, noise=noise)
    fits = orthogonal.weight_space_fits
    orthogonal.weight_space_fits = (lambda _: True) if has_memory else (lambda _: False)
    with settings.distributed(), settings.solver(NAME), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            solver = sharded(problem)
        finally:
            orthogonal.weight_space_fits = fits
        jacobian = solver.system.jacobian_at(problem.test_x)
        x = problem.test_x[:, :2].clone().requires_grad_()
        at_x = solver.system.jacobian_at(x)
        (slope,) = torch.autograd.grad(solver.variance(at_x).sum() + solver.covariance(at_x, at_x)[:, 0].sum(), x)
        results = {
            "variance": solver.variance(jacobian),
            "covariance": solver.covariance(jacobian, jacobian),
            "weights": solver.mean_weights(problem.rhs.mT),
            "logdet": solver.logdet(),
            "slope": slope,
        }
    ways = solver.is_refined, solver.is_orthogonalised
    return {"ways": ways, "warnings": [str(w.message) for w in caught if w.category is NumericalWarning], **results}


@pytest.mark.parametrize(("noise", "ways", "tolerance"), [(1e-7, (True, False), 1e-8), (1e-13, (False, True), 1e-7)])
def test_digits_that_rounding_costs_are_restored(two, noise, ways, tolerance):
    """By refinement, or where there are fewer left by orthogonalisation, as in one process."""
    problem = Problem(30, noise=noise)
    with settings.solver("weight_space"):
        reference = choose_solver(problem.system)
    jacobian = problem.system.jacobian_at(problem.test_x)
    x = problem.test_x[:, :2].clone().requires_grad_()
    at_x = problem.system.jacobian_at(x)
    total = reference.variance(at_x).sum() + reference.covariance(at_x, at_x)[:, 0].sum()
    wanted = {
        "variance": reference.variance(jacobian),
        "covariance": reference.covariance(jacobian, jacobian),
        "weights": reference.mean_weights(problem.rhs.mT),
        "logdet": reference.logdet(),
        "slope": torch.autograd.grad(total, x)[0],
    }
    first, second = two.run(with_little_noise, noise, True)
    assert first["ways"] == ways and not first["warnings"]
    for name, value in wanted.items():
        assert torch.equal(first[name], second[name]), name
        assert (first[name] - value).norm() < tolerance * value.norm(), (
            name,
            (first[name] - value).norm() / value.norm(),
        )


def test_what_is_lost_is_said(two):
    for answer in two.run(with_little_noise, 1e-13, False):
        assert len(answer["warnings"]) == 1
        assert "no memory for a more exact factorisation" in answer["warnings"][0]


@small_blocks
def refusal(noise: float, weight: float | None) -> str:
    x, net = data(30)[0].unsqueeze(0), network()
    if weight is not None:
        with torch.no_grad():
            net[2].weight[0, 0] = weight
    system = System(NTKKernel(net)._linearization, x, x.new_ones(1, 1), x.new_full((1, 30), noise))
    fits, orthogonal.weight_space_fits = orthogonal.weight_space_fits, lambda _: False
    with settings.distributed(), settings.solver(NAME):
        try:
            choose_solver(system)
        except (NotPSDError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            orthogonal.weight_space_fits = fits
    return "none"


@pytest.mark.parametrize(
    ("noise", "weight", "message"),
    [
        (1e-19, None, "NotPSDError: K [+] D of 30 rows is not positive definite.*orthogonalised"),
        (0.1, 1e200, "ValueError: The network's Jacobian is NaN"),
    ],
)
def test_all_ranks_refuse_alike(two, noise, weight, message):
    for answer in two.run(refusal, noise, weight):
        assert re.match(message, answer), answer


# The choice.


def wide(parameters: int, n: int) -> System:
    """Of a network with about so many parameters."""
    with torch.random.fork_rng(devices=[]):
        net = torch.nn.Sequential(torch.nn.Linear(3, parameters // 5), torch.nn.Tanh())
        net = torch.nn.Sequential(*net, torch.nn.Linear(parameters // 5, 1)).double()
    x = torch.randn(1, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return System(NTKKernel(net)._linearization, x, x.new_ones(1, 1), x.new_ones(1, n))


def choices() -> dict[str, Any]:
    """Of few parameters and of many; with little memory."""
    found: dict[str, Any] = {}
    with settings.distributed() as group:
        small, large = wide(100, 2000), wide(2000, 6000)
        found["small"], found["large"] = solver_class(small).name, solver_class(large).name
        replicated = WeightSpaceSolver.cost(large) - 1.25 * large.num_rows * large.num_parameters**2
        found["factors"] = replicated / (large.num_parameters**3 / 3) / group.size
        found["share"] = DistributedWeightSpaceSolver.nbytes_needed(large) / (8 * large.num_parameters**2)
        middle = wide(500, 2000)
        found["middle"] = solver_class(middle).name
        with settings.memory_budget(round(1.9 * 8 * middle.num_parameters**2)):
            found["little memory"] = solver_class(middle).name
    return found


def test_the_choice(two):
    """With few parameters, messages take longer than a factor on each rank; with many, or where that does not fit, it
    is over ranks."""
    for found in two.run(choices):
        assert found["small"] == found["middle"] == "weight_space"
        assert found["large"] == found["little memory"] == NAME
        assert abs(found["factors"] - 1) < 1e-12, "each rank factorises"
        assert 0.75 < found["share"] < 1


def report() -> str:
    with settings.distributed():
        model = problems.model_of("scaled", LARGE)
        with settings.solver(NAME):
            model.eval()(data(5, seed=1)[0])
            return str(ntk_gp.solver_report(model))


def test_the_report_says_so(two):
    for text in two.run(report):
        assert text.startswith(f"{NAME} solves K + D with N = 60 rows, P = 41 parameters")
        assert len({line.index("flops") for line in text.splitlines()[1:-1]}) == 1, text
        assert re.search(rf"{NAME} .*taken", text)


def test_one_process_is_told_what_it_is_for():
    with settings.solver(NAME), pytest.raises(ValueError, match="sharded over ranks"):
        choose_solver(Problem(12).system)
