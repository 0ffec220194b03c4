"""Training in closed form: against training by hand, the matrix exponential, and the network itself."""

from __future__ import annotations

import math

import gpytorch
import mpmath
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor, nn

from ntk_gp import GradientDescent, GradientFlow, NTKKernel, largest_stable_rate, settings
from ntk_gp.dynamics.expansions import Eigenvectors, KrylovExpansion
from ntk_gp.dynamics.filters import Descent, Filter, Flow
from ntk_gp.dynamics.lanczos import Lanczos
from ntk_gp.dynamics.rates import largest_eigenvalue
from ntk_gp.dynamics.ridge import best_ridge
from tests import references
from tests.adapted import data, network

pytestmark = pytest.mark.engine_independent

TIMES = torch.tensor([0.0, 0.01, 0.3, 5.0, 200.0], dtype=torch.float64)
FACTORS = {"half_sum": lambda N: 1.0, "sum": lambda N: 2.0, "half_mse": lambda N: 1 / N, "mse": lambda N: 2 / N}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def learned(matrix: Tensor, time: float) -> Tensor:
    """φₜ(K), without a division: the upper right block of an exponential of twice the size."""
    n = len(matrix)
    generator = torch.zeros(2 * n, 2 * n, dtype=matrix.dtype)
    generator[:n, :n], generator[:n, n:] = -time * matrix, time * torch.eye(n, dtype=matrix.dtype)
    return torch.linalg.matrix_exp(generator)[:n, n:]


class Trained:
    """A network with C outputs, its data, and explicit Jacobians; with a prior variance for each layer."""

    def __init__(self, outputs: int, n: int = 9, width: int = 8):
        self.network = network(outputs=outputs, width=width)
        self.x, self.y = data(n, outputs=None if outputs == 1 else outputs)
        self.test_x = data(5, seed=1)[0]
        self.kernel = NTKKernel(self.network, output="all" if outputs > 1 else None, variance_groups="layer").double()
        self.kernel.variance = torch.tensor([0.5, 1.5])
        sizes = [3 * width + width, width * outputs + outputs]
        self.variances = torch.tensor([0.5, 1.5], dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
        self.jacobian = references.jacobian(self.network, self.x)
        self.test_jacobian = references.jacobian(self.network, self.test_x)
        with torch.no_grad():
            self.start, self.test_start = self.network(self.x).reshape(-1), self.network(self.test_x).reshape(-1)
        self.residual = self.y.reshape(-1) - self.start
        self.matrix = self.jacobian * self.variances @ self.jacobian.mT
        self.cross = self.test_jacobian * self.variances @ self.jacobian.mT
        self.shape = (5,) if outputs == 1 else (5, outputs)


@pytest.fixture(params=[1, 2], ids=["one output", "two outputs"], scope="module")
def trained(request) -> Trained:
    return Trained(request.param)


class TestDescent:
    @pytest.mark.parametrize("loss", FACTORS)
    def test_is_that_of_the_linearised_network_step_by_step(self, trained, loss):
        factor = FACTORS[loss](len(trained.residual))
        rate = 1.3 / (factor * float(torch.linalg.eigvalsh(trained.matrix)[-1]))  # errors change their sign
        descent = GradientDescent(trained.kernel, trained.x, trained.y, rate=rate, loss=loss)
        steps = [0, 1, 2, 17, 60]
        weights, by_hand, losses = torch.zeros_like(trained.variances), [], []
        for step in range(61):
            error = trained.residual - trained.jacobian @ weights
            if step in steps:
                by_hand.append(weights)
                losses.append(0.5 * factor * error.square().sum())
            weights = weights + rate * factor * trained.variances * (trained.jacobian.mT @ error)
        by_hand = torch.stack(by_hand)
        expected = trained.test_start + by_hand @ trained.test_jacobian.mT
        close(descent.predict(trained.test_x, steps), expected.reshape(5, *trained.shape))
        close(descent.weights(steps), by_hand)
        close(descent.training_loss(steps), torch.stack(losses))

    def test_loss_is_torchs(self, trained):
        descent = GradientDescent(trained.kernel, trained.x, trained.y, rate=1e-3, loss="mse")
        predicted = descent.predict(trained.x, 7)
        close(descent.training_loss(7), nn.functional.mse_loss(predicted, trained.y))

    def test_rates_beyond_the_stable_one(self, trained):
        with pytest.warns(NumericalWarning, match="largest stable rate is"):
            rate = 2.1 * 0.5 * largest_stable_rate(trained.kernel, trained.x, num_outputs=trained.y.dim())
            descent = GradientDescent(trained.kernel, trained.x, trained.y, rate=rate)
            assert descent.training_loss(200) > descent.training_loss(100) > descent.training_loss(0)
            for method in (descent.training_loss, lambda k: descent.predict(trained.x, k)):
                with pytest.raises(OverflowError, match="largest_stable_rate"):
                    method(10**6)
            with pytest.raises(OverflowError, match="largest_stable_rate"):
                descent.distribution(trained.x, 5000)  # twice as many steps are too many
            assert descent.predict(trained.x, 5000).isfinite().all()

    def test_becomes_gradient_flow_as_steps_get_small(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y).predict(trained.test_x, 0.4)
        descents = {k: GradientDescent(trained.kernel, trained.x, trained.y, rate=0.4 / k) for k in (2000, 4000)}
        errors = [(descent.predict(trained.test_x, k) - flow).norm() for k, descent in descents.items()]
        assert float(errors[0] / errors[1]) == pytest.approx(2.0, rel=0.02)  # of first order in the rate


class TestFlow:
    def test_is_the_matrix_exponential(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        duals = torch.stack([learned(trained.matrix, float(t)) @ trained.residual for t in TIMES])
        expected = trained.test_start + duals @ trained.cross.mT
        close(flow.predict(trained.test_x, TIMES), expected.reshape(5, *trained.shape))
        left = torch.stack([torch.linalg.matrix_exp(-float(t) * trained.matrix) @ trained.residual for t in TIMES])
        close(flow.predict(trained.x, TIMES), trained.y - left.reshape(5, *trained.y.shape))
        close(flow.weights(TIMES), duals @ trained.jacobian * trained.variances)
        close(flow.training_loss(TIMES), 0.5 * left.square().sum(-1))

    def test_times_come_in_any_shape(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        grid = TIMES[:4].reshape(2, 2)
        close(flow.predict(trained.test_x, grid).flatten(0, 1), flow.predict(trained.test_x, TIMES[:4]), 1e-14)
        assert flow.predict(trained.test_x, 0.3).shape == trained.shape
        assert flow.predict(trained.test_x, []).shape == (0, *trained.shape)
        assert flow.training_loss(grid).shape == (2, 2)
        assert flow.weights(0.3).shape == trained.variances.shape

    def test_distribution_is_over_where_training_begins(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        for time in (0.0, 0.2, 30.0):
            distribution = flow.distribution(trained.test_x, time)
            # f_t is linear in the weights that training begins at.
            forgets = trained.test_jacobian - trained.cross @ learned(trained.matrix, time) @ trained.jacobian
            close(distribution.covariance_matrix, forgets * trained.variances @ forgets.mT, 1e-9)
            close(distribution.mean, flow.predict(trained.test_x, time), 1e-14)
            assert isinstance(distribution, MultitaskMultivariateNormal) == (len(trained.shape) == 2)

    def test_covariances_of_descent_likewise(self, trained):
        rate = 1.9 / float(torch.linalg.eigvalsh(trained.matrix)[-1])
        descent = GradientDescent(trained.kernel, trained.x, trained.y, rate=rate)
        weights = torch.eye(len(trained.variances), dtype=torch.float64)
        for _ in range(7):  # the weights' map, without targets
            weights = weights - rate * trained.variances.unsqueeze(-1) * (
                trained.jacobian.mT @ (trained.jacobian @ weights)
            )
        forgets = trained.test_jacobian @ weights
        expected = forgets * trained.variances @ forgets.mT
        close(descent.distribution(trained.test_x, 7).covariance_matrix, expected)

    def test_a_distribution_to_begin_with(self, trained):
        """Lee et al. 2019, equation 16, where initial functions and weights have nothing to do with each other."""
        if len(trained.shape) == 2:
            initial = gpytorch.kernels.MultitaskKernel(RBFKernel(), num_tasks=2, rank=1).double()
        else:
            initial = RBFKernel().double()
        flow = GradientFlow(trained.kernel, trained.x, trained.y, initial_kernel=initial)
        joint = initial(torch.cat([trained.test_x, trained.x])).to_dense().detach()
        for time in (0.0, 0.2, 30.0):
            map = torch.cat([torch.eye(len(trained.cross)), -trained.cross @ learned(trained.matrix, time)], dim=1)
            close(flow.distribution(trained.test_x, time).covariance_matrix, map @ joint @ map.mT, 1e-9)

    def test_in_the_limits_it_is_prior_and_noiseless_posterior(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        at_first, at_last = (flow.distribution(trained.test_x, time) for time in (0.0, math.inf))
        prior = trained.test_jacobian * trained.variances @ trained.test_jacobian.mT
        close(at_first.mean.reshape(-1), trained.test_start, 1e-14)
        close(at_first.covariance_matrix, prior)
        close(flow.predict(trained.x, math.inf), trained.y, 1e-9)
        assert float(flow.distribution(trained.x, math.inf).covariance_matrix.abs().max()) < 1e-9
        both = torch.cat([trained.jacobian, trained.test_jacobian])
        mean, covariance = references.posterior(
            torch.cat([trained.start, trained.test_start]),
            both * trained.variances @ both.mT,
            0.0,
            trained.y.reshape(-1),
        )
        close(at_last.mean.reshape(-1), mean, 1e-8)
        close(at_last.covariance_matrix, covariance, 1e-7)
        close(flow.predict(trained.test_x, 1e9), at_last.mean, 1e-8)

    def test_ensemble_is_of_functions_trained_one_by_one(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        functions = flow.ensemble(0.2, 3, generator=torch.Generator().manual_seed(5))
        start = torch.randn(3, len(trained.variances), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        start = start * trained.variances.sqrt()
        duals = (trained.residual - start @ trained.jacobian.mT) @ learned(trained.matrix, 0.2).mT
        weights = start + duals @ trained.jacobian * trained.variances
        expected = trained.test_start + weights @ trained.test_jacobian.mT
        close(functions(trained.test_x), expected.reshape(3, *trained.shape))

    def test_network_at_a_time(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        close(flow.network(0.3)(trained.test_x), flow.predict(trained.test_x, 0.3))

    def test_gradients_reach_the_inputs(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        x = trained.test_x[:1].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: flow.predict(x, [0.1, 2.0]), x, fast_mode=True)

    def test_what_it_is_made_of_is_its_own(self):
        case = Trained(1)
        kernel = ScaleKernel(NTKKernel(case.network)).double()
        kernel.outputscale = 0.3
        scale = kernel.outputscale.item()
        flow = GradientFlow(kernel, case.x, case.y)
        kernel.outputscale = 7.0
        with torch.no_grad():
            case.network[0].weight.zero_()
        matrix = scale * case.jacobian @ case.jacobian.mT
        left = torch.linalg.matrix_exp(-2.0 * matrix) @ case.residual
        close(flow.predict(case.x, 2.0), case.y - left)

    def test_float32_is_computed_in_float64(self):
        case = Trained(1)
        single = GradientFlow(case.network.float(), case.x.float(), case.y.float())
        double = GradientFlow(case.network.double(), case.x.float().double(), case.y.float().double())
        test_x = case.test_x.float()
        assert single.predict(test_x, 3.0).dtype == torch.float32
        close(single.predict(test_x, 3.0).double(), double.predict(test_x.double(), 3.0), 1e-6)
        ours, theirs = single.distribution(test_x, 3.0), double.distribution(test_x.double(), 3.0)
        close(ours.variance.double(), theirs.variance, 1e-6)
        assert ours.variance.dtype == torch.float32

    def test_inputs_in_the_networks_own_shape(self):
        net = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))
        (x, y), test_x = data(9, inputs=6, outputs=2), data(5, inputs=6, seed=1)[0]
        kernel = NTKKernel(net.double()[1:], input_shape=(2, 3), output="all", normalize=True)
        flow = GradientFlow(kernel, x.unflatten(1, (2, 3)), y)
        jacobian, test_jacobian = (references.jacobian(net, each) for each in (x, test_x))
        matrix, cross = (left @ jacobian.mT for left in (jacobian, test_jacobian))
        size = matrix.diagonal().mean()
        with torch.no_grad():
            residual, start = (y - net(x)).reshape(-1), net(test_x)
        expected = start + (cross / size @ learned(matrix / size, 0.7) @ residual).reshape(5, 2)
        for given in (test_x, test_x.unflatten(1, (2, 3))):
            close(flow.predict(given, 0.7), expected)
            close(flow.network(0.7)(given), expected)

    def test_columns_of_the_inputs(self):
        case, dims = Trained(1), (2, 0, 1)
        wide = torch.cat([case.x, torch.full((9, 1), 7.0, dtype=torch.float64)], dim=1)[:, [1, 2, 0, 3]]
        test_x = torch.cat([case.test_x, case.test_x.new_zeros(5, 1)], dim=1)[:, [1, 2, 0, 3]]
        kernel = NTKKernel(case.network, active_dims=dims)
        flow = GradientFlow(ScaleKernel(kernel), wide, case.y)
        plain = GradientFlow(ScaleKernel(NTKKernel(case.network)), case.x, case.y)
        close(flow.predict(test_x, 0.4), plain.predict(case.test_x, 0.4))
        close(flow.weights(0.4), plain.weights(0.4))
        generators = (torch.Generator().manual_seed(1) for _ in range(2))
        ours, theirs = (each.ensemble(0.4, 2, generator=g) for each, g in zip((flow, plain), generators, strict=True))
        close(ours(test_x), theirs(case.test_x))
        with pytest.raises(ValueError, match="active_dims"):
            flow.network(0.4)


class TestSingular:
    """K has no inverse: fewer parameters than rows, or a point with two targets."""

    @pytest.fixture(params=["few parameters", "repeated points"])
    def case(self, request) -> Trained:
        if request.param == "few parameters":
            return Trained(1, n=30, width=3)  # 16 of them
        case = Trained(1)
        repeated = Trained(1)
        repeated.x, repeated.y = torch.cat([case.x, case.x[:2]]), torch.cat([case.y, case.y[:2] + 1.0])
        index = [*range(9), 0, 1]
        repeated.jacobian, repeated.start = case.jacobian[index], case.start[index]
        repeated.matrix, repeated.cross = case.matrix[index][:, index], case.cross[:, index]
        repeated.residual = repeated.y - repeated.start
        return repeated

    @pytest.mark.parametrize("method", ["spectrum", "krylov"])
    def test_at_any_time(self, case, method):
        flow = GradientFlow(case.kernel, case.x, case.y, method=method, tolerance=1e-12)
        expected = [case.test_start + case.cross @ learned(case.matrix, float(t)) @ case.residual for t in TIMES]
        close(flow.predict(case.test_x, TIMES), torch.stack(expected), 1e-9)

    def test_in_the_end_it_is_least_squares(self, case):
        flow = GradientFlow(case.kernel, case.x, case.y)
        features = case.jacobian * case.variances.sqrt()
        weights = torch.linalg.pinv(features, rtol=1e-12) @ case.residual
        expected = case.test_start + case.test_jacobian * case.variances.sqrt() @ weights
        for time in (math.inf, 1e15):  # beyond what the rounding of K resolves
            close(flow.predict(case.test_x, time), expected, 1e-6)
            close(flow.training_loss(time), 0.5 * (case.residual - features @ weights).square().sum(), 1e-8)
        variance = flow.distribution(case.test_x, math.inf).covariance_matrix.diagonal()
        left = (case.test_jacobian * case.variances.sqrt()).square().sum(-1)
        assert ((variance >= 0) & (variance <= left)).all()


class TestKrylov:
    CASE = Trained(2, n=30)

    @pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
    def test_is_the_full_spectrum(self, tolerance):
        case = self.CASE
        flow = GradientFlow(case.kernel, case.x, case.y)
        krylov = GradientFlow(case.kernel, case.x, case.y, method="krylov", tolerance=tolerance)
        assert flow.method == "spectrum"
        weights, expected = krylov.weights(TIMES), flow.weights(TIMES)
        errors = ((weights - expected).square() / case.variances).sum(-1).sqrt()
        sizes = (expected.square() / case.variances).sum(-1).sqrt()
        assert (errors <= tolerance * sizes + 1e-13).all()
        assert krylov._expansion.steps < 42  # P = 50, N = 60
        test = krylov.predict(case.test_x, TIMES) - flow.predict(case.test_x, TIMES)
        prior = (case.test_jacobian.square() * case.variances).sum(-1).sqrt().reshape(5, 2)
        assert (test.abs() <= (tolerance * sizes + 1e-13)[:, None, None] * prior).all()
        ours, theirs = (each.distribution(case.test_x, 0.3).covariance_matrix for each in (krylov, flow))
        close(ours, theirs, tolerance)
        close(krylov.training_loss(TIMES), flow.training_loss(TIMES), 10 * tolerance)

    @pytest.mark.parametrize("relative_rate", [0.9, 1.9])
    def test_of_descent(self, relative_rate):
        case = self.CASE
        rate = relative_rate / float(torch.linalg.eigvalsh(case.matrix)[-1])
        krylov, full = (
            GradientDescent(case.kernel, case.x, case.y, rate=rate, method=method, tolerance=1e-8)
            for method in ("krylov", "spectrum")
        )
        steps = [0, 1, 8, 200]
        close(krylov.weights(steps), full.weights(steps), 1e-7)
        close(
            krylov.distribution(case.test_x, 20).covariance_matrix,
            full.distribution(case.test_x, 20).covariance_matrix,
            1e-7,
        )

    def test_longer_times_extend_what_there_is(self):
        case = self.CASE
        krylov = GradientFlow(case.kernel, case.x, case.y, method="krylov")
        krylov.predict(case.test_x, 0.01)
        few = krylov._expansion.steps
        later = krylov.predict(case.test_x, 20.0)
        assert krylov._expansion.steps > few
        close(later, GradientFlow(case.kernel, case.x, case.y).predict(case.test_x, 20.0), 1e-5)

    def test_warns_where_it_stops_short(self):
        case = self.CASE
        krylov = GradientFlow(case.kernel, case.x, case.y, method="krylov", max_steps=9)
        with pytest.warns(NumericalWarning, match="stopped after 9 steps with a relative error"):
            krylov.predict(case.test_x, 100.0)

    def test_is_taken_where_eigenvectors_do_not_fit(self):
        case = self.CASE
        with settings.memory_budget(8 * 60**2):
            assert GradientFlow(case.kernel, case.x, case.y).method == "krylov"
            forced = GradientFlow(case.kernel, case.x, case.y, method="spectrum")
            with pytest.raises(RuntimeError, match="memory_budget"):
                forced.predict(case.test_x, 1.0)

    def test_keeps_within_the_memory_budget(self):
        case = self.CASE
        expected = GradientFlow(case.kernel, case.x, case.y).distribution(case.test_x, 0.3).covariance_matrix
        krylov = GradientFlow(case.kernel, case.x, case.y, method="krylov", tolerance=1e-9)
        with settings.memory_budget(16 * 60 * 130):
            assert krylov._room_for_vectors() == 130  # of two Krylov spaces, at most
            close(krylov.distribution(case.test_x, 0.3).covariance_matrix, expected, 1e-9)
        with settings.memory_budget(16 * 60 * 12), pytest.warns(NumericalWarning, match="stopped after 12 steps"):
            GradientFlow(case.kernel, case.x, case.y, method="krylov").predict(case.test_x, 100.0)

    def test_has_no_infinite_time(self):
        case = self.CASE
        with pytest.raises(ValueError, match="method='spectrum'"):
            GradientFlow(case.kernel, case.x, case.y, method="krylov").predict(case.test_x, math.inf)


@pytest.mark.engine_independent
class TestBounds:
    """What is proven of the error of Krylov's approximation holds, and is not far off."""

    @pytest.fixture
    def problem(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
        values = torch.logspace(1, -6, 60, dtype=torch.float64)
        return basis * values @ basis.mT, torch.randn(60, 2, generator=generator, dtype=torch.float64)

    @pytest.mark.parametrize(
        "filter", [Flow(torch.tensor([0.1, 3.0, 90.0])), Descent(torch.tensor([1.0, 40.0, 999.0]), 0.09)],
        ids=["flow", "descent"],
    )  # fmt: skip
    def test_hold_after_any_number_of_steps(self, problem, filter):
        filter.elapsed = filter.elapsed.double()
        matrix, columns = problem
        exact = Eigenvectors(matrix).expand(columns).apply(filter)
        size = (exact * (matrix @ exact)).sum(-2).sqrt()
        ratios = []
        for steps in range(1, 40):
            expansion = KrylovExpansion(lambda v: matrix @ v, columns, 0.0, 60)
            expansion._lanczos.extend(steps)
            coefficients, bound = expansion._at_present(filter)
            approximate = (coefficients.unsqueeze(-2) @ expansion._lanczos.basis).squeeze(-2).mT
            error = approximate - exact
            error = (error * (matrix @ error)).sum(-2).clamp_min(0).sqrt() / size
            assert (error <= 1.0001 * bound + 1e-10).all()
            ratios.append((bound / error)[error > 1e-8])
        assert float(torch.cat(ratios).median()) < 30


def exact_filter(filter: Filter, value: float) -> list[tuple[float, float]]:
    """φ and ψ with sixty digits."""
    found = []
    with mpmath.workdps(60):
        value = mpmath.mpf(value)
        for i, elapsed in enumerate(filter.elapsed.tolist()):
            if isinstance(filter, Descent):
                rate, k = mpmath.mpf(filter.rate), int(filter.steps[i])
                time, left = rate * k, (1 - rate * value) ** k
            else:
                time = mpmath.mpf(elapsed)
                left = mpmath.exp(-value * time)
            phi = (1 - left) / value if value else time
            if value:
                psi = (time - phi) / value
            else:
                psi = rate**2 * k * (k - 1) / 2 if isinstance(filter, Descent) else time**2 / 2
            found.append((float(phi), float(psi)))
    return found


@pytest.mark.engine_independent
class TestFilters:
    VALUES = torch.tensor([0.0, 1e-18, 1e-9, 1e-4, 0.02, 0.7, 1.0, 1.5, 1.9999999, 2.0], dtype=torch.float64)

    @pytest.mark.parametrize(
        "filter",
        [
            Flow(torch.tensor([0.0, 1e-8, 1.0, 60.0, 1e7], dtype=torch.float64)),
            Descent(torch.tensor([0.0, 1.0, 2.0, 3.0, 50.0, 10001.0], dtype=torch.float64), 1.0),
            Descent(torch.tensor([0.0, 1.0, 7.0, 1000.0], dtype=torch.float64), 0.37),
        ],
        ids=["flow", "descent", "slow descent"],
    )
    def test_without_cancellation(self, filter):
        exact = torch.tensor([exact_filter(filter, float(v)) for v in self.VALUES], dtype=torch.float64)
        torch.testing.assert_close(filter.learned(self.VALUES), exact[..., 0].mT, rtol=2e-13, atol=1e-300)
        torch.testing.assert_close(filter.integral(self.VALUES), exact[..., 1].mT, rtol=1e-8, atol=1e-15)
        left = 1 - self.VALUES * filter.learned(self.VALUES)
        torch.testing.assert_close(filter.left(self.VALUES), left, rtol=1e-9, atol=1e-9)
        twice = filter.learned(self.VALUES) * (1 + filter.left(self.VALUES))
        torch.testing.assert_close(filter.twice().learned(self.VALUES), twice, rtol=1e-8, atol=1e-300)

    def test_what_cannot_be_told_is_left_out(self):
        flow = Flow(torch.tensor([1.0, 1e14, math.inf], dtype=torch.float64))
        zero, one = torch.zeros(1).double(), torch.ones(1).double()
        assert flow.learned(zero, floor=1e-13).flatten().tolist() == [1.0, 0.0, 0.0]
        assert flow.learned(one, floor=1e-13).flatten().tolist() == [-math.expm1(-1.0), 1.0, 1.0]
        assert flow.left(zero).flatten().tolist() == [1.0, 1.0, 1.0]


class TestRate:
    def test_is_where_training_begins_to_diverge(self, trained):
        C = trained.y.dim()
        rate = largest_stable_rate(trained.kernel, trained.x, num_outputs=C)
        assert rate == pytest.approx(2 / float(torch.linalg.eigvalsh(trained.matrix)[-1]), rel=1e-12)
        N = len(trained.residual)
        for loss, factor in FACTORS.items():
            found = largest_stable_rate(trained.kernel, trained.x, num_outputs=C, loss=loss)
            assert found == pytest.approx(rate / factor(N), rel=1e-12)
        for relative, diverges in ((0.98, False), (1.02, True)):
            error = trained.residual
            for _ in range(2000):
                error = error - relative * rate * (trained.matrix @ error)
            assert bool(error.norm() > trained.residual.norm()) == diverges

    def test_of_many_rows_is_below_by_little(self):
        case = Trained(2, n=300)
        exact = 2 / float(torch.linalg.eigvalsh(case.matrix)[-1])
        assert 0.949 * exact <= largest_stable_rate(case.kernel, case.x, num_outputs=2) <= exact

    @pytest.mark.engine_independent
    def test_eigenvalues_close_together_are_bounded_from_above(self):
        values = 1 - torch.linspace(0, 1e-2, 5000, dtype=torch.float64)
        products = []

        def product(v: Tensor) -> Tensor:
            products.append(v)
            return values.unsqueeze(-1) * v

        assert 1.0 <= largest_eigenvalue(product, 5000, torch.device("cpu")) <= 1 / 0.95
        assert len(products) < 60

    @pytest.mark.engine_independent
    def test_of_a_network_itself(self):
        net, (x, _) = network(), data(9)
        expected = 2 / float(torch.linalg.eigvalsh(references.kernel(net, x))[-1])
        assert largest_stable_rate(net, x) == pytest.approx(expected, rel=1e-12)


class TestRidge:
    def test_is_the_nearest_of_all(self, trained):
        flow = GradientFlow(trained.kernel, trained.x, trained.y)
        for time in (0.01, 0.5, 20.0):
            learned_by_flow = (trained.matrix @ learned(trained.matrix, time)) @ trained.residual

            def distance(ridge: float, target=learned_by_flow) -> float:
                noisy = trained.matrix + ridge * torch.eye(len(trained.matrix))
                return float((trained.matrix @ torch.linalg.solve(noisy, trained.residual) - target).norm())

            ridge = flow.ridge(time)
            assert 0 < ridge < 1 / time
            grid = torch.logspace(-7, 0, 800, dtype=torch.float64) / time
            assert distance(ridge) <= min(map(distance, grid.tolist())) * (1 + 1e-9)
            assert distance(ridge) < distance(1.01 * ridge)
            assert distance(ridge) < distance(0.99 * ridge)
        assert flow.ridge(0.0) == math.inf
        assert flow.ridge(math.inf) == 0.0

    def test_of_krylov_spaces(self, trained):
        ridges = [
            GradientFlow(trained.kernel, trained.x, trained.y, method=method).ridge(0.5)
            for method in ("spectrum", "krylov")
        ]
        assert ridges[0] == pytest.approx(ridges[1], rel=1e-5)

    @pytest.mark.engine_independent
    def test_one_eigenvalue_is_matched_exactly(self):
        one = torch.ones(1, dtype=torch.float64)
        for time in (1e-3, 1.0, 20.0):
            ridge = best_ridge(Flow(time * one), 0.3 * one, one)
            assert ridge == pytest.approx(0.3 / math.expm1(0.3 * time), rel=1e-9)
        assert best_ridge(Flow(1e5 * one), one, one) == 0.0

    @pytest.mark.engine_independent
    def test_small_times_are_the_rule_of_thumb(self):
        values = torch.tensor([1e-3, 0.4, 1.0], dtype=torch.float64)
        assert best_ridge(Flow(torch.tensor([1e-4]).double()), values, values) == pytest.approx(1e4, rel=1e-4)

    def test_takes_the_loss_into_account(self, trained):
        N = len(trained.residual)
        flow, by_mean = (
            GradientFlow(trained.kernel, trained.x, trained.y, loss=loss) for loss in ("half_sum", "half_mse")
        )
        assert by_mean.ridge(N * 0.5) == pytest.approx(flow.ridge(0.5), rel=1e-6)


@pytest.mark.engine_independent
class TestLanczos:
    def test_relation(self):
        generator = torch.Generator().manual_seed(0)
        factor = torch.randn(30, 40, generator=generator, dtype=torch.float64)
        matrix, start = factor @ factor.mT, torch.randn(30, 3, generator=generator, dtype=torch.float64)
        lanczos = Lanczos(lambda v: matrix @ v, start)
        lanczos.extend(12)
        basis, tridiagonal = lanczos.basis, lanczos.tridiagonal()
        close(basis @ basis.mT, torch.eye(12, dtype=torch.float64).expand(3, -1, -1), 1e-13)
        left = basis @ matrix - tridiagonal @ basis
        assert float(left[:, :-1].abs().max()) < 1e-11 * float(matrix.abs().max())
        close(left[:, -1].norm(dim=-1), lanczos.remainder, 1e-11)
        close(lanczos.norms, start.norm(dim=0), 1e-15)

    def test_ends_where_a_space_is_exhausted(self):
        """Three different eigenvalues, of which the second vector sees two."""
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64))[0]
        values = torch.tensor([3.0, 1.0, 1e-3], dtype=torch.float64).repeat_interleave(torch.tensor([5, 7, 8]))
        matrix = basis * values @ basis.mT
        start = torch.stack([basis.sum(1), basis[:, :12].sum(1)], dim=1)
        lanczos = Lanczos(lambda v: matrix @ v, start)
        lanczos.extend(9)
        assert lanczos.steps == 3
        assert lanczos.is_exhausted
        found = lanczos.eigh()[0]
        close(found[0], torch.tensor([1e-3, 1.0, 3.0], dtype=torch.float64), 1e-12)
        close(found[1, 1:], torch.tensor([1.0, 3.0], dtype=torch.float64), 1e-12)


class NTKLinear(nn.Module):
    """W x / √d + b with standard normal W and b: the neural tangent parametrisation."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_out, d_in)), nn.Parameter(torch.randn(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT / self.weight.shape[1] ** 0.5 + 0.1 * self.bias


@pytest.mark.engine_independent
def test_a_network_trains_as_its_linearisation_the_more_the_wider_it_is():
    x, y = data(10)
    test_x = data(8, seed=1)[0]
    errors = []
    for width in (16, 128, 1024):
        torch.manual_seed(0)
        net = nn.Sequential(NTKLinear(3, width), nn.Tanh(), NTKLinear(width, 1), nn.Flatten(0)).double()
        rate = 0.5 * largest_stable_rate(net, x, loss="mse")
        predicted = GradientDescent(net, x, y, rate=rate, loss="mse").predict(test_x, 100)
        with torch.no_grad():
            before = net(test_x)
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            errors.append(float((net(test_x) - predicted).norm() / (predicted - before).norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.05


class TestOtherKernels:
    """Anything with a kernel can be trained in function space."""

    def test_begins_at_zero_or_at_a_mean(self):
        x, y = data(9)
        test_x, kernel = data(5, seed=1)[0], ScaleKernel(RBFKernel())
        mean = gpytorch.means.ConstantMean()
        mean.initialize(constant=0.75)
        matrix, cross = (kernel.double()(a, x).to_dense().detach() for a in (x, test_x))
        phi = learned(matrix, 2.0)
        close(GradientFlow(kernel, x, y).predict(test_x, 2.0), cross @ phi @ y)
        close(GradientFlow(kernel, x, y, mean=mean.double()).predict(test_x, 2.0), 0.75 + cross @ phi @ (y - 0.75))
        covariance = kernel(test_x).to_dense() - cross @ phi @ (2 * torch.eye(9) - matrix @ phi) @ cross.mT
        close(GradientFlow(kernel, x, y).distribution(test_x, 2.0).covariance_matrix, covariance.detach())

    def test_a_networks_mean_can_be_replaced(self):
        case = Trained(1)
        flow = GradientFlow(case.kernel, case.x, case.y, mean=gpytorch.means.ZeroMean())
        close(flow.predict(case.test_x, 0.3), case.cross @ learned(case.matrix, 0.3) @ case.y)
        functions = flow.ensemble(0.3, 2, generator=torch.Generator().manual_seed(0))
        assert functions(case.test_x).shape == (2, 5)
        with pytest.raises(ValueError, match=r"use predict\(x, times\)"):
            flow.network(0.3)

    @pytest.mark.parametrize("what", ["weights", "network", "ensemble"])
    def test_have_no_weights(self, what):
        flow = GradientFlow(RBFKernel(), *data(9))
        with pytest.raises(TypeError, match="needs weights"):
            getattr(flow, what)(1.0, *([2] if what == "ensemble" else []))


@pytest.mark.engine_independent
class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"loss": "cross_entropy"}, ValueError, "loss must be one of 'half_sum'"),
            ({"method": "qr"}, ValueError, "method must be"),
            ({"mean": 0.0}, TypeError, "mean must be a gpytorch.means.Mean"),
            ({"initial_kernel": nn.Linear(1, 1)}, TypeError, "initial_kernel must be"),
            ({"train_y": torch.zeros(8)}, ValueError, r"targets of shape \(9,\)"),
            ({"train_y": torch.zeros(9, 2)}, ValueError, r"targets of shape \(9,\) .* got \(9, 2\)"),
            ({"train_y": torch.full((9,), math.nan)}, ValueError, "targets are NaN"),
            ({"train_x": torch.zeros(2, 9, 3)}, ValueError, "training inputs"),
            ({"train_x": torch.zeros(0, 3), "train_y": torch.zeros(0)}, ValueError, "n > 0"),
            ({"train_x": torch.full((9, 3), math.nan)}, ValueError, "NaN"),
            ({"train_x": torch.zeros(9, 3, dtype=torch.long)}, TypeError, "floating-point"),
            ({"source": lambda x: x}, TypeError, "Expected a network"),
            ({"mean": gpytorch.means.MultitaskMean(gpytorch.means.ZeroMean(), 2)}, ValueError, "1 output"),
        ],
    )
    def test_of_what_is_given(self, options, error, message):
        x, y = data(9)
        arguments = {"source": NTKKernel(network()), "train_x": x, "train_y": y} | options
        with pytest.raises(error, match=message):
            GradientFlow(**arguments)

    @pytest.mark.parametrize("shape", [(4, 2), (4, 5), (2, 4, 3)])
    def test_of_test_inputs(self, shape):
        flow = GradientFlow(network(), *data(9))
        for method in (flow.predict, flow.distribution):
            with pytest.raises(ValueError, match=r"Expected inputs \(m, 3\)"):
                method(torch.zeros(shape), 1.0)

    def test_of_kernels_with_batches(self):
        with pytest.raises(ValueError, match="without batches"):
            GradientFlow(NTKKernel(network(), batch_shape=torch.Size([2])), *data(9))

    def test_of_times(self):
        net, (x, y) = network(), data(9)
        flow = GradientFlow(net, x, y)
        for times in (-1.0, [1.0, math.nan]):
            with pytest.raises(ValueError, match="must not be negative"):
                flow.predict(x, times)
        for method in (flow.distribution, lambda x, t: flow.network(t), lambda x, t: flow.ridge(t)):
            with pytest.raises(ValueError, match="one time"):
                method(x, [1.0, 2.0])
        with pytest.raises(ValueError, match="whole numbers"):
            GradientDescent(net, x, y, rate=1e-3).predict(x, 0.5)

    def test_of_rates(self):
        for rate in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="rate must be positive"):
                GradientDescent(network(), *data(9), rate=rate)
        with pytest.raises(ValueError, match="loss must be"):
            largest_stable_rate(network(), data(9)[0], loss="mae")

    def test_an_initial_kernel_has_no_weights(self):
        flow = GradientFlow(network(), *data(9), initial_kernel=RBFKernel())
        with pytest.raises(ValueError, match="initial_kernel has functions without weights"):
            flow.ensemble(1.0, 2)
        with pytest.raises(ValueError, match="18 rows"):
            initial = gpytorch.kernels.MultitaskKernel(RBFKernel(), num_tasks=2)
            GradientFlow(network(), *data(9), initial_kernel=initial)

    def test_a_column_of_targets_is_one_output(self):
        net, (x, y) = network(), data(9)
        assert GradientFlow(net, x, y.unsqueeze(-1)).predict(x, 1.0).shape == (9,)
