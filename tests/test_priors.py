"""Priors on logarithms, and values that are scaled to the data."""

import copy
import math
import pickle

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, Positive
from gpytorch.kernels import ConstantKernel, LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior

from ntk_gp import FeatureKernel, GainKernel, NetworkMean, NTKKernel, TangentMaternKernel
from ntk_gp.priors import register_log_prior, scale_to_data, unexplained_variance
from tests import adapted, references

pytestmark = pytest.mark.engine_independent
EXP = Positive(transform=torch.exp, inv_transform=torch.log)

MODULES = {
    "noise": (lambda: GaussianLikelihood(), "noise", 0.3),
    "small noise": (lambda: GaussianLikelihood(noise_constraint=Positive()), "noise", 1e-9),
    "noise near its bound": (lambda: GaussianLikelihood(), "noise", 1.1e-4),
    "outputscale": (lambda: ScaleKernel(RBFKernel()), "outputscale", 5.0),
    "exponentials": (lambda: ScaleKernel(RBFKernel(), outputscale_constraint=EXP), "outputscale", 5.0),
    "interval": (lambda: ScaleKernel(RBFKernel(), outputscale_constraint=Interval(0.1, 9.0)), "outputscale", 5.0),
    "lengthscale": (lambda: RBFKernel(), "lengthscale", 0.2),
    "ARD": (lambda: RBFKernel(ard_num_dims=3), "lengthscale", torch.tensor([0.1, 1.0, 10.0])),
    "one value for ARD": (lambda: MaternKernel(ard_num_dims=3), "lengthscale", 0.7),
    "batch": (
        lambda: ScaleKernel(RBFKernel(), batch_shape=torch.Size([2])),
        "outputscale",
        torch.tensor([0.5, 2.0]),
    ),
    "groups": (lambda: NTKKernel(adapted.network(), variance_groups="layer"), "variance", torch.tensor([1e-3, 1e2])),
    "gain": (lambda: GainKernel(adapted.network()), "gain_variance", 0.02),
    "offset": (lambda: GainKernel(adapted.network()), "offset_variance", 30.0),
    "metric": (lambda: TangentMaternKernel(adapted.network()), "lengthscale", 4.0),
}


def made(case: str, width: float = 1.5):
    make, name, value = MODULES[case]
    module = make().double()
    register_log_prior(module, name, value, width)
    return module, name, torch.as_tensor(value, dtype=torch.float64).expand_as(getattr(module, name))


def log_prior(module) -> torch.Tensor:
    """As GPyTorch adds it to its objective."""
    return sum(prior.log_prob(closure(owner)).sum() for _, owner, prior, closure, _ in module.named_priors())


@pytest.mark.parametrize("case", MODULES)
def test_the_value_is_set(case):
    module, name, value = made(case)
    torch.testing.assert_close(getattr(module, name).detach(), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", MODULES)
def test_the_mode_is_at_the_value(case):
    """Found from elsewhere by maximising what GPyTorch's loop maximises, in the raw parameters."""
    module, name, value = made(case, width=0.5)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.2)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -log_prior(module)
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(getattr(module, name).detach(), value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", ["noise", "ARD", "groups", "gain"])
def test_the_median_is_at_the_value(case):
    """Half of the draws from the prior are below, within four standard errors of 1000; their logarithms' width is
    right within the same."""
    module, name, value = made(case, width=0.8)
    torch.manual_seed(0)
    (prior_name,) = [key for key in dict(module.named_children()) if key.endswith("_prior")]
    draws = []
    for _ in range(1000):
        module.sample_from_prior(prior_name)
        draws.append(getattr(module, name).detach().clone())
    draws = (torch.stack(draws) / value).log()
    if name == "noise":  # not below its constraint
        assert (draws > math.log(1e-4 / 0.3)).all()
    assert ((draws < 0).double().mean(0) - 0.5).abs().max() < 4 * 0.5 / 1000**0.5
    assert (draws.std(0) / 0.8 - 1).abs().max() < 4 / 2000**0.5


@pytest.mark.parametrize("case", MODULES)
def test_pickle_deepcopy_and_state(case):
    module, name, value = made(case)
    density = log_prior(module).item()
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert log_prior(again).item() == pytest.approx(density)
        setattr(again, name, 2 * value if "interval" not in case else 1.5 * value)
        assert log_prior(again).item() != pytest.approx(density)
        assert log_prior(module).item() == pytest.approx(density)
    other = MODULES[case][0]().double()
    register_log_prior(other, name, MODULES[case][2], 0.1)
    other.load_state_dict(module.state_dict())
    assert log_prior(other).item() == pytest.approx(density)


def test_a_second_one_replaces_the_first():
    kernel = ScaleKernel(RBFKernel())
    register_log_prior(kernel, "outputscale", 1.0, 1.0)
    register_log_prior(kernel, "outputscale", 3.0, 0.5)
    ((_, _, prior, _, _),) = kernel.named_priors()
    assert (prior.loc.exp().item(), prior.scale.item()) == (pytest.approx(3.0), 0.5)


@pytest.mark.parametrize(
    ("module", "name", "value", "message"),
    [
        (GaussianLikelihood(), "noise", 1e-5, r"GreaterThan\(1.000E-04\).*noise_constraint=.*Positive"),
        (ScaleKernel(RBFKernel(), outputscale_constraint=Interval(0.1, 2.0)), "outputscale", 3.0, "Interval"),
        (RBFKernel(lengthscale_constraint=GreaterThan(1.0)), "lengthscale", 0.5, "GreaterThan"),
    ],
)
def test_values_outside_the_constraint(module, name, value, message):
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        register_log_prior(module, name, value, 1.0)
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert list(module.named_priors()) == []


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, torch.tensor([1.0, -1.0])])
def test_values_and_widths_that_are_not_positive(value):
    for arguments in ((value, 1.0), (1.0, value)):
        with pytest.raises(ValueError, match="positive and finite"):
            register_log_prior(RBFKernel(ard_num_dims=2), "lengthscale", *arguments)


def test_other_refusals():
    with pytest.raises(AttributeError, match="'outputscale'"):
        register_log_prior(RBFKernel(), "outputscale", 1.0, 1.0)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        register_log_prior(RBFKernel(ard_num_dims=2), "lengthscale", torch.ones(3), 1.0)
    kernel = ScaleKernel(RBFKernel(), outputscale_prior=GammaPrior(2.0, 1.0))
    with pytest.raises(ValueError, match="'outputscale_prior' already"):
        register_log_prior(kernel, "outputscale", 1.0, 1.0)
    likelihood = GaussianLikelihood(noise_prior=LogNormalPrior(0.0, 1.0))
    with pytest.raises(ValueError, match="noise_prior' already"):
        register_log_prior(likelihood, "noise", 1.0, 1.0)


# Scaled to the data.


def model_of(kernel, n: int = 14, scale: float = 10.0) -> adapted.AdaptedGP:
    x, y = adapted.data(n)
    return adapted.AdaptedGP(x, scale * y, adapted.network(), covar_module=kernel)


def kernels() -> list[tuple]:
    network = adapted.network()
    return [
        (ScaleKernel(NTKKernel(network)), None),
        (ScaleKernel(NTKKernel(network)) + ScaleKernel(MaternKernel(1.5, ard_num_dims=3)), None),
        (ScaleKernel(NTKKernel(network)) + ScaleKernel(RBFKernel()) + LinearKernel(), [1.0, 0.1, 0.3]),
        (NTKKernel(network, variance_groups="layer") + ConstantKernel(), [0.7, 0.2]),
        (GainKernel(network) + ScaleKernel(TangentMaternKernel(network)), [0.6, 0.1]),
        (ScaleKernel(FeatureKernel(network, MaternKernel(1.5))) + ScaleKernel(RBFKernel() * MaternKernel()), None),
        (ScaleKernel(RBFKernel()) * MaternKernel() + ScaleKernel(NTKKernel(network, normalize=True)), None),
    ]


@pytest.mark.parametrize("case", range(7))
def test_terms_contribute_their_shares(case):
    kernel, shares = kernels()[case]
    model = model_of(kernel.double())
    x, y = model.train_inputs[0], model.train_targets
    f = adapted.network()(x).squeeze(-1).detach()
    v0 = (y - f).square().mean().item()
    beyond = adapted.beyond_gain_and_offset(f, y - f).item() if case == 4 else v0
    assert scale_to_data(model, shares=shares) == pytest.approx(v0, rel=1e-12)
    assert model.likelihood.noise.item() == pytest.approx(0.01 * beyond, rel=1e-6)
    terms = list(kernel.kernels) if isinstance(kernel, gpytorch.kernels.AdditiveKernel) else [kernel]
    for term, share in zip(terms, shares or [1 / len(terms)] * len(terms), strict=True):
        scale = v0 if isinstance(term, GainKernel) else beyond
        assert term(x).to_dense().diagonal().mean().item() == pytest.approx(share * scale, rel=1e-6)
    for name, owner, prior, closure, _ in model.named_priors():
        torch.testing.assert_close(closure(owner), prior.loc.expand_as(closure(owner)), rtol=1e-6, atol=1e-6)
        assert prior.scale.unique().item() == (1.0 if "lengthscale" in name else 2.0)
    unset = [c for c in model.parameters() if c.requires_grad]
    assert len(unset) == len(list(model.named_priors()))


def test_the_tangent_kernels_scale_is_that_of_explicit_jacobians():
    model = model_of(ScaleKernel(NTKKernel(adapted.network())).double())
    v0 = scale_to_data(model)
    mean = references.kernel(adapted.network(), model.train_inputs[0]).diagonal().mean().item()
    assert model.covar_module.outputscale.item() == pytest.approx(v0 / mean, rel=1e-6)


@pytest.mark.parametrize("groups", ["layer", "parameter", {"2.*": "head", "bias": "bias"}])
def test_groups_contribute_equally(groups):
    """Each as much as the others, by explicit Jacobians, and together what one scale would."""
    kernel = NTKKernel(adapted.network(), variance_groups=groups).double()
    model = model_of(kernel)
    v0 = scale_to_data(model)
    jacobian = references.jacobian(adapted.network(), model.train_inputs[0])
    labels, names = kernel.network.specification.group_labels, kernel.network.group_names
    sizes = [kernel.network.get_buffer(f"tensors.{name}").numel() for name in kernel.network.parameter_names]
    diagonals = dict.fromkeys(names, 0.0)
    for piece, label in zip(jacobian.split(sizes, dim=-1), labels, strict=True):
        diagonals[label] += piece.square().sum(-1).mean().item()
    shares = kernel.variance.detach().flatten() * torch.tensor([diagonals[name] for name in names])
    torch.testing.assert_close(shares, torch.full_like(shares, v0 / len(names)), rtol=1e-6, atol=0)
    ((_, _, prior, closure, _),) = kernel.named_priors()
    torch.testing.assert_close(closure(kernel), prior.loc, rtol=1e-6, atol=1e-6)
    assert prior.loc.shape == (1, len(names))
    assert (prior.scale == 2.0).all()


def test_groups_without_influence_at_the_data():
    """A dead layer has the variance that would serve all groups, and the others the share of v₀."""
    network = adapted.network()
    network[1] = torch.nn.ReLU()
    with torch.no_grad():
        network[0].bias.fill_(-1e3)
    kernel = NTKKernel(network, variance_groups="parameter").double()
    model = model_of(kernel)
    model.mean_module = NetworkMean(network)
    v0 = scale_to_data(model)
    torch.testing.assert_close(kernel.variance.detach(), torch.full((1, 4), v0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("missing", [False, True])
def test_an_offset_says_nothing_of_the_other_scales(n, missing):
    """It is most of v₀ here. One or two points leave nothing beside gain and offset, and v₁ is v₀."""
    x, y = adapted.data(n + missing)
    f = adapted.network()(x).squeeze(-1).detach()
    y = f + 100.0 + 0.1 * y
    if missing:
        y[0] = torch.nan
    kernel = GainKernel(adapted.network()) + ScaleKernel(MaternKernel(1.5))
    model = adapted.AdaptedGP(x, y, adapted.network(), covar_module=kernel.double())
    with gpytorch.settings.observation_nan_policy("mask" if missing else "ignore"):
        v0 = scale_to_data(model, shares=[0.6, 1.0])
    expected = adapted.beyond_gain_and_offset(f[missing:], (y - f)[missing:]).item() if n > 2 else v0
    assert v0 == pytest.approx(1e4, rel=0.1)
    assert kernel.kernels[1].outputscale.item() == pytest.approx(expected, rel=1e-5)
    assert kernel.kernels[0].offset_variance.item() == pytest.approx(0.3 * v0, rel=1e-6)


def test_gain_and_offset_have_equal_parts():
    kernel = GainKernel(adapted.network()).double()
    model = model_of(kernel)
    v0 = scale_to_data(model, shares=[0.6])
    squares = adapted.network()(model.train_inputs[0]).square().mean().item()
    assert kernel.offset_variance.item() == pytest.approx(0.3 * v0, rel=1e-6)
    assert kernel.gain_variance.item() == pytest.approx(0.3 * v0 / squares, rel=1e-6)


def test_lengthscales_are_half_the_spread():
    network = adapted.network()
    metric = TangentMaternKernel(network)
    isotropic, ard, columns = RBFKernel(), RBFKernel(ard_num_dims=3), MaternKernel(active_dims=(0, 2))
    features = MaternKernel()
    feature_kernel = FeatureKernel(network, features)
    parts = [ScaleKernel(each) for each in (isotropic, ard, columns, metric, feature_kernel)]
    model = model_of(sum(parts[1:], parts[0]).double())
    x = model.train_inputs[0]
    scale_to_data(model)
    spread = x.amax(0) - x.amin(0)
    assert isotropic.lengthscale.item() == pytest.approx(spread.norm().item() / 2, rel=1e-6)
    torch.testing.assert_close(ard.lengthscale.detach()[0], 3**0.5 / 2 * spread, rtol=1e-6, atol=0)
    assert columns.lengthscale.item() == pytest.approx(spread[[0, 2]].norm().item() / 2, rel=1e-6)
    assert metric.lengthscale.item() == pytest.approx(metric.median_distance(x), rel=1e-6)
    assert features.lengthscale.item() == pytest.approx(feature_kernel.median_distance(x), rel=1e-6)


def test_what_has_a_prior_or_is_not_trained_stays():
    kernel = ScaleKernel(RBFKernel(lengthscale_prior=GammaPrior(3.0, 6.0))).double()
    model = model_of(kernel)
    model.likelihood.raw_noise.requires_grad_(False)
    lengthscale, noise = kernel.base_kernel.lengthscale.item(), model.likelihood.noise.item()
    scale_to_data(model)
    assert kernel.base_kernel.lengthscale.item() == lengthscale
    assert model.likelihood.noise.item() == noise
    assert len(list(model.named_priors())) == 2


@pytest.mark.parametrize("between", [lambda model: model, copy.deepcopy], ids=["itself", "a copy"])
def test_a_prior_of_ones_own_stays(between):
    model = model_of(ScaleKernel(RBFKernel()).double())
    register_log_prior(model.likelihood, "noise", 0.3, width=0.2)
    model = between(model)
    scale_to_data(model)
    scale_to_data(model)
    assert model.likelihood.noise.item() == pytest.approx(0.3)
    assert model.likelihood.log_noise_prior.scale.item() == pytest.approx(0.2)


def test_it_may_be_called_again():
    model = model_of(ScaleKernel(NTKKernel(adapted.network())).double())
    scale_to_data(model)
    before = model.covar_module.outputscale.item()
    model.set_train_data(targets=2 * model.train_targets)
    scale_to_data(model)
    assert model.covar_module.outputscale.item() > 2 * before
    assert len(list(model.named_priors())) == 2


def test_one_point():
    model = model_of(
        ScaleKernel(RBFKernel()).double() + ScaleKernel(TangentMaternKernel(adapted.network())).double(), n=1
    )
    lengthscale = model.covar_module.kernels[0].base_kernel.lengthscale.item()
    v0 = scale_to_data(model)
    assert model.covar_module.kernels[0].outputscale.item() == pytest.approx(v0 / 2)
    assert model.covar_module.kernels[0].base_kernel.lengthscale.item() == pytest.approx(lengthscale)


def test_several_outputs():
    x, y = adapted.data(10, outputs=2)
    network = adapted.network(outputs=2)
    kernel = ScaleKernel(NTKKernel(network, output="all")).double()
    likelihood = MultitaskGaussianLikelihood(num_tasks=2, rank=0).double()
    model = adapted.AdaptedGP(x, y, network, kernel, likelihood, output="all")
    v0 = scale_to_data(model, noise=0.1)
    assert v0 == pytest.approx((y - network(x)).square().mean().item(), rel=1e-12)
    noise = likelihood(model(x)).covariance_matrix - model(x).covariance_matrix
    torch.testing.assert_close(noise.diagonal().detach(), torch.full((20,), 0.1 * v0).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda: RBFKernel(), "RBFKernel has no scale"),
        (lambda: ScaleKernel(RBFKernel()) + NTKKernel(adapted.network()), "NTKKernel has no scale"),
        (lambda: ScaleKernel(ScaleKernel(RBFKernel()) + ScaleKernel(MaternKernel())), "another scale"),
        (lambda: ScaleKernel(RBFKernel()) * ScaleKernel(MaternKernel()), "2 scales"),
        (lambda: ScaleKernel(RBFKernel(), batch_shape=torch.Size([2])), "without batches"),
    ],
)
def test_kernels_that_are_refused(kernel, message):
    model = model_of(kernel().double())
    with pytest.raises(ValueError, match=message):
        scale_to_data(model)


def test_data_that_are_refused():
    model = model_of(ScaleKernel(RBFKernel()).double())
    x, y = model.train_inputs[0], model.train_targets
    for targets, message in (
        (adapted.network()(x).squeeze(-1).detach(), "explains the targets exactly"),
        (y.clone().index_fill(0, torch.tensor([2]), math.nan), "NaN or infinite"),
    ):
        model.set_train_data(targets=targets)
        with pytest.raises(ValueError, match=message):
            scale_to_data(model)
    with gpytorch.settings.observation_nan_policy("mask"):
        keep = torch.arange(len(x)) != 2
        expected = (y - adapted.network()(x).squeeze(-1))[keep].square().mean().item()
        assert unexplained_variance(model) == pytest.approx(expected)
    for n in (None, 0):
        empty = model_of(ScaleKernel(RBFKernel()).double())
        empty.set_train_data(x[:0], y[:0], strict=False)
        if n is None:
            empty.train_inputs = None
        with pytest.raises(ValueError, match="no training data"):
            scale_to_data(empty)
    for shares in ([1.0, 2.0], [0.0], [math.nan]):
        with pytest.raises(ValueError, match="1 positive shares"):
            scale_to_data(model_of(ScaleKernel(RBFKernel()).double()), shares=shares)
    with pytest.raises(TypeError, match="ExactGP"):
        scale_to_data(RBFKernel())
    del model.mean_module
    with pytest.raises(TypeError, match="no mean_module"):
        scale_to_data(model)


def test_noise_below_its_constraint_is_an_error():
    model = model_of(ScaleKernel(RBFKernel()).double(), scale=1e-3)
    model.mean_module = gpytorch.means.ZeroMean()
    with pytest.raises(ValueError, match="noise_constraint"):
        scale_to_data(model)


def test_float32():
    model = model_of(ScaleKernel(NTKKernel(adapted.network().float())))
    model.float()
    v0 = scale_to_data(model)
    assert model.likelihood.noise.item() == pytest.approx(0.01 * v0, rel=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert isinstance(model.mean_module, NetworkMean)
