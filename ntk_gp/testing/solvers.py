"""Whether a solver keeps to the contract of :class:`~ntk_gp.solvers.Solver`, over systems of several shapes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..solvers import Solver, System
from .comparison import assert_entries_close, assert_shape
from .problems import SolverProblem

# Fewer rows than the 41 parameters, and more; batches of the inputs, of the prior variances, of the noise.
SIZES = (12, 60)
BATCHES = ((1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 3))
# Operators carry solvers by reference: with a method of these names, moving an operator would convert the solver.
_CONVERTING = ("to", "cpu", "cuda", "double", "float", "half", "clone", "detach", "requires_grad_", "requires_grad")
_MORE = 5  # points by which a system is extended


def check_solver(
    solver: Callable[[System], Solver],
    *,
    sizes: Iterable[int] = SIZES,
    outputs: Iterable[int] = (1, 2),
    batches: Iterable[tuple[int, int, int]] = BATCHES,
    noise: float = 0.1,
    tolerance: float = 1e-8,
    logdet_tolerance: float | None = None,
) -> None:
    """Checks every method of a solver against dense algebra on explicit Jacobians, in float64.

    Solutions, log-determinants, the weights of the mean, posterior covariances and variances, the derivatives of the
    log-determinant, and the solver made from this one for more data, if it makes one; that covariances and variances
    can be differentiated with respect to test inputs; that a solver can be pickled; and that nothing in it converts.

    :param solver: The class, or what makes one for a :class:`~ntk_gp.solvers.System`.
    :param sizes: Numbers of training points; there are 41 parameters with one output.
    :param outputs: Numbers of outputs of the network.
    :param batches: How many inputs, prior variances and noises there are. A solver that does not batch: `[(1, 1, 1)]`.
    :param noise: About how large the noise is; prior variances are about 5.
    :param tolerance: The relative error allowed. One that iterates has to be told in which tolerance to end, e.g. by
        :class:`ntk_gp.settings.solve_tolerance`, before.
    :param logdet_tolerance: The same for log-determinants and their derivatives, where these are estimates.
    :raises AssertionError: If something is wrong: it names the method, the system and the error.

    Example:
        >>> from ntk_gp.solvers.weight_space import WeightSpaceSolver
        >>> check_solver(WeightSpaceSolver, sizes=[12], outputs=[2])
    """
    tolerances = (tolerance, tolerance if logdet_tolerance is None else logdet_tolerance)
    shapes = [(n, c, b) for n in sizes for c in outputs for b in batches]
    for n, c, b in shapes:
        problem = SolverProblem(n, b, c, noise)
        where = f"with {n} points, {c} outputs and batches {b}"
        made = solver(problem.system)
        _check_answers(made, problem, where, tolerances)
        _check_derivatives_of_the_log_determinant(made, problem, where, tolerances[1])
        _check_extension(solver, problem, where, tolerances)
        _check_bookkeeping(made, problem, where)
        _check_pickling(made, problem, where, tolerance)
    n, c, b = min(shapes, key=lambda shape: shape[0])
    problem = SolverProblem(n, b, c, noise)
    _check_derivatives_at_test_inputs(solver(problem.system), problem, f"with {n} points, {c} outputs and batches {b}")


def _assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a part of the largest entry."""
    assert_shape(what, actual, expected)
    assert_entries_close(what, actual, expected, expected.abs().amax(), tolerance)


def _check_answers(solver: Solver, problem: SolverProblem, where: str, tolerances: tuple[float, float]) -> None:
    """All that a posterior is made of."""
    name = type(solver).__name__

    def check(what: str, actual: Tensor, expected: Tensor, tolerance: float = tolerances[0]) -> None:
        if actual.dtype != torch.float64:
            raise AssertionError(f"{name}.{what} {where}: the dtype is {actual.dtype}, expected torch.float64.")
        _assert_close(f"{name}.{what} {where}", actual, expected, tolerance)

    solution = torch.linalg.solve(problem.matrix, problem.rhs)
    check("solve", solver.solve(problem.rhs), solution)
    check("solve of one column", solver.solve(problem.rhs[..., :1]), solution[..., :1])
    check("logdet", solver.logdet(), problem.matrix.logdet(), tolerances[1])
    weights = (problem.jacobian * problem.parameter_variances.unsqueeze(-2)).mT @ solution
    check("mean_weights", solver.mean_weights(problem.rhs.mT), weights.mT)
    jacobian, covariance = solver.system.jacobian_at(problem.test_x), problem.covariance
    some = slice(0, 3)
    check("covariance", solver.covariance(jacobian, jacobian), covariance)
    check("covariance of some", solver.covariance(jacobian[some], jacobian), covariance[:, : 3 * problem.outputs])
    variance = solver.variance(jacobian)
    check("variance", variance, covariance.diagonal(dim1=-2, dim2=-1))
    if not (variance >= 0).all():
        raise AssertionError(f"{name}.variance {where}: the smallest is {float(variance.min()):.1e}, below zero.")


def _check_derivatives_of_the_log_determinant(
    solver: Solver, problem: SolverProblem, where: str, tolerance: float
) -> None:
    by_group, by_noise = solver.logdet_derivatives()
    inverse = problem.matrix.inverse()
    parts = [problem.jacobian[..., problem.groups == group] for group in (0, 1)]
    expected = torch.stack([(inverse * (part @ part.mT)).sum((-2, -1)) for part in parts], dim=-1)
    name = f"{type(solver).__name__}.logdet_derivatives {where}"
    _assert_close(f"{name}, by variances", by_group, expected, tolerance)
    _assert_close(f"{name}, by noise", by_noise, inverse.diagonal(dim1=-2, dim2=-1), tolerance)


def _check_extension(
    solver: Callable[[System], Solver], problem: SolverProblem, where: str, tolerances: tuple[float, float]
) -> None:
    """The solver of the first points, extended to all of them."""
    first = solver(problem.beginning(problem.x.shape[1] - _MORE))
    extended = first.extended(problem.system)
    if extended is None:
        return
    if type(extended) is not type(first):
        raise AssertionError(f"{type(first).__name__}.extended {where}: the result is a {type(extended).__name__}.")
    _check_answers(extended, problem, f"{where}, extended by {_MORE}", tolerances)


def _check_pickling(solver: Solver, problem: SolverProblem, where: str, tolerance: float) -> None:
    restored = pickle.loads(pickle.dumps(solver))
    name = f"{type(solver).__name__}, pickled, {where}"
    solution = torch.linalg.solve(problem.matrix, problem.rhs)
    _assert_close(f"{name}: solve", restored.solve(problem.rhs), solution, tolerance)
    variance = restored.variance(restored.system.jacobian_at(problem.test_x))
    _assert_close(f"{name}: variance", variance, problem.covariance.diagonal(dim1=-2, dim2=-1), tolerance)


def _check_bookkeeping(solver: Solver, problem: SolverProblem, where: str) -> None:
    name = type(solver).__name__
    for converting in _CONVERTING:
        if hasattr(solver, converting):
            raise AssertionError(f"{name} has an attribute {converting!r}, by which tensors are converted.")
    points = solver.points_per_block(problem.outputs)
    for what, value, least in (
        ("nbytes", solver.nbytes, 0),
        ("whitened_size()", solver.whitened_size(), 0),
        ("points_per_block()", points, 1),
    ):
        if not isinstance(value, int) or value < least:
            raise AssertionError(f"{name}.{what} {where} is {value!r}, expected a whole number, {least} or more.")


def _check_derivatives_at_test_inputs(solver: Solver, problem: SolverProblem, where: str) -> None:
    what = f"{type(solver).__name__}.variance and .covariance {where}: derivatives with respect to test inputs"

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = solver.system.jacobian_at(x)
        return solver.variance(jacobian), solver.covariance(jacobian, jacobian)

    x = problem.test_x[:, :2].clone().requires_grad_()
    if not all(term.requires_grad for term in terms(x)):
        raise AssertionError(f"{what} are lost.")
    try:
        torch.autograd.gradcheck(terms, x, atol=1e-6)
    except RuntimeError as error:
        raise AssertionError(f"{what} are not those of finite differences.\n{error}") from error
