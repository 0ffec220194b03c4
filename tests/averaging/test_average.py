"""Averaged predictions and evidence against quadrature and Metropolis' algorithm, which share no code with them."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import MultitaskGaussianLikelihood

from ntk_gp import NetworkMean, NTKKernel, averaged, settings
from ntk_gp.averaging import Mixture
from ntk_gp.averaging import average as average_module
from ntk_gp.priors import register_log_prior, scale_to_data
from tests import adapted
from tests.averaging.models import (
    PRIORS,
    PlainGP,
    data,
    log_priors,
    rbf_log_likelihood,
    rbf_model,
    rbf_predictions,
)
from tests.in_threads import settings_of_gpytorch_restored

pytestmark = [pytest.mark.engine_independent, pytest.mark.costly]
Z = torch.linspace(-0.3, 1.3, 7, dtype=torch.float64).unsqueeze(-1)


def quadrature(model: PlainGP, free: tuple[str, ...]) -> tuple[float, list[tuple[torch.Tensor, torch.Tensor]]]:
    """log evidence, and first and second moments of observations at Z, each with how far it varies with u, by the
    trapezoidal rule over ±7 widths."""
    size = 2001 if len(free) == 1 else 141
    lines = []
    for name, (value, width) in PRIORS.items():
        span = 7 * width if name in free else 0.0
        lines.append(math.log(value) + span * torch.linspace(-1, 1, size if span else 1, dtype=torch.float64))
    u = torch.cartesian_prod(*lines)
    steps = [line[1] - line[0] if len(line) > 1 else torch.tensor(1.0, dtype=torch.float64) for line in lines]
    chosen = [name in free for name in PRIORS]
    density = rbf_log_likelihood(model, u) + log_priors(u)[:, chosen].sum(-1)
    evidence = density.logsumexp(0) + torch.stack(steps).log().sum()
    weights = density.softmax(0)[:, None]
    mean, variance = rbf_predictions(model, u, Z)
    moments = []
    for each in (mean, variance + u[:, :1].exp() + mean.square()):
        average = (weights * each).sum(0)
        moments.append((average, (weights * (each - average).square()).sum(0).sqrt()))
    return evidence.item(), moments


@pytest.mark.parametrize("free", [("lengthscale",), ("noise", "outputscale")])
def test_evidence_and_predictions_against_quadrature(free):
    """With 128 draws: evidence within four of its standard errors, which are below 0.1; first and second moments within
    five of theirs, which are less than what they vary by with the hyperparameters."""
    model = rbf_model(free)
    average = averaged(model, draws=128, seed=1)
    evidence, moments = quadrature(model, free)
    assert abs(average.log_evidence - evidence) < 4 * average.log_evidence_error < 0.4
    prediction = average.predict(Z)
    found = (prediction.mean, prediction.variance + prediction.mean.square())
    parts = [(c.mean, c.variance + c.mean.square()) for c in prediction.components]
    for value, each, (expected, spread) in zip(found, zip(*parts, strict=True), moments, strict=True):
        error = (average.weights[:, None].square() * (torch.stack(each) - value).square()).sum(0).sqrt()
        assert (error < 0.7 * spread).all()
        assert ((value - expected).abs() < 5 * error).all()


def metropolis(model: PlainGP, chains: int = 256, steps: int = 700, burn_in: int = 200) -> torch.Tensor:
    """Draws of u, (kept, chains, 3), by a random walk of all chains at once from the prior."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.tensor([math.log(value) for value, _ in PRIORS.values()], dtype=torch.float64)
    widths = torch.tensor([width for _, width in PRIORS.values()], dtype=torch.float64)
    u = centers + widths * torch.randn(chains, 3, generator=generator, dtype=torch.float64)
    density = rbf_log_likelihood(model, u) + log_priors(u).sum(-1)
    kept = []
    for step in range(steps):
        new = u + 0.6 * widths * torch.randn(u.shape, generator=generator, dtype=torch.float64)
        new_density = rbf_log_likelihood(model, new) + log_priors(new).sum(-1)
        accept = torch.rand(chains, generator=generator, dtype=torch.float64).log() < new_density - density
        u, density = torch.where(accept[:, None], new, u), torch.where(accept, new_density, density)
        if step >= burn_in and step % 10 == 0:
            kept.append(u)
    return torch.stack(kept)


def test_three_hyperparameters_against_metropolis():
    """Means over chains have standard errors, of the chains' own means; with those of 256 weighted draws, differences
    are below five. An average that left out the weights, or took the mode alone, is off by tens (checked)."""
    model = rbf_model()
    u = metropolis(model)
    mean, variance = rbf_predictions(model, u, Z)
    second = variance + u[..., :1].exp() + mean.square()
    per_chain, second_per_chain = mean.mean(0), second.mean(0)  # (chains, m)
    average = averaged(model, draws=256, seed=2)
    prediction = average.predict(Z)
    size = average.effective_sample_size
    assert size > 100
    error = (per_chain.var(0) / len(per_chain) + mean.flatten(0, 1).var(0) / size).sqrt()
    assert ((prediction.mean - per_chain.mean(0)).abs() < 5 * error).all()
    error = (second_per_chain.var(0) / len(per_chain) + second.flatten(0, 1).var(0) / size).sqrt()
    moment = prediction.variance + prediction.mean.square()
    assert ((moment - second_per_chain.mean(0)).abs() < 5 * error).all()
    logs = torch.stack([average.draws[name].reshape(-1).log() for name in average.draws], dim=-1)
    spread = u.flatten(0, 1).std(0)
    error = spread * (1 / size + 1 / len(per_chain)) ** 0.5
    assert ((average.weights @ logs - u.mean((0, 1))).abs() < 5 * error).all()
    assert ((average.weights @ (logs - u.mean((0, 1))).square()).sqrt() / spread - 1).abs().max() < 0.25


def network_model(n: int = 15, dtype=torch.float64) -> adapted.AdaptedGP:
    network = adapted.network()
    kernel = ScaleKernel(NTKKernel(network)) + ScaleKernel(MaternKernel(1.5))
    model = adapted.AdaptedGP(*adapted.data(n), network, covar_module=kernel)
    scale_to_data(model)
    return model.to(dtype)


def test_components_are_the_models_predictions_at_the_draws():
    model = network_model()
    average = averaged(model, draws=4, seed=0)
    z = adapted.data(5, seed=3)[0]
    latent, observed = average(z), average.predict(z)
    for i, (component, with_noise) in enumerate(zip(latent.components, observed.components, strict=True)):
        other = network_model()
        for name, values in average.draws.items():
            owner, _, attribute = name.rpartition(".")
            setattr(other.get_submodule(owner), attribute, values[i])
        other.eval()
        with torch.no_grad():
            expected = other(z)
        torch.testing.assert_close(component.mean, expected.mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(component.covariance_matrix, expected.covariance_matrix, rtol=0, atol=1e-8)
        noise = other.likelihood.noise.detach()
        torch.testing.assert_close(with_noise.variance, expected.variance + noise, rtol=0, atol=1e-8)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(training):
    model = network_model().train(training)
    x = model.train_inputs[0]
    if not training:
        model(x[:2] + 0.1)
    strategy, before, gradients = model.prediction_strategy, state(model), [p.grad for p in model.parameters()]
    flags = {name: module.training for name, module in model.named_modules()}
    averaged(model, draws=4, seed=0).predict(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.prediction_strategy is strategy
    assert model.train_inputs[0] is x
    assert [p.grad for p in model.parameters()] == gradients
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_a_graph_in_its_caches():
    """GPyTorch's cannot be copied with it."""
    model = rbf_model().eval()
    model(Z).mean.sum().backward()
    averaged(model, draws=4, seed=0)


def test_seeds():
    model, z = rbf_model(), Z
    before = torch.get_rng_state()
    one, same, other = (averaged(model, draws=8, seed=seed).predict(z).mean for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    first = averaged(model, draws=8).predict(z).mean
    torch.manual_seed(5)
    assert torch.equal(averaged(model, draws=8).predict(z).mean, first)


def test_it_stays_as_it_was_made():
    model, z = network_model(), adapted.data(3)[0]
    average = averaged(model, draws=4, seed=0)
    before = average.predict(z).mean
    model.likelihood.noise = 3.0
    model.set_train_data(model.train_inputs[0], model.train_targets + 1)
    assert torch.equal(average.predict(z).mean, before)


def test_float32_inputs_give_float32():
    model = network_model(dtype=torch.float32)
    z = adapted.data(4)[0].float()
    prediction = averaged(model, draws=4, seed=0).predict(z)
    assert prediction.mean.dtype == prediction.quantile(0.5).dtype == torch.float32
    assert model.likelihood.noise.dtype == torch.float32


def test_no_evidence_without_priors():
    model = rbf_model()
    model.mean_module = gpytorch.means.ConstantMean().double()
    average = averaged(model, draws=16, seed=0)
    assert average.log_evidence is None
    assert average.no_evidence_because == "mean_module.constant: no prior"


def test_gradients_with_respect_to_inputs():
    average = averaged(rbf_model(), draws=4, seed=0)
    z = Z[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: average.predict(z).mean, (z,), atol=1e-6, fast_mode=True)
    assert not average.predict(Z).mean.requires_grad


def test_nothing_is_computed_again_of_the_network():
    """The kept Gram matrix serves all draws: their copies share what the kernel remembers."""
    model = network_model()
    average = averaged(model, draws=3, seed=0)
    kernels = [each.covar_module.kernels[0].base_kernel for each in average._models]
    assert all(kernel is kernels[0] for kernel in kernels)
    tensors = {id(t) for each in average._models for t in each.mean_module.buffers()}
    assert len(tensors) == len(list(model.mean_module.buffers()))


def test_little_memory_for_what_is_prepared():
    z = adapted.data(3)[0]
    expected = averaged(network_model(), draws=3, seed=0).predict(z).mean
    average = averaged(network_model(), draws=3, seed=0)
    with settings.memory_budget(1000):
        torch.testing.assert_close(average.predict(z).mean, expected, rtol=0, atol=1e-9)
        assert all(model.prediction_strategy is None for model in average._models)


def test_missing_targets():
    model = rbf_model()
    model.set_train_data(targets=model.train_targets.clone().index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match="observation_nan_policy"):
        averaged(model)
    fewer = rbf_model()
    keep = torch.arange(12) != 3
    fewer.set_train_data(fewer.train_inputs[0][keep], fewer.train_targets[keep], strict=False)
    with gpytorch.settings.observation_nan_policy("mask"):
        masked = averaged(model, draws=8, seed=0)
        prediction = masked.predict(Z)
    expected = averaged(fewer, draws=8, seed=0)
    assert masked.log_evidence == pytest.approx(expected.log_evidence, abs=1e-5)
    torch.testing.assert_close(prediction.mean, expected.predict(Z).mean, rtol=0, atol=1e-4)


class TwoOutputs(gpytorch.models.ExactGP):
    def __init__(self, x, y, network):
        super().__init__(x, y, MultitaskGaussianLikelihood(num_tasks=2, has_task_noise=False))
        self.mean_module = NetworkMean(network, output="all")
        self.covar_module = ScaleKernel(NTKKernel(network, output="all"))
        self.double()

    def forward(self, x):
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def test_several_outputs():
    x, y = adapted.data(10, outputs=2)
    model = TwoOutputs(x, y, adapted.network(outputs=2))
    scale_to_data(model)
    average = averaged(model, draws=8, seed=0)
    prediction = average.predict(x[:3])
    assert prediction.mean.shape == prediction.variance.shape == prediction.quantile(0.5).shape == (3, 2)
    assert isinstance(average.log_evidence, float)


@pytest.mark.parametrize("x", [torch.rand(2, 3, 1).double(), None, torch.ones(3, 1, dtype=torch.long)])
def test_inputs_that_are_refused(x):
    average = averaged(rbf_model(), draws=2, seed=0)
    with pytest.raises((ValueError, TypeError), match=r"\(n, d\)"):
        average(x)


def test_no_draws():
    with pytest.raises(ValueError, match="at least one draw"):
        averaged(rbf_model(), draws=0)


def test_copies_and_one_draw():
    average = averaged(rbf_model(), draws=1, seed=0)
    assert average.weights.tolist() == [1.0]
    again = copy.deepcopy(average).predict(Z)
    assert isinstance(again, Mixture)
    torch.testing.assert_close(again.mean, average.predict(Z).mean, rtol=0, atol=1e-10)


def test_a_likelier_mode_than_the_present_one_is_found():
    """From where all is noise, with hardly any signal."""
    model = rbf_model()
    model.likelihood.noise, model.covar_module.outputscale = 1.0, 1e-4
    register_log_prior(model.covar_module.base_kernel, "lengthscale", 0.4, 0.7)
    from_there = averaged(model, draws=64, seed=0)
    expected = averaged(rbf_model(), draws=64, seed=0)
    error = from_there.log_evidence_error + expected.log_evidence_error
    assert from_there.log_evidence == pytest.approx(expected.log_evidence, abs=4 * error)


def test_rbf_with_ard():
    x, y = adapted.data(12)
    model = PlainGP(x, y, ScaleKernel(RBFKernel(ard_num_dims=3)))
    scale_to_data(model)
    average = averaged(model, draws=8, seed=0)
    assert average.draws["covar_module.base_kernel.lengthscale"].shape == (8, 1, 3)


def test_botorchs_models():
    """Those that transform outcomes predict in other units than they learn in, and are refused."""
    models = pytest.importorskip("botorch.models")
    x, y = adapted.data(10)
    kernel = ScaleKernel(NTKKernel(adapted.network()))
    plain = models.SingleTaskGP(x, y.unsqueeze(-1), covar_module=kernel, outcome_transform=None)
    average = averaged(plain, draws=4, seed=0)
    assert average.predict(x[:2] + 0.1).mean.shape == (2,)
    with pytest.raises(ValueError, match="outcome_transform=None"):
        averaged(models.SingleTaskGP(x, y.unsqueeze(-1), covar_module=kernel))


@pytest.mark.thorough
def test_from_several_threads():
    model, z = network_model(), adapted.data(6, seed=3)[0]
    average = averaged(model, draws=4, seed=0)
    expected = average.predict(z).mean
    fresh = averaged(model, draws=4, seed=0)

    def run(_: int) -> list[torch.Tensor]:
        return [fresh.predict(z).mean, averaged(model, draws=4, seed=0).predict(z).mean]

    with settings_of_gpytorch_restored(), ThreadPoolExecutor(4) as pool:
        for results in pool.map(run, range(4)):
            for result in results:
                torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def test_progress(capsys):
    pytest.importorskip("tqdm")
    with settings.progress_bar():
        averaged(rbf_model(), draws=4, seed=0).predict(Z)
    shown = capsys.readouterr().err
    for step in ("Starts for", "Modes of", "Draws of", "Predictions of"):
        assert step in shown


@pytest.mark.parametrize("outputs", [1, 2])
def test_many_points_are_predicted_some_at_a_time(outputs, monkeypatch):
    """As all together; joint covariances, of all pairs, are formed only where they are asked for."""
    x, y = adapted.data(10, outputs=outputs)
    model = TwoOutputs(x, y, adapted.network(outputs=2)) if outputs == 2 else rbf_model(("noise",))
    if outputs == 2:
        scale_to_data(model)
    average = averaged(model, draws=3, seed=0)
    z = torch.randn(23, model.train_inputs[0].shape[-1], dtype=torch.float64)
    together = average.predict(z)
    sizes = []
    original = type(average)._posterior
    monkeypatch.setattr(average_module, "_POINTS", 10)
    monkeypatch.setattr(
        type(average), "_posterior", staticmethod(lambda m, x, *rest: sizes.append(len(x)) or original(m, x, *rest))
    )
    apart = average.predict(z)
    assert sizes == [10, 10, 3] * 3
    for name in ("mean", "variance"):
        torch.testing.assert_close(getattr(apart, name), getattr(together, name), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(apart.quantile(0.1), together.quantile(0.1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(apart.covariance_matrix, together.covariance_matrix, rtol=1e-9, atol=1e-9)
    assert sizes[9:] == [23] * 3
    assert apart.sample(torch.Size([4])).shape == (4, *together.mean.shape)
    assert sizes[12:] == []


def test_noise_at_new_points_is_passed_on():
    """As FixedNoiseGaussianLikelihood takes it, by its name."""
    x, y = data(8)
    likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(torch.full_like(y, 0.1))
    model = PlainGP(x, y, ScaleKernel(RBFKernel()), likelihood)
    scale_to_data(model)
    average, noise = averaged(model, draws=4, seed=0), torch.linspace(0.1, 0.7, len(Z), dtype=torch.float64)
    latent, observed = average(Z), average.predict(Z, noise=noise)
    torch.testing.assert_close(observed.variance - latent.variance, noise, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(observed).mean, latent.mean)
