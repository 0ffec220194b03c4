"""Functions drawn from prior and posterior, and the adapted network, against closed forms."""

import copy
import io

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.sampling import LinearizedNetwork, adapted_network, draw_functions
from tests import references
from tests.adapted import LARGE, SMALL, AdaptedGP, assert_close, closed_form, data, network

NOISE = 0.3


def model_of(net: nn.Module, x: Tensor, y: Tensor, **options) -> AdaptedGP:
    kernel = ScaleKernel(NTKKernel(net, **options)).double()
    kernel.outputscale = torch.tensor(1.7, dtype=torch.float64)
    model = AdaptedGP(x, y, net, kernel, output=options.get("output"))
    if options.get("output") == "all":
        model.likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(2, has_task_noise=False).double()
    model.likelihood.noise = torch.tensor([NOISE], dtype=torch.float64)
    return model.eval()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestMoments:
    """Over k draws, the standard error of a mean is σ/√k and that of a covariance at most σσ'√(2/k).

    Every one of 20 to 30 statistics must be within 4.5 of them: a right sampler fails with probability below 3e-4 (and
    the seed is fixed), and an error of 9 standard errors, 6 % of σ in a mean or 9 % of a variance with k = 20,000, is
    found with probability above 0.99999.
    """

    k = 20000

    def check(self, draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
        scale = covariance.diagonal().sqrt()
        assert ((draws.mean(0) - mean).abs() <= 4.5 * scale / self.k**0.5).all()
        bound = 4.5 * (2 / self.k) ** 0.5 * scale * scale.unsqueeze(-1)
        assert ((draws.mT.cov() - covariance).abs() <= bound).all()

    @pytest.mark.parametrize("n", [SMALL, LARGE])
    def test_posterior(self, n):
        net, (x, y), test_x = network(), data(n), data(5, seed=1)[0]
        functions = draw_functions(model_of(net, x, y), self.k, generator=seeded())
        self.check(functions(test_x), *closed_form(net, x, y, test_x, NOISE, 1.7))

    def test_prior(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        functions = draw_functions(model_of(net, x, y), self.k, prior=True, generator=seeded())
        self.check(functions(test_x), net(test_x).squeeze(-1).detach(), 1.7 * references.kernel(net, test_x))

    def test_different_noises(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        noise = torch.linspace(0.05, 2.0, SMALL, dtype=torch.float64)
        model = model_of(net, x, y)
        model.likelihood = gpytorch.likelihoods.FixedNoiseGaussianLikelihood(noise).double()
        functions = draw_functions(model.eval(), self.k, generator=seeded())
        self.check(functions(test_x), *closed_form(net, x, y, test_x, noise, 1.7))

    def test_layer_scales(self):
        net, (x, y), test_x = network(), data(LARGE), data(5, seed=1)[0]
        model = model_of(net, x, y, variance_groups="layer")
        variance = torch.tensor([[0.2, 3.0]], dtype=torch.float64)
        model.covar_module.base_kernel.variance = variance
        functions = draw_functions(model, self.k, generator=seeded())
        variances = 1.7 * variance[0].repeat_interleave(torch.tensor([32, 9]))
        self.check(functions(test_x), *closed_form(net, x, y, test_x, NOISE, variances))

    def test_several_outputs(self):
        net, (x, y), test_x = network(outputs=2), data(SMALL, outputs=2), data(3, seed=1)[0]
        functions = draw_functions(model_of(net, x, y, output="all"), self.k, generator=seeded())
        draws = functions(test_x)
        assert draws.shape == (self.k, 3, 2)
        self.check(draws.flatten(1), *closed_form(net, x, y.reshape(-1), test_x, NOISE, 1.7))


class TestFunctions:
    def test_seeds(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        model = model_of(net, x, y)
        first, again, other = (draw_functions(model, 3, generator=seeded(s))(test_x) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)

    def test_each_is_one_function_everywhere(self):
        net, (x, y), test_x = network(), data(SMALL), data(12, seed=1)[0]
        functions = draw_functions(model_of(net, x, y), 3, generator=seeded())
        values = functions(test_x)
        assert_close(functions(test_x[4:7]), values[:, 4:7], 1e-12)
        assert_close(functions(test_x.reshape(2, 6, 3)), values.reshape(3, 2, 6), 1e-12)
        jacobian = references.jacobian(net, test_x)
        assert_close(values, net(test_x).squeeze(-1).detach() + functions.weights @ jacobian.mT, 1e-12)

    def test_differentiable(self):
        net, (x, y) = network(), data(SMALL)
        functions = draw_functions(model_of(net, x, y), 3, generator=seeded())
        assert torch.autograd.gradcheck(functions, data(4, seed=1)[0].requires_grad_(), atol=1e-6, fast_mode=True)

    def test_active_dims(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        plain = draw_functions(model_of(net, x, y), 3, generator=seeded())(test_x)

        def widened(z: Tensor) -> Tensor:
            return torch.cat([7.0 * torch.ones_like(z[:, :1]), z], dim=-1)

        for inner in (True, False):
            kernel = NTKKernel(net, active_dims=(1, 2, 3) if inner else None)
            scaled = ScaleKernel(kernel, active_dims=None if inner else (1, 2, 3)).double()
            scaled.outputscale = torch.tensor(1.7, dtype=torch.float64)
            model = model_of(net, widened(x), y)
            model.covar_module = scaled
            model.mean_module.active_dims = torch.tensor([1, 2, 3])
            functions = draw_functions(model.eval(), 3, generator=seeded())
            assert_close(functions(widened(test_x)), plain, 1e-10)

    def test_another_prior_mean(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        model = model_of(net, x, y)
        model.mean_module = gpytorch.means.ConstantMean().double()
        functions = draw_functions(model, 20000, generator=seeded())
        assert (functions(test_x).mean(0) - model(test_x).mean).abs().max() <= 0.1

    def test_botorch_transforms(self):
        botorch = pytest.importorskip("botorch")
        net, (x, y), test_x = network(), data(SMALL), data(4, seed=1)[0]
        model = botorch.models.SingleTaskGP(
            x,
            100.0 + 30.0 * y.unsqueeze(-1),
            mean_module=NetworkMean(net),
            covar_module=ScaleKernel(NTKKernel(net)),
            input_transform=botorch.models.transforms.Normalize(3),
            outcome_transform=botorch.models.transforms.Standardize(1),
        ).eval()
        k = 4000
        draws = draw_functions(model, k, generator=seeded())(test_x)
        posterior = model.posterior(test_x)
        mean, variance = posterior.mean.squeeze(-1), posterior.variance.squeeze(-1)
        assert ((draws.mean(0) - mean).abs() <= 4.5 * (variance / k).sqrt()).all()
        assert ((draws.var(0) - variance).abs() <= 4.5 * (2 / k) ** 0.5 * variance).all()
        functions = draw_functions(model, 2, generator=seeded())
        assert_close(functions(test_x.reshape(2, 2, 3)), functions(test_x).reshape(2, 2, 2), 1e-10)
        with pytest.raises(ValueError, match="transforms"):
            adapted_network(model)

    def test_before_and_after_predictions(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        model = model_of(net, x, y)
        before = draw_functions(model, 2, generator=seeded())(test_x)
        model(test_x)
        assert_close(draw_functions(model, 2, generator=seeded())(test_x), before, 1e-12)

    def test_float32(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        expected = draw_functions(model_of(net, x, y), 2, generator=seeded())(test_x)
        model = model_of(net, x, y).float()
        values = draw_functions(model, 2, generator=seeded())(test_x.float())
        assert values.dtype == torch.float32
        assert_close(values.double(), expected, 1e-4)


class TestAdaptedNetwork:
    @pytest.mark.parametrize("n", [SMALL, LARGE])
    def test_is_the_posterior_mean(self, n):
        net, (x, y), test_x = network(), data(n), data(12, seed=1)[0]
        model = model_of(net, x, y)
        adapted = adapted_network(model)
        assert_close(adapted(test_x), closed_form(net, x, y, test_x, NOISE, 1.7)[0])
        assert_close(adapted(test_x.reshape(2, 6, 3)), model(test_x).mean.reshape(2, 6), 1e-12)

    def test_several_outputs(self):
        net, (x, y), test_x = network(outputs=2), data(SMALL, outputs=2), data(5, seed=1)[0]
        model = model_of(net, x, y, output="all")
        assert_close(adapted_network(model)(test_x), model(test_x).mean, 1e-12)

    def test_input_shape(self):
        net = nn.Sequential(nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double()
        x, y = data(SMALL)
        model = AdaptedGP(x, y, network())
        model.mean_module = gpytorch.means.ConstantMean().double()
        model.mean_module = NetworkMean(net, input_shape=(1, 3))
        model.covar_module = NTKKernel(net, input_shape=(1, 3))
        model.eval()
        test_x = data(5, seed=1)[0]
        assert_close(adapted_network(model)(test_x), model(test_x).mean, 1e-12)

    def test_state_dict_round_trip(self):
        net, (x, y), test_x = network(), data(SMALL), data(5, seed=1)[0]
        adapted = adapted_network(model_of(net, x, y))
        expected = adapted(test_x)
        file = io.BytesIO()
        torch.save(adapted.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(adapted_network(model_of(network(seed=4), *data(SMALL, seed=9))))
        assert not torch.allclose(other(test_x), expected)
        other.load_state_dict(torch.load(file))
        assert torch.equal(other(test_x), expected)
        fresh = LinearizedNetwork(NTKKernel(network(seed=4)).network, torch.zeros(41, dtype=torch.float64))
        fresh.load_state_dict(adapted.state_dict())
        assert torch.equal(fresh(test_x), expected)

    def test_differentiable_and_in_float32(self):
        net, (x, y) = network(), data(SMALL)
        adapted = adapted_network(model_of(net, x, y))
        test_x = data(4, seed=1)[0]
        assert torch.autograd.gradcheck(adapted, test_x.clone().requires_grad_(), atol=1e-6, fast_mode=True)
        assert adapted(test_x.float()).dtype == torch.float32
        assert_close(adapted(test_x.float()).double(), adapted(test_x), 1e-5)
        assert not list(adapted.parameters())

    def test_a_mean_of_another_network(self):
        """f of one and J of the other would be no posterior mean at all."""
        net, (x, y) = network(), data(SMALL)
        model = model_of(net, x, y)
        model.covar_module = NTKKernel(network(seed=5))
        with pytest.raises(ValueError, match="same network"):
            adapted_network(model.eval())


class TestRefusals:
    @pytest.mark.parametrize("build", [lambda m: draw_functions(m, 2), adapted_network])
    def test_other_kernels(self, build):
        net, (x, y) = network(), data(SMALL)
        for kernel in (MaternKernel().double(), NTKKernel(net) + MaternKernel().double()):
            with pytest.raises(TypeError, match="Expected an NTKKernel"):
                build(AdaptedGP(x, y, net, kernel).eval())

    @pytest.mark.parametrize("build", [lambda m: draw_functions(m, 2), adapted_network])
    def test_train_mode(self, build):
        net, (x, y) = network(), data(SMALL)
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            build(model_of(net, x, y).train())

    @pytest.mark.parametrize("build", [lambda m: draw_functions(m, 2), adapted_network])
    def test_batches(self, build):
        net, (x, y) = network(), data(SMALL, 3)
        with pytest.raises(ValueError, match="without batches"):
            build(model_of(net, x, y))
        with pytest.raises(ValueError, match="without batches"):
            build(model_of(net, x[:1].expand(3, -1, -1), y))

    @pytest.mark.parametrize("build", [lambda m: draw_functions(m, 2), adapted_network])
    def test_a_forward_that_does_more(self, build):
        """Inputs changed on their way to the kernel, which functions of weights alone would not see."""

        class Warped(AdaptedGP):
            def forward(self, x: Tensor):
                return super().forward(x.tanh())

        net, (x, y) = network(), data(SMALL)
        with pytest.raises(ValueError, match="forward"):
            build(Warped(x, y, net).eval())

    def test_no_network_mean(self):
        net, (x, y) = network(), data(SMALL)
        model = model_of(net, x, y)
        model.mean_module = gpytorch.means.ConstantMean().double()
        with pytest.raises(TypeError, match="NetworkMean"):
            adapted_network(model)
