"""Fast variances: not below the exact ones, within their tolerance of them, and honest about it."""

import pickle
from itertools import product

import gpytorch
import pytest
import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from ntk_gp import settings
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import LanczosVariance, LandmarkVariance, System, choose_fast_variance
from ntk_gp.solvers.landmarks import PivotedCholesky
from ntk_gp.solvers.weight_space import WeightSpaceSolver
from tests import references
from tests.adapted import LARGE, SMALL, assert_close, data, network
from tests.solvers.test_solvers import Problem

pytestmark = pytest.mark.engine_independent


def system_of(net: nn.Module, n: int, noise: float | Tensor, outputs: int = 1) -> System:
    ones = torch.ones(1, 1, dtype=torch.float64)
    linearization = Linearization(FrozenNetwork(net, output="all" if outputs > 1 else None))
    return System(linearization, data(n, 1)[0], ones, noise * ones.expand(1, n * outputs))


def variances(problem: Problem) -> Tensor:
    return problem.covariance.diagonal(dim1=-2, dim2=-1)


class TestLandmarks:
    @pytest.mark.parametrize(("n", "outputs", "noise"), list(product([SMALL, LARGE, 400], [1, 2], [1.0, 1e-2, 1e-4])))
    def test_never_below_the_exact_one_and_within_its_tolerance(self, n, outputs, noise):
        problem = Problem(n, outputs=outputs, noise=noise)
        exact = variances(problem)
        jacobian = problem.system.jacobian_at(problem.test_x)
        with settings.love_tolerance(1e-4):
            love = LandmarkVariance(problem.system)
        variance = love.variance(jacobian)
        assert love.report.converged
        assert (variance >= exact * (1 - 1e-8)).all()
        assert_close(variance, exact, 1e-3)
        covariance = love.covariance(jacobian, jacobian)
        assert_close(covariance, problem.covariance, 1e-3)
        assert_close(covariance.diagonal(dim1=-2, dim2=-1), variance, 1e-8)

    @pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    def test_few_landmarks_for_many_points(self, noise):
        """P is less than N: the rank is about P at most, and every variance within a few tolerances."""
        net = network(width=40)
        system = system_of(net, 1000, noise)
        jacobian = system.jacobian_at(data(50, 1, seed=2)[0])
        exact = WeightSpaceSolver(system).variance(jacobian)
        love = LandmarkVariance(system)
        ratio = love.variance(jacobian) / exact
        assert love.report.converged
        assert love.rank <= 1.25 * system.num_parameters
        assert (ratio >= 1 - 1e-6).all()
        assert (ratio <= 1 + 5e-3).all()
        assert float(ratio.mean()) - 1 <= 2 * love.report.error + 1e-9

    @pytest.mark.parametrize("noise", [1e-4, 1e-6, 1e-8])
    def test_noise_far_below_the_largest_eigenvalue(self, noise):
        """Directions with small eigenvalues count as long as these are not below the noise."""
        system = system_of(network(width=40), 150, noise)
        jacobian = system.jacobian_at(data(50, 1, seed=2)[0])
        ratio = LandmarkVariance(system).variance(jacobian) / WeightSpaceSolver(system).variance(jacobian)
        assert (ratio >= 1 - 1e-4).all()
        assert (ratio <= 1 + 5e-3).all()

    def test_noise_of_each_point(self):
        noise = torch.logspace(-4, 1, 400, dtype=torch.float64)
        system = system_of(network(), 400, noise)
        jacobian = system.jacobian_at(data(50, 1, seed=2)[0])
        ratio = LandmarkVariance(system).variance(jacobian) / WeightSpaceSolver(system).variance(jacobian)
        assert (ratio >= 1 - 1e-8).all()
        assert (ratio <= 1 + 2e-3).all()

    def test_all_points_are_exact(self, recwarn):
        problem = Problem(SMALL, noise=1e-6)
        love = LandmarkVariance(problem.system)
        assert love.rank == problem.system.num_rows
        assert love.report.error == 0
        jacobian = problem.system.jacobian_at(problem.test_x)
        assert_close(love.variance(jacobian), variances(problem), 1e-6)
        assert not [w for w in recwarn if issubclass(w.category, NumericalWarning)]

    @pytest.mark.parametrize("outputs", [1, 3])
    @pytest.mark.parametrize("rank", [1, 7, 20])
    def test_too_little_memory_warns_and_stays_above(self, outputs, rank):
        """Whatever fits: between the exact variance and about the prior's, and the report says how far off."""
        problem = Problem(LARGE, noise=1e-2, outputs=outputs)
        budget = 32 * rank * problem.system.num_rows // 3 + 32
        budget = max(budget, 128 * rank**2)
        jacobian = problem.system.jacobian_at(problem.test_x)
        with settings.memory_budget(budget), pytest.warns(NumericalWarning, match=r"stopped at rank .*memory_budget"):
            love = LandmarkVariance(problem.system)
        assert 1 <= love.rank <= rank + outputs
        assert not love.report.converged
        variance = love.variance(jacobian)
        assert (variance >= variances(problem) * (1 - 1e-10)).all()
        assert (variance <= 1.5 * jacobian.diagonal(problem.group_variances)).all()

    def test_derivatives_with_respect_to_test_inputs(self):
        problem = Problem(400, outputs=2)
        love = LandmarkVariance(problem.system)
        assert love.rank < problem.system.num_rows
        x = problem.test_x[:, :3].clone().requires_grad_()

        def terms(x: Tensor) -> tuple[Tensor, Tensor]:
            jacobian = problem.system.jacobian_at(x)
            return love.variance(jacobian), love.covariance(jacobian, jacobian)

        assert torch.autograd.gradcheck(terms, x, atol=1e-6, fast_mode=True)

    def test_pickles(self):
        problem = Problem(400)
        love = LandmarkVariance(problem.system)
        again = pickle.loads(pickle.dumps(love))
        expected = love.variance(problem.system.jacobian_at(problem.test_x))
        assert_close(again.variance(again.system.jacobian_at(problem.test_x)), expected, 1e-12)

    def test_predictions_do_not_look_at_the_training_data(self, monkeypatch):
        problem = Problem(400)
        love = LandmarkVariance(problem.system)
        expected = love.variance(problem.system.jacobian_at(problem.test_x))
        problem.system.x.fill_(float("nan"))
        assert_close(love.variance(problem.system.jacobian_at(problem.test_x)), expected, 1e-12)


class TestPivotedCholesky:
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_what_is_left(self, outputs):
        net = network(outputs=outputs, width=20)
        system = system_of(net, 300, 0.5, outputs)
        cholesky = PivotedCholesky(system, 40)
        kernel = references.kernel(net, system.x[0])
        while not cholesky.is_full:
            cholesky.grow()
        assert cholesky.rank == 40
        assert len(cholesky.rows.unique()) == 40
        landmarks = kernel[cholesky.rows]
        root = torch.linalg.cholesky(landmarks[:, cholesky.rows])
        assert_close(cholesky.root(), root, 1e-7)
        left = kernel - landmarks.mT @ torch.linalg.solve(landmarks[:, cholesky.rows], landmarks)
        others = torch.ones(300 * outputs, dtype=torch.bool)
        others[cholesky.rows] = False
        assert_close(cholesky.remainder[others], left.diagonal()[others], 1e-5)
        mean = float(left.diagonal().sum()) / 0.5 / (min(300 * outputs, system.num_parameters) - 40)
        assert cholesky.residual() == pytest.approx(mean, rel=1e-6)

    def test_a_landmark_as_if_it_were_new(self):
        net = network(width=20)
        system = system_of(net, 100, 0.5)
        cholesky = PivotedCholesky(system, 30)
        while not cholesky.is_full:
            cholesky.grow()
        kernel = references.kernel(net, system.x[0])
        first, others = cholesky.rows[3], cholesky.rows[torch.arange(30) != 3]
        cross = kernel[others, first]
        expected = kernel[first, first] - cross @ torch.linalg.solve(kernel[others][:, others], cross)
        assert_close(cholesky.left_if_new(first.reshape(1)), expected.reshape(1), 1e-6)

    def test_repeated_points_are_landmarks_once(self):
        net = network(width=20)
        linearization = Linearization(FrozenNetwork(net))
        x = data(20, 1)[0].repeat(1, 10, 1)
        ones = torch.ones(1, 1, dtype=torch.float64)
        cholesky = PivotedCholesky(System(linearization, x, ones, ones.expand(1, 200)), 200)
        while not cholesky.is_full:
            cholesky.grow()
        assert cholesky.rank == 20


class TestLanczos:
    def test_the_rank_is_the_users_and_variances_fall_with_it(self):
        problem = Problem(LARGE)
        jacobian = problem.system.jacobian_at(problem.test_x)
        exact = variances(problem)
        last = jacobian.diagonal(problem.group_variances)
        for rank in (1, 5, 20):
            with gpytorch.settings.max_root_decomposition_size(rank):
                love = choose_fast_variance(problem.system)
            assert isinstance(love, LanczosVariance)
            assert love.rank == rank
            variance = love.variance(jacobian)
            assert (variance >= exact * (1 - 1e-10)).all()
            assert (variance <= last).all()
            last = variance

    @pytest.mark.parametrize("outputs", [1, 2])
    def test_all_steps_are_exact(self, outputs):
        problem = Problem(SMALL, outputs=outputs)
        jacobian = problem.system.jacobian_at(problem.test_x)
        love = LanczosVariance(problem.system, 1000)
        assert love.rank <= problem.system.num_rows
        assert_close(love.variance(jacobian), variances(problem), 1e-8)
        assert_close(love.covariance(jacobian, jacobian), problem.covariance, 1e-8)


@pytest.mark.parametrize("make", [LandmarkVariance, lambda system: LanczosVariance(system, 5)])
def test_batches_are_refused(make):
    with pytest.raises(ValueError, match="without batches; this one has 3"):
        make(Problem(SMALL, (3, 1, 1)).system)
