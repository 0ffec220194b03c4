"""Marginal likelihoods of sums of scaled kernels: whether they are GPyTorch's, and which models are of that form."""

import math

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.means import ConstantMean

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


SERVED = {
    "stationary": lambda: model_with(ScaleKernel(RBFKernel())),
    "a kernel alone": lambda: model_with(RBFKernel()),
    "nothing scaled": lambda: model_with(NTKKernel(NETWORK) + RBFKernel()),
    "scaled twice": lambda: model_with(ScaleKernel(ScaleKernel(NTKKernel(NETWORK)) + ScaleKernel(MaternKernel()))),
    "columns": lambda: model_with(NTKKernel(NETWORK) + ScaleKernel(RBFKernel(active_dims=(0, 2)))),
    "products": lambda: model_with(ScaleKernel(NTKKernel(NETWORK) * RBFKernel()) + ScaleKernel(LinearKernel())),
    "layers": lambda: model_with(NTKKernel(NETWORK, variance_groups="layer") + ScaleKernel(RBFKernel())),
    "gain and metric": lambda: model_with(GainKernel(NETWORK) + ScaleKernel(TangentRBFKernel(NETWORK))),
    "priors": with_priors,
    "AdaptedGP": lambda: AdaptedGP(*adapted.data(9), NETWORK),
    "in float32": lambda: AdaptedGP(*(t.float() for t in adapted.data(9)), NETWORK),
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
    """One that has a parameter of another module's, and does not say so."""

    def __init__(self, lender: ScaleKernel):
        super().__init__()
        self._lender = [lender]

    def forward(self, x1, x2, diag=False, **params):
        matrix = self._lender[0].outputscale * (x1 @ x2.mT)
        return matrix.diagonal(dim1=-2, dim2=-1) if diag else matrix


def borrowing() -> PlainGP:
    lender = ScaleKernel(RBFKernel())
    return model_with(lender + Borrowing(lender))


def missing() -> PlainGP:
    model = SERVED["stationary"]()
    model.train_targets[2] = math.nan
    return model


NOT_SERVED = {
    "linear in the weights": lambda: model_with(ScaleKernel(NTKKernel(NETWORK)) + GainKernel(NETWORK)),
    "a trained mean": lambda: PlainGP(*one_input(), ScaleKernel(RBFKernel()), mean=ConstantMean()),
    "noise of each point": lambda: PlainGP(
        *one_input(), ScaleKernel(RBFKernel()), FixedNoiseGaussianLikelihood(torch.full((12,), 0.1))
    ),
    "columns of all": lambda: model_with(ScaleKernel(RBFKernel(active_dims=(0, 1)))),
    "transformed inputs": lambda: Transformed(*one_input(), ScaleKernel(RBFKernel())),
    "a matrix that is multiplied": lambda: Multiplied(*one_input(), ScaleKernel(RBFKernel())),
    "a parameter of another module": borrowing,
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_other_models_are_left_to_gpytorch(name):
    hyperparameters = Hyperparameters(working_copy(NOT_SERVED[name]()))
    assert hyperparameters._sum_of_kernels is None
    assert math.isfinite(hyperparameters.value(hyperparameters.present()))


def test_missing_targets_are_left_to_gpytorch():
    with gpytorch.settings.observation_nan_policy("mask"):
        hyperparameters = Hyperparameters(working_copy(missing()))
        assert hyperparameters._sum_of_kernels is None
        assert math.isfinite(hyperparameters.value(hyperparameters.present()))


def test_many_points_are_left_to_gpytorch(monkeypatch):
    monkeypatch.setattr(marginal_likelihood, "_LARGEST", 8)
    assert SumOfKernels.of(working_copy(SERVED["stationary"]()).train()) is None


def test_a_small_budget_is_kept():
    model = working_copy(SERVED["AdaptedGP"]()).train()
    assert SumOfKernels.of(model) is not None
    with settings.memory_budget(8 * 9**2 * 3):
        assert SumOfKernels.of(model) is None
