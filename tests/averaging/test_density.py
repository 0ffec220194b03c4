"""The log posterior density of hyperparameters, against formulas and numerical integration."""

import math

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior, LogNormalPrior, NormalPrior
from linear_operator.operators import DiagLinearOperator
from linear_operator.utils.errors import NanError, NotPSDError

from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.averaging.marginal_likelihood import SumOfKernels
from ntk_gp.averaging.unconstrained import Hyperparameters, working_copy
from ntk_gp.priors import register_log_prior
from tests import adapted
from tests.averaging.models import PlainGP, data, log_priors, rbf_log_likelihood, rbf_model

pytestmark = pytest.mark.engine_independent


def test_logarithms_with_priors_on_logarithms():
    model = rbf_model()
    hyperparameters = Hyperparameters(working_copy(model))
    u = torch.tensor([-2.0, 0.3, -0.7], dtype=torch.float64)
    expected = rbf_log_likelihood(model, u) + log_priors(u).sum()
    value, _ = hyperparameters.log_density(u)
    assert value == pytest.approx(expected.item(), abs=1e-9)
    assert hyperparameters.value(u) == pytest.approx(expected.item(), abs=1e-9)


def test_present_is_where_the_model_is():
    model = rbf_model()
    model.likelihood.noise, model.covar_module.outputscale = 0.3, 2.0
    u = Hyperparameters(working_copy(model)).present()
    torch.testing.assert_close(u, torch.tensor([0.3, 2.0, 0.4], dtype=torch.float64).log(), rtol=0, atol=1e-6)


CONSTRAINTS = {
    "softplus": Positive(),
    "exp": Positive(transform=torch.exp, inv_transform=torch.log),
    "above": GreaterThan(0.05),
    "between": Interval(0.01, 3.0),
    "not enforced": Interval(0.01, 3.0, transform=None),
}


def model_with(constraint, register) -> PlainGP:
    """One that has an outputscale alone to learn."""
    kernel = ScaleKernel(RBFKernel(), outputscale_constraint=constraint)
    model = PlainGP(*data(6), kernel)
    model.likelihood.raw_noise.requires_grad_(False)
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    kernel.outputscale = 0.7
    register(kernel)
    return model.double()


PRIORS = {
    "on θ": lambda kernel, name="p": kernel.register_prior(name, GammaPrior(2.0, 3.0), "outputscale"),
    "log-normal on θ": lambda kernel: kernel.register_prior("p", LogNormalPrior(0.1, 0.6), "outputscale"),
    "on log θ": lambda kernel: register_log_prior(kernel, "outputscale", 0.7, 0.5),
    "on raw": lambda kernel, name="p": kernel.register_prior(name, NormalPrior(-0.5, 1.3), "raw_outputscale"),
    "on a root": lambda kernel, name="p": kernel.register_prior(
        name, GammaPrior(3.0, 2.0), lambda k: k.outputscale.sqrt()
    ),
}


def prior_density(model: PlainGP, u: torch.Tensor) -> list[float]:
    """What the priors add to the log likelihood at each u (m,), which is a dense Gaussian's here."""
    hyperparameters = Hyperparameters(working_copy(model))
    values, scales = [], []
    for each in u:
        values.append(hyperparameters.value(each.reshape(1)))
        scales.append(hyperparameters.model.covar_module.outputscale.detach().clone())
    (x,), y = model.train_inputs, model.train_targets
    with torch.no_grad():
        K = model.covar_module.base_kernel(x).to_dense()
        noise = model.likelihood.noise * torch.eye(len(y), dtype=y.dtype)
    covariances = torch.stack(scales)[:, None, None] * K + noise
    likelihoods = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariances).log_prob(y)
    return (torch.tensor(values, dtype=y.dtype) - likelihoods).tolist()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("prior", PRIORS)
def test_priors_are_densities_in_u(constraint, prior):
    """Whatever they are on and however θ is parametrised, exp(density) integrates to the prior's probability of what
    the constraint allows."""
    model = model_with(CONSTRAINTS[constraint], PRIORS[prior])
    u = torch.linspace(-16, 12, 71, dtype=torch.float64)  # smooth: exact to 1e-5 or so
    total = torch.trapezoid(torch.tensor(prior_density(model, u), dtype=torch.float64).exp(), u).item()
    assert total == pytest.approx(allowed(model, prior), abs=2e-4)


def test_several_priors_on_one_parameter_add():
    """Each with the slope of what it is on, though one backward pass takes those of several parameters."""
    names = ("on θ", "on a root", "on raw")

    def register(kernel):
        for name in names:
            PRIORS[name](kernel, name)

    u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    apart = [prior_density(model_with(Positive(), PRIORS[name]), u) for name in names]
    together = prior_density(model_with(Positive(), register), u)
    assert together == pytest.approx([sum(each) for each in zip(*apart, strict=True)], abs=1e-9)


def test_a_prior_on_several_parameters_beside_one_on_one_of_them():
    """What is joined for one backward pass must be computed from other parameters, also where a slope is zero."""
    kernel = ScaleKernel(ScaleKernel(RBFKernel()))
    model = PlainGP(*data(6), kernel)
    model.likelihood.raw_noise.requires_grad_(False)
    kernel.base_kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    kernel.outputscale = kernel.base_kernel.outputscale = 0.7
    kernel.register_prior("p", GammaPrior(2.0, 3.0), "outputscale")
    hinge = lambda k: k.base_kernel.outputscale + (k.outputscale - 1).relu()  # noqa: E731
    kernel.register_prior("q", GammaPrior(2.0, 3.0), hinge)
    u = Hyperparameters(working_copy(model)).present() + 1.5
    outer, inner = u.exp()
    gamma = torch.distributions.Gamma(*torch.tensor([2.0, 3.0], dtype=torch.float64))
    of_priors = gamma.log_prob(outer) + gamma.log_prob(inner + outer - 1) + u.sum()  # the slopes are a triangle
    with torch.no_grad():
        K = outer * inner * kernel.base_kernel.base_kernel(model.train_inputs[0]).to_dense()
        covariance = K + model.likelihood.noise * torch.eye(len(K), dtype=K.dtype)
        y = model.train_targets
        of_data = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)
    value = Hyperparameters(working_copy(model)).value(u)
    assert value == pytest.approx((of_data + of_priors).item(), abs=1e-9)


@pytest.mark.parametrize(
    "constraints",
    [
        (Positive(), Positive(), Positive(torch.exp, inv_transform=torch.log)),
        (GreaterThan(0.1), GreaterThan(0.2), GreaterThan(0.1)),
        (Interval(0.1, 2.0), Interval(0.1, 3.0), Interval(0.1, 2.0)),
        (GreaterThan(torch.tensor([[0.1]])), GreaterThan(torch.tensor([[0.1]])), LessThan(3.0)),
        (GreaterThan(torch.tensor([0.1, 0.2])), Positive(), GreaterThan(torch.tensor([0.1, 0.2]))),
    ],
)
def test_parameters_that_are_alike_are_told_from_others(constraints):
    """u is what it says of each, and leads back to the parameters."""
    kernels = [RBFKernel(ard_num_dims=2, lengthscale_constraint=constraint) for constraint in constraints]
    model = PlainGP(*adapted.data(6, inputs=2), kernels[0] + kernels[1] + kernels[2])
    for i, kernel in enumerate(kernels):
        kernel.lengthscale = torch.tensor([[0.5 + 0.1 * i, 1.2]])
    hyperparameters = Hyperparameters(working_copy(model))
    coordinates, u, values = hyperparameters.coordinates, hyperparameters.present(), hyperparameters.values()
    for coordinate, piece in zip(coordinates.each, u.split(coordinates.sizes), strict=True):
        torch.testing.assert_close(coordinate.u().flatten(), piece)
    hyperparameters.set(u)
    for name, value in hyperparameters.values().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=1e-7)


class Power(Positive):
    """A constraint of a user's, with a state of its own."""

    def __init__(self, power: float):
        super().__init__()
        self.power = power

    def transform(self, tensor):
        return super().transform(tensor) ** self.power

    def inverse_transform(self, transformed_tensor):
        return super().inverse_transform(transformed_tensor ** (1 / self.power))


def test_constraints_of_a_users_own_are_not_taken_for_alike():
    model = PlainGP(*data(6), RBFKernel(lengthscale_constraint=Power(1)) + RBFKernel(lengthscale_constraint=Power(3)))
    hyperparameters = Hyperparameters(working_copy(model))
    u = hyperparameters.present()
    hyperparameters.set(u)
    torch.testing.assert_close(hyperparameters.present(), u, rtol=0, atol=1e-7)


def allowed(model: PlainGP, prior: str) -> float:
    """The prior's probability of the range of θ: of draws from it; all, where it is on the raw parameter."""
    constraint = model.covar_module.raw_outputscale_constraint
    if prior == "on raw" and constraint.enforced:
        return 1.0
    low, high = float(constraint.lower_bound), float(constraint.upper_bound)
    grid = torch.linspace(max(low, 1e-9), min(high, 60.0), 2_000_001, dtype=torch.float64)
    if prior == "on raw":
        density = torch.distributions.Normal(-0.5, 1.3).log_prob(grid).exp()
    elif prior == "on θ":
        density = torch.distributions.Gamma(2.0, 3.0).log_prob(grid).exp()
    elif prior == "log-normal on θ":
        density = torch.distributions.LogNormal(0.1, 0.6).log_prob(grid).exp()
    elif prior == "on log θ":
        density = torch.distributions.LogNormal(math.log(0.7), 0.5).log_prob(grid).exp()
    else:
        density = torch.distributions.Gamma(3.0, 2.0).log_prob(grid.sqrt()).exp() / (2 * grid.sqrt())
    return torch.trapezoid(density, grid).item()


# What is only bounded above may be negative, where three of the priors have no density.
PAIRS = [(constraint, prior) for constraint in CONSTRAINTS for prior in PRIORS] + [("below", "on raw")]


@pytest.mark.parametrize(("constraint", "prior"), PAIRS)
def test_gradients(constraint, prior):
    constraint = {**CONSTRAINTS, "below": LessThan(2.0)}[constraint]
    hyperparameters = Hyperparameters(working_copy(model_with(constraint, PRIORS[prior])))
    u, step = hyperparameters.present() + 0.3, 1e-5
    difference = (hyperparameters.value(u + step) - hyperparameters.value(u - step)) / (2 * step)
    assert hyperparameters.log_density(u)[1].item() == pytest.approx(difference, rel=1e-6, abs=1e-6)


def test_gradients_of_all_hyperparameters_of_a_network_model():
    network = adapted.network()
    x, y = adapted.data(15)
    model = PlainGP(x, y, NTKKernel(network, variance_groups="layer") + ScaleKernel(RBFKernel(ard_num_dims=3)))
    model.mean_module = NetworkMean(network)
    register_log_prior(model.covar_module.kernels[0], "variance", torch.tensor([0.2, 0.4]), 1.0)
    model.covar_module.kernels[1].base_kernel.register_prior("p", GammaPrior(2.0, 1.0), "lengthscale")
    hyperparameters = Hyperparameters(working_copy(model))
    u = hyperparameters.present() + 0.1 * torch.arange(7, dtype=torch.float64)
    gradient = hyperparameters.log_density(u)[1]
    for i, step in enumerate(1e-5 * torch.eye(7, dtype=torch.float64)):
        difference = (hyperparameters.value(u + step) - hyperparameters.value(u - step)) / 2e-5
        assert gradient[i].item() == pytest.approx(difference, rel=1e-5, abs=1e-5)


def test_a_prior_on_a_matrix_of_parameters():
    """t = A θ has the Jacobian A diag(θ), of which the determinant counts."""
    model = PlainGP(*data(6), ScaleKernel(RBFKernel(ard_num_dims=1)))
    kernel = model.covar_module
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    model.likelihood.raw_noise.requires_grad_(False)

    class Pair(gpytorch.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("raw_pair", torch.nn.Parameter(torch.zeros(2)))
            self.register_constraint("raw_pair", Positive())

        @property
        def pair(self):
            return self.raw_pair_constraint.transform(self.raw_pair)

    mixing = torch.tensor([[1.0, 2.0], [-1.0, 3.0]], dtype=torch.float64)
    model.pair = Pair().double()
    model.pair.register_prior("p", NormalPrior(0.5, 2.0), lambda module: mixing @ module.pair)
    model.covar_module.raw_outputscale.requires_grad_(False)
    hyperparameters = Hyperparameters(working_copy(model))
    u = torch.tensor([0.3, -0.8], dtype=torch.float64)
    rest = hyperparameters.model.likelihood(hyperparameters.model(*hyperparameters.model.train_inputs)).log_prob(
        hyperparameters.model.train_targets
    )
    normal = torch.distributions.Normal(*torch.tensor([0.5, 2.0], dtype=torch.float64))
    expected = normal.log_prob(mixing @ u.exp()).sum() + math.log(5.0) + u.sum()
    assert hyperparameters.value(u) - rest.item() == pytest.approx(expected.item(), abs=1e-9)
    assert hyperparameters.without_proper_prior() is None
    step = torch.tensor([1e-5, 0.0], dtype=torch.float64)
    difference = (hyperparameters.value(u + step) - hyperparameters.value(u - step)) / 2e-5
    assert hyperparameters.log_density(u)[1][0].item() == pytest.approx(difference, rel=1e-6)


class TestWithoutProperPrior:
    def test_none_is_missing(self):
        assert Hyperparameters(working_copy(rbf_model())).without_proper_prior() is None

    def test_one_is_missing(self):
        model = PlainGP(*data(), ScaleKernel(RBFKernel()))
        register_log_prior(model.likelihood, "noise", 0.1, 1.0)
        reason = Hyperparameters(working_copy(model)).without_proper_prior()
        assert reason == "covar_module.outputscale, covar_module.base_kernel.lengthscale: no prior"

    def test_two_priors_on_one(self):
        model = rbf_model()
        model.covar_module.register_prior("p", GammaPrior(2.0, 1.0), "outputscale")
        reason = Hyperparameters(working_copy(model)).without_proper_prior()
        assert reason == "covar_module.outputscale: more than one prior"

    def test_a_sum_of_parameters(self):
        model = rbf_model(free=("outputscale",))
        model.covar_module.raw_outputscale.requires_grad_(True)
        model.covar_module.base_kernel.raw_lengthscale.requires_grad_(True)
        model.register_prior(
            "p", NormalPrior(0.0, 1.0), lambda m: m.covar_module.outputscale + m.covar_module.base_kernel.lengthscale
        )
        assert "several parameters" in Hyperparameters(working_copy(model)).without_proper_prior()


def test_what_has_no_prior_is_flat():
    model = PlainGP(*data(), ScaleKernel(RBFKernel()))
    u = torch.tensor([-2.0, 0.3, -0.7], dtype=torch.float64)
    value = Hyperparameters(working_copy(model)).value(u)
    assert value == pytest.approx(rbf_log_likelihood(model, u).item(), abs=1e-9)


def test_the_likelihood_is_exact_beyond_what_gpytorch_factorises():
    torch.manual_seed(0)
    x = torch.rand(900, 1, dtype=torch.float64)
    model = PlainGP(x, (9 * x).sin().squeeze(-1), ScaleKernel(RBFKernel()))
    u = torch.tensor([-3.0, 0.0, -1.0], dtype=torch.float64)
    value = Hyperparameters(working_copy(model)).value(u)
    assert value == pytest.approx(rbf_log_likelihood(model, u).item(), rel=1e-9)


@pytest.mark.parametrize("error", [NotPSDError, NanError, torch.linalg.LinAlgError])
@pytest.mark.parametrize("way", ["sum of kernels", "GPyTorch"])
def test_where_the_model_cannot_be_evaluated(monkeypatch, error, way):
    def fail(*_):
        raise error("not positive definite")

    def check() -> None:
        value, gradient = hyperparameters.log_density(u)
        assert value == hyperparameters.value(u) == -math.inf
        assert gradient.isnan().all()

    u = torch.zeros(3, dtype=torch.float64)
    if way == "GPyTorch":
        monkeypatch.setattr(SumOfKernels, "of", lambda model: None)
    hyperparameters = Hyperparameters(working_copy(rbf_model()))
    with monkeypatch.context() as patch:
        patch.setattr(hyperparameters.model, "forward", fail)  # from the beginning
        check()
    hyperparameters = Hyperparameters(working_copy(rbf_model()))
    assert math.isfinite(hyperparameters.value(u))
    if way == "GPyTorch":
        monkeypatch.setattr(hyperparameters.model, "forward", fail)
    else:
        monkeypatch.setattr(SumOfKernels, "__call__", fail)
    check()


def test_float32_models_are_computed_in_float64():
    model = rbf_model()
    value = Hyperparameters(working_copy(model.float())).value(torch.tensor([-2.0, 0.3, -0.7]).double())
    single = rbf_model()
    single.set_train_data(*model.train_inputs, model.train_targets, strict=False)
    single.double()
    expected = (
        rbf_log_likelihood(single, torch.tensor([-2.0, 0.3, -0.7]).double())
        + log_priors(torch.tensor([-2.0, 0.3, -0.7]).double()).sum()
    )
    assert value == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: gpytorch.kernels.RBFKernel(), TypeError, "ExactGP"),
        (lambda: PlainGP(None, None, RBFKernel()), ValueError, "no training data"),
        (lambda: PlainGP(torch.rand(2, 4, 1), torch.rand(2, 4), RBFKernel()), ValueError, r"\(n, d\)"),
        (lambda: PlainGP(torch.rand(4, 1), torch.full((4,), math.nan), RBFKernel()), ValueError, "NaN"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        working_copy(make())


def test_nothing_to_learn():
    model = PlainGP(*data(), RBFKernel()).requires_grad_(False)
    with pytest.raises(ValueError, match="0 hyperparameters"):
        Hyperparameters(working_copy(model))


def test_noise_of_several_kinds_is_learned():
    x, y = data()
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.full_like(y, 0.1), learn_additional_noise=True)
    model = PlainGP(x, y, ScaleKernel(RBFKernel()), likelihood)
    names = [c.public_name for c in Hyperparameters(working_copy(model)).coordinates.each]
    assert names[0] == "likelihood.second_noise_covar.noise"


def test_targets_of_several_models_are_refused():
    x, y = data(6)
    with pytest.raises(ValueError, match=r"Expected targets \(6,\) or \(6, C\).*got \(2, 6\)"):
        working_copy(PlainGP(x, torch.stack([y, y]), RBFKernel()))


class Growing(gpytorch.likelihoods.GaussianLikelihood):
    """Noise σ² exp(x): it depends on the inputs, as that of GPyTorch's HeteroskedasticNoise does."""

    def __init__(self):
        super().__init__(noise_constraint=Positive())

    def marginal(self, function, *inputs, **kwargs):
        (x,) = inputs if torch.is_tensor(inputs[0]) else inputs[0]
        noise = DiagLinearOperator(self.noise * x.squeeze(-1).exp())
        return type(function)(function.mean, function.lazy_covariance_matrix + noise)


def test_noise_that_depends_on_the_inputs():
    x, y = data()
    net = adapted.network(inputs=1)
    model = PlainGP(x, y, ScaleKernel(NTKKernel(net)), Growing())
    hyperparameters = Hyperparameters(working_copy(model))
    u = torch.tensor([-2.0, 0.3], dtype=torch.float64)
    noise, scale = u.exp()
    covariance = scale * adapted.reference_kernel(net, x) + torch.diag(noise * x.squeeze(-1).exp())
    expected = torch.distributions.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item()
    assert hyperparameters.value(u) == pytest.approx(expected, abs=1e-9)
    assert hyperparameters.log_density(u)[0] == pytest.approx(expected, abs=1e-9)
