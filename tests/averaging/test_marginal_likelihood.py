"""Marginal likelihoods of sums of scaled kernels: whether they are GPyTorch's, and which models are of that form."""

import math

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.mlls import AddedLossTerm

from ntk_gp import AdaptedGP, GainKernel, NetworkMean, NTKKernel, TangentRBFKernel, settings
from ntk_gp.averaging import marginal_likelihood
from ntk_gp.averaging.marginal_likelihood import SumOfKernels
from ntk_gp.averaging.unconstrained import Hyperparameters, working_copy
from ntk_gp.priors import scale_to_data
from tests import adapted
from tests.averaging.models import PlainGP
from tests.averaging.models import data as one_input

pytestmark = pytest.mark.engine_independent
NETWORK = adapted.network()


def model_with(kernel: Kernel, n: int = 9) -> PlainGP:
    return PlainGP(*adapted.data(n), kernel, mean=NetworkMean(NETWORK))


def with_priors() -> PlainGP:
    model = model_with(ScaleKernel(NTKKernel(NETWORK)) + ScaleKernel(MaternKernel(ard_num_dims=3)))
    scale_to_data(model)
    model.covar_module.kernels[1].base_kernel.register_prior(
        "p", gpytorch.priors.GammaPrior(2.0, 1.0), "raw_lengthscale"
    )
    return model


def shared() -> PlainGP:
    kernel = RBFKernel()
    return model_with(ScaleKernel(kernel) + ScaleKernel(kernel * NTKKernel(NETWORK)))


def nested_columns() -> PlainGP:
    inner = ScaleKernel(RBFKernel(active_dims=(1,))) + MaternKernel()
    inner.active_dims = torch.tensor([0, 2])  # of which the first sees the last
    return model_with(NTKKernel(NETWORK) + inner)


SERVED = {
    "stationary": lambda: model_with(ScaleKernel(RBFKernel())),
    "a kernel alone": lambda: model_with(RBFKernel()),
    "nothing scaled": lambda: model_with(NTKKernel(NETWORK) + RBFKernel()),
    "scaled twice": lambda: model_with(ScaleKernel(ScaleKernel(NTKKernel(NETWORK)) + ScaleKernel(MaternKernel()))),
    "columns": lambda: model_with(NTKKernel(NETWORK) + ScaleKernel(RBFKernel(active_dims=(0, 2)))),
    "columns of columns": nested_columns,
    "products": lambda: model_with(ScaleKernel(NTKKernel(NETWORK) * RBFKernel()) + ScaleKernel(LinearKernel())),
    "layers": lambda: model_with(NTKKernel(NETWORK, variance_groups="layer") + ScaleKernel(RBFKernel())),
    "gain and metric": lambda: model_with(GainKernel(NETWORK) + ScaleKernel(TangentRBFKernel(NETWORK))),
    "priors": with_priors,
    "AdaptedGP": lambda: AdaptedGP(*adapted.data(9), NETWORK),
    "in float32": lambda: AdaptedGP(*(t.float() for t in adapted.data(9)), NETWORK),
    "a shared kernel": shared,
    "one point": lambda: model_with(ScaleKernel(NTKKernel(NETWORK)) + ScaleKernel(RBFKernel()), n=1),
}


@pytest.mark.parametrize("name", SERVED)
def test_is_gpytorchs(name):
    """Value and gradient, at several places; and the model is left as it was."""
    hyperparameters = Hyperparameters(working_copy(SERVED[name]()))
    reference = Hyperparameters(working_copy(SERVED[name]()))
    reference._sum_of_kernels = None
    u = hyperparameters.present()
    before = [parameter.clone() for parameter in hyperparameters.parameters]
    assert isinstance(hyperparameters._sum_of_kernels, SumOfKernels)
    assert all(map(torch.equal, before, hyperparameters.parameters))
    for seed in range(3):
        place = u + 0.7 * torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(seed))
        (value, gradient), (expected, expected_gradient) = (
            each.log_density(place) for each in (hyperparameters, reference)
        )
        assert value == pytest.approx(expected, rel=1e-10)
        assert hyperparameters.value(place) == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)


def test_what_is_not_trained_is_evaluated_once(monkeypatch):
    """The network's matrices of an AdaptedGP are not asked for at each step."""
    hyperparameters = Hyperparameters(working_copy(SERVED["AdaptedGP"]()))
    u = hyperparameters.present()
    hyperparameters.value(u)
    calls = []
    forward = NTKKernel.forward
    monkeypatch.setattr(NTKKernel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    hyperparameters.log_density(u)
    assert not calls


def test_no_setting_of_gpytorchs_is_switched(monkeypatch):
    """Other threads would meet it: lazy evaluation is off while GPyTorch evaluates a kernel."""
    hyperparameters = Hyperparameters(working_copy(SERVED["AdaptedGP"]()))
    u = hyperparameters.present()
    assert isinstance(hyperparameters._sum_of_kernels, SumOfKernels)
    switched = []
    monkeypatch.setattr(
        gpytorch.settings.lazily_evaluate_kernels, "_set_state", classmethod(lambda cls, state: switched.append(state))
    )
    value, _ = hyperparameters.log_density(u)
    assert math.isfinite(value)
    assert switched == []


class Transformed(PlainGP):
    """Inputs that a hyperparameter stretches."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_parameter("stretch", torch.nn.Parameter(torch.ones((), dtype=torch.float64)))

    def forward(self, x):
        return super().forward(x * self.stretch)


class Multiplied(Transformed):
    def forward(self, x):
        prior = PlainGP.forward(self, x)
        return MultivariateNormal(prior.mean, prior.lazy_covariance_matrix * self.stretch)


class Borrowing(Kernel):
    """One that has a parameter of another module's, and does not say so: from a threshold on, which may be further than
    where this is tried; and with a graph, or without one."""

    def __init__(self, lender: ScaleKernel, threshold: float = 0.0, detached: bool = False):
        super().__init__()
        self._lender, self._threshold, self._detached = [lender], threshold, detached

    def forward(self, x1, x2, diag=False, **params):
        scale = self._lender[0].outputscale
        scale = scale.detach() if self._detached else scale
        matrix = (scale - self._threshold).relu() * (x1 @ x2.mT)
        return matrix.diagonal(dim1=-2, dim2=-1) if diag else matrix


def borrowing(**options) -> PlainGP:
    lender = ScaleKernel(RBFKernel())
    return model_with(lender + Borrowing(lender, **options))


def missing() -> PlainGP:
    model = SERVED["stationary"]()
    model.train_targets[2] = math.nan
    return model


class Several(PlainGP):
    """Of the class that multitask models are of."""

    def forward(self, x):
        return MultitaskMultivariateNormal.from_batch_mvn(
            MultivariateNormal(torch.zeros(1, len(x)).to(x), self.covar_module(x).to_dense().unsqueeze(0))
        )


class Weighed(AddedLossTerm):
    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def loss(self, *_):
        return self.kernel.outputscale.sum()


class WithAnotherTerm(PlainGP):
    """One beside the marginal likelihood."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_added_loss_term("more")
        self.update_added_loss_term("more", Weighed(self.covar_module))


# Those that can be told by how they look; `SumOfKernels.of` refuses them itself.
NOT_SERVED = {
    "a trained mean": lambda: PlainGP(*one_input(), ScaleKernel(RBFKernel()), mean=ConstantMean()),
    "noise of each point": lambda: PlainGP(
        *one_input(), ScaleKernel(RBFKernel()), FixedNoiseGaussianLikelihood(torch.full((12,), 0.1))
    ),
    "columns of all": lambda: model_with(ScaleKernel(RBFKernel(active_dims=(0, 1)))),
    "transformed inputs": lambda: Transformed(*one_input(), ScaleKernel(RBFKernel())),
    "a matrix that is multiplied": lambda: Multiplied(*one_input(), ScaleKernel(RBFKernel())),
    "noise in a batch": lambda: PlainGP(
        *one_input(), ScaleKernel(RBFKernel()), GaussianLikelihood(batch_shape=torch.Size([1]))
    ),
    "a mean in a batch": lambda: PlainGP(
        *one_input(), ScaleKernel(RBFKernel()), mean=ConstantMean(batch_shape=torch.Size([1])).requires_grad_(False)
    ),
    "kernels in a batch": lambda: model_with(ScaleKernel(RBFKernel(batch_shape=torch.Size([1])))),
    "another term": lambda: WithAnotherTerm(*one_input(), ScaleKernel(RBFKernel())),
    "several outputs": lambda: Several(*one_input(), ScaleKernel(RBFKernel())),
    "missing targets": missing,
}

# Others are found out when they are tried, or serve: GPyTorch's value is what counts.
UNUSUAL = {
    "a parameter of another module": borrowing,
    "one that shows later": lambda: borrowing(threshold=2.0),
    "one without a graph": lambda: borrowing(detached=True),
    "lengthscales for other columns": lambda: model_with(ScaleKernel(RBFKernel(ard_num_dims=1))),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_other_models_are_left_to_gpytorch(name):
    with gpytorch.settings.observation_nan_policy("mask"):
        assert SumOfKernels.of(working_copy(NOT_SERVED[name]()).train()) is None


def test_a_linear_model_is_left_to_its_spectrum():
    model = model_with(ScaleKernel(NTKKernel(NETWORK)) + GainKernel(NETWORK))
    assert Hyperparameters(working_copy(model))._sum_of_kernels is None


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models_have_gpytorchs_likelihood(name):
    hyperparameters = Hyperparameters(working_copy(UNUSUAL[name]()))
    reference = Hyperparameters(working_copy(UNUSUAL[name]()))
    reference._sum_of_kernels = None
    for shift in (0.0, 2.5):
        u = hyperparameters.present() + shift
        value, gradient = hyperparameters.log_density(u)
        expected, expected_gradient = reference.log_density(u)
        assert value == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-8)


def test_many_points_are_left_to_gpytorch(monkeypatch):
    monkeypatch.setattr(marginal_likelihood, "_LARGEST", 8)
    assert SumOfKernels.of(working_copy(SERVED["stationary"]()).train()) is None


def test_a_small_budget_is_kept():
    model = working_copy(SERVED["AdaptedGP"]()).train()
    assert SumOfKernels.of(model) is not None
    with settings.memory_budget(8 * 9**2 * 3):
        assert SumOfKernels.of(model) is None
