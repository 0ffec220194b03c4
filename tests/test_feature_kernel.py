"""Kernels on the features of a layer, against GPyTorch's own kernels on features taken from the user's module."""

from __future__ import annotations

import copy
import pickle

import gpytorch
import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from torch import Size, Tensor, nn

from ntk_gp import FeatureKernel, NetworkMean, NTKKernel
from ntk_gp.kernels import features
from tests import references
from tests.in_threads import THREADS, check_predictions

pytestmark = pytest.mark.engine_independent


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_network(inputs: int = 3, outputs: int = 1, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


def matern(features1: Tensor, features2: Tensor, lengthscale: Tensor | float = 1.0) -> Tensor:
    """Matérn-3/2 written out; `lengthscale` is one for all, or for each feature."""
    a = 3**0.5 * ((features1.unsqueeze(-2) - features2.unsqueeze(-3)) / lengthscale).norm(dim=-1)
    return (1 + a) * (-a).exp()


class TestValues:
    @pytest.mark.parametrize("batch_shape", [(), (2,), (3, 2)])
    @pytest.mark.parametrize("outputs", [1, 3])
    def test_penultimate_features(self, batch_shape, outputs):
        network, x, z = make_network(outputs=outputs), randn(*batch_shape, 5, 3), randn(*batch_shape, 4, 3)
        kernel = FeatureKernel(network, MaternKernel(nu=1.5).double())
        kernel.base_kernel.lengthscale = 1.25
        with torch.no_grad():
            phi, psi = network[:2](x), network[:2](z)
        assert_close(kernel.features(x), phi)
        cross = matern(phi, psi, 1.25)
        assert kernel(x, z).shape == cross.shape
        assert_close(kernel(x, z).to_dense(), cross, 1e-7)
        assert_close(kernel(x).to_dense(), matern(phi, phi, 1.25), 1e-7)
        assert_close(kernel(x, diag=True), torch.ones(*batch_shape, 5, dtype=torch.float64))
        assert_close(kernel(x[..., :4, :], z, diag=True), cross.diagonal(dim1=-2, dim2=-1), 1e-7)
        assert_close(kernel(x, z)[..., 1:3, ::2].to_dense(), cross[..., 1:3, ::2], 1e-7)
        operator, rhs = kernel(x, z).evaluate_kernel(), randn(*batch_shape, 4, 2)
        assert_close(operator @ rhs, cross @ rhs, 1e-6)
        assert_close(operator.mT.to_dense(), cross.mT, 1e-7)
        assert_close(operator[..., 2, :], cross[..., 2, :], 1e-7)

    def test_named_layers(self):
        network, x = make_network(), randn(5, 3)
        named = dict(network.named_modules())
        for name in ("0", "1", "2"):
            taken: list[Tensor] = []
            handle = named[name].register_forward_hook(lambda _, __, out, taken=taken: taken.append(out.detach()))
            network(x)
            handle.remove()
            assert_close(FeatureKernel(network, RBFKernel(), name).features(x), taken[0].reshape(5, -1))

    def test_images(self):
        network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        network = network.double().train()
        network(randn(16, 1, 3, 3))
        x = randn(5, 1, 3, 3)
        expected = copy.deepcopy(network).eval()[:4](x).detach()
        kernel = FeatureKernel(network, RBFKernel(), input_shape=(1, 3, 3))
        assert_close(kernel.features(x), expected)
        assert_close(kernel.features(x.flatten(1)), expected)
        convolution = FeatureKernel(network, RBFKernel(), "0", input_shape=(1, 3, 3))
        assert_close(convolution.features(x), network[0](x).detach().flatten(1))
        assert network.training

    def test_each_feature_has_a_lengthscale(self):
        network, x = make_network(), randn(5, 3)
        count = FeatureKernel.count_features(network, x)
        kernel = FeatureKernel(network, MaternKernel(nu=1.5, ard_num_dims=count).double())
        assert count == kernel.num_features(x) == 8
        lengthscale = torch.rand(1, 8, dtype=torch.float64) + 0.5
        kernel.base_kernel.lengthscale = lengthscale
        phi = network[:2](x).detach()
        matrix = kernel(x).to_dense()
        assert_close(matrix, matern(phi, phi, lengthscale), 1e-7)
        matrix.sum().backward()
        assert kernel.base_kernel.raw_lengthscale.grad.shape == (1, 8)

    def test_active_dims(self):
        network, x = make_network(), randn(5, 4)
        kernel = FeatureKernel(network, RBFKernel(), active_dims=(0, 2, 3))
        phi = network[:2](x[:, [0, 2, 3]]).detach()
        assert_close(kernel.features(x), phi)
        assert kernel.num_features(x) == 8
        assert_close(kernel(x).to_dense(), RBFKernel()(phi).to_dense())

    def test_some_features(self):
        network, x = make_network(), randn(5, 3)
        kernel = FeatureKernel(network, RBFKernel(active_dims=(1, 4)))
        assert_close(kernel(x).to_dense(), RBFKernel()(network[:2](x).detach()[:, [1, 4]]).to_dense())

    @pytest.mark.parametrize("base_first", [True, False])
    def test_kernels_in_a_batch(self, base_first):
        network, x = make_network(), randn(5, 3)
        base = MaternKernel(nu=1.5, batch_shape=Size([3]) if base_first else None).double()
        if base_first:
            base.lengthscale = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64).reshape(3, 1, 1)
        kernel = FeatureKernel(network, base, batch_shape=None if base_first else Size([3]))
        phi = network[:2](x).detach()
        expected = matern(phi, phi, base.lengthscale.detach().reshape(-1, 1, 1, 1)).expand(3, 5, 5)
        assert kernel(x).shape == (3, 5, 5)
        assert_close(kernel(x).to_dense(), expected, 1e-7)
        assert_close(kernel(x)[1].to_dense(), expected[1], 1e-7)
        assert_close(kernel[2](x).to_dense(), expected[2], 1e-7)
        assert_close(kernel.expand_batch(2, 3)(x).to_dense(), expected.expand(2, 3, 5, 5), 1e-7)

    def test_single_precision(self):
        network, x = make_network().float(), torch.randn(5, 3)
        kernel = FeatureKernel(network, MaternKernel(nu=1.5).double())
        assert kernel.features(x).dtype == kernel(x).to_dense().dtype == torch.float32
        assert kernel(x, diag=True).dtype == torch.float32

    def test_base_kernel_with_structure(self):
        network, x = make_network(), randn(5, 3)
        phi = network[:2](x).detach()
        kernel = FeatureKernel(network, LinearKernel().double())
        assert_close(kernel(x).to_dense(), LinearKernel().double()(phi).to_dense())
        assert_close(kernel(x, diag=True), LinearKernel().double()(phi, diag=True))


class TestWhichLayer:
    def test_is_not_a_norm_at_the_end_nor_a_module_that_holds_others(self):
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(3, 3))
                self.head, self.body, self.norm = nn.Linear(6, 2), nn.Linear(3, 6), nn.LayerNorm(2)

            def forward(self, x):
                return self.norm(self.head(torch.tanh(self.body(x @ self.table))))

        network, x = Whole().double(), randn(5, 3)
        expected = torch.tanh(network.body(x @ network.table)).detach()
        assert_close(FeatureKernel(network, RBFKernel()).features(x), expected)

    @pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_weight_made_of_others(self, wrap):
        network, x = make_network(), randn(5, 3)
        wrap(network[2])
        assert_close(FeatureKernel(network, RBFKernel()).features(x), network[:2](x).detach())

    def test_a_head_that_is_called_more_than_once_is_taken_at_its_last_call(self):
        class Repeated(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x):
                return self.layer(torch.tanh(self.layer(x))).sum(-1)

        network, x = Repeated().double(), randn(5, 3)
        assert_close(FeatureKernel(network, RBFKernel()).features(x), torch.tanh(network.layer(x)).detach())
        with pytest.raises(ValueError, match="called 2 times"):
            FeatureKernel(network, RBFKernel(), "layer").features(x)

    def test_there_is_none(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight, self.unused = nn.Parameter(torch.randn(3, 3)), nn.Tanh()

            def forward(self, x):
                return torch.tanh(x @ self.weight).sum(-1)

        with pytest.raises(ValueError, match=r"no penultimate layer.*Its layers are: unused"):
            FeatureKernel(Functional().double(), RBFKernel()).features(randn(4, 3))
        with pytest.raises(ValueError, match="'unused' is not called"):
            FeatureKernel(Functional().double(), RBFKernel(), "unused").features(randn(4, 3))
        with pytest.raises(ValueError, match=r"no layer 'backbone'\. Its layers are: 0, 1, 2"):
            FeatureKernel(make_network(), RBFKernel(), "backbone").features(randn(4, 3))
        with pytest.raises(ValueError, match="no layers at all"):
            FeatureKernel(nn.Linear(3, 1).double(), RBFKernel()).features(randn(4, 3))

    def test_what_is_no_row_for_each_input(self):
        class Recurrent(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.fold, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 2), nn.Linear(6, 1)

            def forward(self, x):
                steps, _ = self.rnn(x.unsqueeze(-1))
                return self.head(self.fold(steps.reshape(-1, 4)).reshape(len(x), -1))

        network, x = Recurrent().double(), randn(4, 3)
        with pytest.raises(TypeError, match="hands on tuple"):
            FeatureKernel(network, RBFKernel(), "rnn").features(x)
        with pytest.raises(ValueError, match="first dimension must be 4"):
            FeatureKernel(network, RBFKernel(), "fold").features(x)
        assert FeatureKernel(network, RBFKernel()).features(x).shape == (4, 6)

    def test_a_layer_that_mixes_rows(self):
        class Mixing(nn.Module):
            def __init__(self):
                super().__init__()
                self.centre, self.head = nn.Identity(), nn.Linear(3, 1)

            def forward(self, x):
                return self.head(x) + 0 * self.centre(x - x.mean(0)).sum(-1, keepdim=True)

        with pytest.raises(ValueError, match="change with the other rows"):
            FeatureKernel(Mixing().double(), RBFKernel(), "centre").features(randn(5, 3))


class TestErrors:
    def test_arguments(self):
        with pytest.raises(TypeError, match="base_kernel must be"):
            FeatureKernel(make_network(), "penultimate")
        with pytest.raises(TypeError, match="layer must be"):
            FeatureKernel(make_network(), RBFKernel(), 2)

    def test_inputs(self):
        kernel, x = FeatureKernel(make_network(), RBFKernel()), randn(4, 3)
        with pytest.raises(ValueError, match="NaN"):
            kernel(x.masked_fill(x > 0, torch.nan)).to_dense()
        with pytest.raises(ValueError, match="two sets of inputs differ"):
            kernel(x, x.float()).to_dense()
        with pytest.raises(NotImplementedError, match="active_dims"), pytest.warns(DeprecationWarning):
            kernel(x, last_dim_is_batch=True).to_dense()

    def test_features_that_are_not_finite(self):
        class Inverse(nn.Module):
            def __init__(self):
                super().__init__()
                self.inverse, self.head = nn.Identity(), nn.Linear(3, 1)

            def forward(self, x):
                return self.head(torch.tanh(self.inverse(1 / x)))

        x = randn(5, 3)
        x[3, 0] = 0.0
        with pytest.raises(ValueError, match=r"NaN or infinite.*rows \[3\]"):
            FeatureKernel(Inverse().double(), RBFKernel(), "inverse").features(x)


class TestDerivatives:
    def test_by_inputs(self):
        kernel = FeatureKernel(make_network(), RBFKernel().double()).requires_grad_(False)
        x, z = randn(3, 3).requires_grad_(), randn(2, 3)
        assert torch.autograd.gradcheck(lambda x: kernel(x, z).to_dense(), x, fast_mode=True)
        assert torch.autograd.gradcheck(lambda x: kernel(x).to_dense(), x, fast_mode=True)
        assert torch.autograd.gradcheck(kernel.features, x, fast_mode=True)

    def test_features_of_constants_are_computed_once(self, monkeypatch):
        network, x = make_network(), randn(5, 3)
        kernel = FeatureKernel(network, RBFKernel().double())
        first = kernel(x).to_dense()
        calls: list[int] = []
        compute = features.layer_features
        monkeypatch.setattr(features, "layer_features", lambda *a, **k: calls.append(1) or compute(*a, **k))
        kernel.base_kernel.lengthscale = 2.0
        assert not kernel(x).to_dense().equal(first)
        FeatureKernel(network, MaternKernel())(x).to_dense()
        assert calls == []
        kernel(x + 1).to_dense()
        assert calls


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, kernel: gpytorch.kernels.Kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = NetworkMean(network)
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


class TestModels:
    def make(self, n: int = 40) -> tuple[Model, nn.Module, Tensor, Tensor]:
        network, x = make_network(), randn(n, 3)
        y = torch.sin(x.sum(-1)) + 0.1 * randn(n)
        features = FeatureKernel(network, MaternKernel(nu=1.5, lengthscale_prior=GammaPrior(2.0, 1.0)))
        return Model(x, y, network, ScaleKernel(features) + NTKKernel(network)).double(), network, x, y

    def test_fit_and_predict(self):
        model, network, x, y = self.make()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (-mll(model(x), y)).backward()
            optimizer.step()
        z = randn(6, 3)
        both = torch.cat([x, z])
        scaled = model.covar_module.kernels[0]
        phi = network[:2](both).detach()
        prior = scaled.outputscale * matern(phi, phi, scaled.base_kernel.base_kernel.lengthscale)
        prior = (prior + references.kernel(network, both)).detach()
        noise = model.likelihood.noise.detach()
        mean, covariance = references.posterior(network(both).detach().squeeze(-1), prior, noise, y)
        model.eval()
        with torch.no_grad(), gpytorch.settings.max_eager_kernel_size(10), gpytorch.settings.max_cholesky_size(10):
            assert_close(model(z).mean, mean, 1e-6)
            assert_close(model(z).covariance_matrix, covariance, 1e-6)
        assert [name for name, *_ in model.named_priors()] == [
            "covar_module.kernels.0.base_kernel.base_kernel.lengthscale_prior"
        ]

    def test_a_network_changed_after_predictions_were_prepared(self):
        _, network, x, y = self.make()
        kernel = FeatureKernel(network, MaternKernel())
        model = Model(x, y, network, ScaleKernel(kernel)).double().eval()
        model(x[:3])
        kernel.linearize(make_network(width=4))
        with pytest.raises(RuntimeError, match="network has changed"):
            model(x[:3])
        model.train()
        model.eval()
        assert torch.isfinite(model(x[:3]).mean).all()

    def test_threads_predict_what_one_does(self):
        model, *_ = self.make()
        check_predictions(model.eval(), [randn(5, 3) for _ in range(THREADS)], assert_close)


class TestAsAModule:
    def test_state_pickle_and_copy(self):
        network, x = make_network(), randn(5, 3)
        kernel = FeatureKernel(network, MaternKernel(nu=1.5))
        kernel.base_kernel.lengthscale = 2.0
        expected = kernel(x).to_dense()
        for copied in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
            assert_close(copied(x).to_dense(), expected)
        other = FeatureKernel(make_network(), MaternKernel(nu=1.5))
        other.load_state_dict(kernel.state_dict())
        assert_close(other(x).to_dense(), expected)
        assert_close(pickle.loads(pickle.dumps(kernel(x).evaluate_kernel())).to_dense(), expected)

    def test_only_the_base_kernel_is_fitted(self):
        network = make_network()
        kernel = FeatureKernel(network, MaternKernel())
        assert [name for name, _ in kernel.named_parameters()] == ["base_kernel.raw_lengthscale"]
        assert kernel.double().dtype == torch.float64
        without = FeatureKernel(network, gpytorch.kernels.ConstantKernel().requires_grad_(False))
        assert without.dtype == torch.float32

    def test_user_network_is_left_alone(self):
        network, x = make_network().train(), randn(4, 3)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        FeatureKernel(network, MaternKernel()).float()(x.float()).to_dense().sum().backward()
        assert network.training
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())

    def test_new_snapshot(self):
        first, second, x = make_network(), make_network(width=5), randn(4, 3)
        kernel = FeatureKernel(first, MaternKernel(nu=1.5).double())
        kernel(x).to_dense()
        kernel.linearize(second)
        assert_close(kernel.features(x), second[:2](x).detach())


def test_median_distance():
    network, x = make_network(), randn(20, 3)
    phi = network[:2](x).detach()
    expected = (phi[:, None] - phi).norm(dim=-1)[torch.ones(20, 20).triu(1).bool()].median()
    kernel = FeatureKernel(network, MaternKernel())
    assert kernel.median_distance(x) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="two inputs"):
        kernel.median_distance(x[:1].expand(3, 3))
