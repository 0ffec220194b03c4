"""The ready model: what it is put together from, fitting, predicting, and serving BoTorch."""

import copy
import math
import pickle
import warnings

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import nn

from ntk_gp import AdaptedGP, averaged
from ntk_gp.testing import explicit_jacobian
from tests import adapted, references

pytestmark = [pytest.mark.engine_independent, pytest.mark.costly]
TERMS = ("gain", "tangent", "inputs", "features", "metric")


def make(n: int = 12, dtype: torch.dtype = torch.float64, **options) -> AdaptedGP:
    x, y = adapted.data(n)
    return AdaptedGP(x.to(dtype), y.to(dtype), adapted.network(), **options)


def matern(distances: torch.Tensor) -> torch.Tensor:
    scaled = 3**0.5 * distances
    return (1 + scaled) * (-scaled).exp()


def median_of_pairs(distances: torch.Tensor) -> torch.Tensor:
    return distances[torch.ones_like(distances, dtype=torch.bool).triu(1)].median()


def test_the_prior_is_the_recipe():
    """Each term written out with explicit Jacobians and features, scaled by its share of v₀ or v₁."""
    model, network = make(), adapted.network()
    x, y = model.train_inputs[0], model.train_targets
    f = network(x).squeeze(-1).detach()
    v0 = (y - f).square().mean()
    v1 = adapted.beyond_gain_and_offset(f, y - f)
    jacobian = explicit_jacobian(network, x)
    jacobian = jacobian.reshape(len(x), -1)
    tangent = jacobian @ jacobian.T
    torch.testing.assert_close(tangent, references.kernel(network, x), rtol=1e-10, atol=1e-10)
    features = network[1](network[0](x)).detach()
    metrics = {
        "inputs": torch.cdist(x, x),
        "features": torch.cdist(features, features),
        "metric": torch.cdist(jacobian, jacobian),
    }
    expected = {
        "gain": 0.3 * v0 * (f[:, None] * f / f.square().mean() + 1),
        "tangent": v1 * tangent / tangent.diagonal().mean(),
        **{name: 0.1 * v1 * matern(d / median_of_pairs(d)) for name, d in metrics.items()},
    }
    assert model.terms == TERMS == tuple(expected)
    for name, matrix in expected.items():
        adapted.assert_close(model.term(name)(x).to_dense().detach(), matrix, 1e-5)
    adapted.assert_close(model(x).covariance_matrix.detach(), sum(expected.values()), 1e-5)
    adapted.assert_close(model(x).mean, f)
    assert model.likelihood.noise.item() == pytest.approx(0.1 * v1.item(), rel=1e-6)
    assert model.unexplained == pytest.approx(v0.item())


def test_priors():
    widths = {name: prior.scale.item() for name, _, prior, _, _ in make().named_priors()}
    assert len(widths) == 10
    for name, width in widths.items():
        assert width == (1.0 if "lengthscale" in name else 1.5), name


def objective(model: AdaptedGP) -> float:
    model.train()
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    return mll(model(*model.train_inputs), model.train_targets).item()


def test_fit_finds_the_mode_of_gpytorchs_objective():
    """The gradient there is zero, and GPyTorch's own loop from elsewhere gets no higher."""
    model = make()
    before = objective(model)
    assert model.fit() is model
    assert not model.training
    found = objective(model)
    assert found > before
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    gradients = torch.autograd.grad(mll(model(*model.train_inputs), model.train_targets), list(model.parameters()))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-5
    other = make()
    optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = -ExactMarginalLogLikelihood(other.likelihood, other)(other(*other.train_inputs), other.train_targets)
        loss.backward()
        optimizer.step()
    assert objective(other) <= found + 1e-6
    assert objective(other) == pytest.approx(found, abs=1e-3)


def test_fit_says_where_it_has_not_converged(monkeypatch):
    from ntk_gp.averaging import optimum

    model = make()
    monkeypatch.setattr("ntk_gp.adapted.best", lambda density, starts: optimum.maximise(density, starts[0], 1))
    with pytest.warns(RuntimeWarning, match="not converged"):
        model.fit()


def test_predictions_are_averaged():
    model = make()
    z = adapted.data(6, seed=4)[0]
    expected = averaged(model, draws=8, seed=0).predict(z)
    prediction = model.predict(z, draws=8)
    torch.testing.assert_close(prediction.mean, expected.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(prediction.variance, expected.variance, rtol=0, atol=1e-10)


def test_the_average_is_kept_until_something_changes():
    model = make(terms=("gain", "inputs"))
    first = model.averaged(4)
    assert model.averaged(4) is first
    model.predict(adapted.data(3)[0], draws=4)
    assert model.averaged(4) is first
    assert model.averaged(5) is not first
    first = model.averaged(4)
    model.fit()
    second = model.averaged(4)
    assert second is not first
    model.set_train_data(targets=model.train_targets + 0.1)
    assert model.averaged(4) is not second
    third = model.averaged(4)
    other = adapted.network(seed=3)
    model.mean_module.linearize(other)
    assert model.averaged(4) is not third


@pytest.mark.parametrize(
    ("n", "dtype"), [(1, torch.float64), (2, torch.float32), pytest.param(5, torch.float32, marks=pytest.mark.thorough)]
)
def test_few_points(n, dtype):
    model = make(n, dtype).fit()
    z = adapted.data(4, seed=2)[0].to(dtype)
    prediction = model.predict(z, draws=8)
    assert prediction.mean.dtype == dtype
    for value in (prediction.mean, prediction.stddev, prediction.quantile(0.9)):
        assert value.isfinite().all()
    assert (prediction.variance > 0).all()
    assert model.likelihood(model(z)).mean.dtype == dtype


@pytest.mark.parametrize("scale", [1e-5, pytest.param(1e5, marks=pytest.mark.thorough)])
def test_units_of_the_targets(scale):
    """A network and targets in other units give the same predictions in these."""
    x, y = adapted.data(10)
    network = adapted.network()
    with torch.no_grad():
        network[2].weight.mul_(scale)
        network[2].bias.mul_(scale)
    z = adapted.data(5, seed=1)[0]
    terms = ("gain", "inputs", "features")  # the tangent kernel of the last layer does not follow its scale
    prediction = AdaptedGP(x, scale * y, network, terms=terms).fit().predict(z, draws=4)
    expected = AdaptedGP(x, y, adapted.network(), terms=terms).fit().predict(z, draws=4)
    torch.testing.assert_close(prediction.mean / scale, expected.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prediction.stddev / scale, expected.stddev, rtol=1e-3, atol=1e-4)


def test_constant_targets():
    x, _ = adapted.data(8)
    model = AdaptedGP(x, torch.full((8,), 2.0).double(), adapted.network()).fit()
    prediction = model.predict(x, draws=8)
    assert (prediction.mean - 2.0).abs().max() < 0.3


def test_the_users_network_stays_as_it_is():
    network = adapted.network().float().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x, y = adapted.data(8)
    AdaptedGP(x, y, network).fit().predict(x, draws=4)
    assert network.training
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies(again):
    model = make(source_inputs=(-1.0, 1.0), terms=("gain", "tangent")).fit()
    z = adapted.data(3, seed=1)[0]
    expected = model.predict(z, draws=4)
    other = again(model)
    assert other._average is None
    torch.testing.assert_close(other.predict(z, draws=4).mean, expected.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(other(z).mean, model(z).mean, rtol=0, atol=1e-9)
    fresh = make(source_inputs=(-1.0, 1.0), terms=("gain", "tangent"))
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh.eval()(z).mean, model(z).mean, rtol=0, atol=1e-9)


def test_conversion():
    model = make(dtype=torch.float32).double().fit()
    z = adapted.data(3, seed=1)[0]
    assert model(z).mean.dtype == model.predict(z, draws=4).mean.dtype == torch.float64


def test_inputs_of_a_shape():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(7, 1, 4, 4, dtype=torch.float64)
    model = AdaptedGP(x, x.sum((1, 2, 3)), network, input_shape=(1, 4, 4), source_inputs=x).fit()
    assert model.train_inputs[0].shape == (7, 16)
    shaped, flat = model.predict(x[:2] + 0.1, draws=4), model.predict(x[:2].flatten(1) + 0.1, draws=4)
    assert torch.equal(shaped.mean, flat.mean)
    assert torch.equal(model(x[:2] + 0.1).mean, model(x[:2].flatten(1) + 0.1).mean)
    assert not model.outside(x).any() and model.outside(x + 100).all()


def test_chosen_terms_output_parameters_and_likelihood():
    x, y = adapted.data(9)
    network = adapted.network(outputs=2)
    likelihood = GaussianLikelihood(noise_constraint=GreaterThan(1e-3))
    model = AdaptedGP(
        x, y.unsqueeze(-1), network, terms=("tangent", "gain"), output=1, parameters="2.*", likelihood=likelihood
    )
    assert model.terms == ("tangent", "gain")
    assert model.likelihood is likelihood
    assert list(model.term("tangent").base_kernel.network.parameter_names) == ["2.weight", "2.bias"]
    adapted.assert_close(model(x).mean, network(x)[:, 1].detach())
    with pytest.raises(ValueError, match="no term 'metric'"):
        model.term("metric")


class Sum(nn.Module):
    """A network without layers: a factor of what its inputs add up to."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self, x):
        return (x * self.factor).sum(-1, keepdim=True)


def test_a_term_that_cannot_serve_is_left_out():
    x, y = adapted.data(9)
    with pytest.warns(UserWarning, match="'features' is left out"):
        model = AdaptedGP(x, y, Sum())
    assert model.terms == ("gain", "tangent", "inputs", "metric")
    model.fit().predict(x, draws=4)
    network = adapted.network()
    with torch.no_grad():
        network[2].weight.zero_()
        network[2].bias.zero_()
    with pytest.warns(UserWarning, match="'gain' is left out: the network is zero"):
        assert "gain" not in AdaptedGP(x, y, network).terms
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="No term is left"):
        AdaptedGP(x, y, Sum(), terms=["features"])


class TestOutside:
    def test_of_inputs(self):
        source = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
        model = make(source_inputs=source)
        x = torch.tensor([[0.5, 1.9, 0.5], [1.04, -0.09, 1.0], [1.06, 1.0, 0.5], [0.5, 2.2, 0.5]], dtype=torch.float64)
        assert model.outside(x).tolist() == [False, False, True, True]
        assert model.outside(x.expand(2, 4, 3)).shape == (2, 4)

    def test_of_a_range(self):
        model = make(source_inputs=(-1.0, [1.0, 2.0, 3.0]))
        x = torch.tensor([[0.0, 1.5, 2.9], [0.0, 2.5, 0.0]], dtype=torch.float64)
        assert model.outside(x).tolist() == [False, True]

    def test_predictions_warn_if_asked(self):
        model = make(source_inputs=(-1.0, 1.0))
        x = torch.zeros(3, 3, dtype=torch.float64)
        x[1] = 5.0
        with pytest.warns(UserWarning, match="1 of 3 inputs are outside .* row 1"):
            model.predict(x, draws=4, warn_outside=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.predict(x, draws=4)

    def test_refusals(self):
        with pytest.raises(ValueError, match="source_inputs="):
            make().outside(torch.zeros(1, 3).double())
        for source in (torch.rand(4, 2), (1.0, -1.0)):
            with pytest.raises(ValueError, match=r"source_inputs \(m, 3\)"):
                make(source_inputs=source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:-1]), "targets"),
        (lambda x, y: (x[:0], y[:0]), "n > 0"),
        (lambda x, y: (x.expand(2, 9, 3), y.expand(2, 9)), "for each batch"),
        (lambda x, y: (x, y.unsqueeze(-1).expand(9, 2)), "several outputs"),
        (
            lambda x, y: (x, y.index_fill(0, torch.tensor([4]), math.nan)),
            r"1 targets are NaN or infinite, first at \[4\]",
        ),
        (lambda x, y: (x, adapted.network()(x).squeeze(-1).detach()), "explains the targets exactly"),
    ],
)
def test_data_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdaptedGP(*change(*adapted.data(9)), adapted.network())


@pytest.mark.parametrize("terms", [(), ("gain", "gain"), ("gain", "matern"), "all"])
def test_terms_that_are_refused(terms):
    with pytest.raises(ValueError, match="Expected some of the terms"):
        make(terms=terms)


def test_it_is_the_fifteen_lines():
    """What its documentation shows to be the same."""
    from ntk_gp import FeatureKernel, GainKernel, NetworkMean, NTKKernel, TangentMaternKernel, scale_to_data

    class Recipe(gpytorch.models.ExactGP):
        def __init__(self, x, y, network):
            super().__init__(x, y, GaussianLikelihood(noise_constraint=gpytorch.constraints.Positive()))
            self.mean_module = NetworkMean(network)
            self.covar_module = (
                GainKernel(network)
                + ScaleKernel(NTKKernel(network, normalize=True))
                + ScaleKernel(MaternKernel(nu=1.5))
                + ScaleKernel(FeatureKernel(network, MaternKernel(nu=1.5)))
                + ScaleKernel(TangentMaternKernel(network, nu=1.5))
            )

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    x, y = adapted.data(12)
    written = Recipe(x, y, adapted.network()).double()
    scale_to_data(written, noise=0.1, shares=[0.6, 1.0, 0.1, 0.1, 0.1], width=1.5)
    model = make()
    lengthscale = model.term("inputs").base_kernel.lengthscale.item()
    written.covar_module.kernels[2].base_kernel.lengthscale = lengthscale
    adapted.assert_close(written(x).covariance_matrix.detach(), model(x).covariance_matrix.detach(), 1e-6)


class TestBotorch:
    @pytest.fixture(autouse=True)
    def needs_botorch(self):
        pytest.importorskip("botorch")

    def test_posterior(self):
        model = make().fit()
        z = adapted.data(4, seed=1)[0]
        posterior = model.posterior(z)
        expected = model(z)
        torch.testing.assert_close(posterior.mean.squeeze(-1), expected.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(posterior.variance.squeeze(-1), expected.variance, rtol=0, atol=1e-10)
        noisy = model.posterior(z, observation_noise=True)
        torch.testing.assert_close(noisy.variance - posterior.variance, model.likelihood.noise.expand(4, 1).detach())
        batched = model.posterior(z.expand(3, 4, 3))
        assert batched.mean.shape == (3, 4, 1)
        adapted.assert_close(batched.mean[1], posterior.mean)

    @pytest.mark.parametrize("q", [1, 2])
    def test_acquisition_functions(self, q):
        from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
        from botorch.optim import optimize_acqf

        model = make().fit()
        best = model.train_targets.max()
        if q == 1:
            acquisition = LogExpectedImprovement(model, best_f=best)
        else:
            acquisition = qLogExpectedImprovement(model, best_f=best)
        bounds = torch.tensor([[-1.0] * 3, [1.0] * 3], dtype=torch.float64)
        torch.manual_seed(0)
        candidates, value = optimize_acqf(acquisition, bounds, q=q, num_restarts=2, raw_samples=16)
        assert candidates.shape == (q, 3)
        grid = 2 * torch.rand(32, q, 3, dtype=torch.float64) - 1
        with torch.no_grad():
            assert value >= acquisition(grid).max() - 1e-6

    def test_gradients_of_an_acquisition_function(self):
        from botorch.acquisition import LogExpectedImprovement

        acquisition = LogExpectedImprovement(make().fit(), best_f=0.5)
        z = torch.randn(2, 1, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(acquisition, (z,), atol=1e-5, fast_mode=True)

    def test_fit_gpytorch_mll(self):
        from botorch.fit import fit_gpytorch_mll

        model, other = make(), make().fit()
        fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        assert objective(model) == pytest.approx(objective(other), abs=1e-4)

    def test_condition_on_observations(self):
        model = make().fit()
        new_x, new_y = adapted.data(2, seed=7)
        z = adapted.data(4, seed=1)[0]
        conditioned = model.condition_on_observations(new_x, new_y.unsqueeze(-1))
        expected = copy.deepcopy(model)
        x, y = model.train_inputs[0], model.train_targets
        expected.set_train_data(torch.cat([x, new_x]), torch.cat([y, new_y]), strict=False)
        torch.testing.assert_close(conditioned.posterior(z).mean, expected.posterior(z).mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(conditioned.posterior(z).variance, expected.posterior(z).variance, rtol=0, atol=1e-7)


def test_the_core_does_not_import_botorch():
    import subprocess
    import sys

    code = (
        "import sys, torch, ntk_gp\n"
        "network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))\n"
        "x = torch.rand(5, 1)\n"
        "ntk_gp.AdaptedGP(x, x.squeeze(-1), network, terms='gain').fit().predict(x, draws=2)\n"
        "assert 'botorch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
