"""Stationary kernels in the network's metric: values, derivatives and posteriors, against explicit Jacobians."""

from __future__ import annotations

import copy
import math
import pickle

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from torch import Size, Tensor, nn

import ntk_gp
from ntk_gp import FeatureKernel, NetworkMean, NTKKernel, TangentMaternKernel, TangentRBFKernel
from ntk_gp.jacobian.autodiff import AutodiffJacobian
from ntk_gp.jacobian.structured import StructuredJacobian
from ntk_gp.testing import explicit_jacobian
from tests import references
from tests.in_threads import THREADS, check_predictions

NUS = [0.5, 1.5, 2.5, math.inf]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def make_network(inputs: int = 3, outputs: int = 1, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def make_kernel(network: nn.Module, nu: float, lengthscale: float | Tensor = 1.75, **options):
    kernel = TangentRBFKernel(network, **options) if math.isinf(nu) else TangentMaternKernel(network, nu, **options)
    kernel.lengthscale = lengthscale
    return kernel


def stationary(distance: Tensor, nu: float) -> Tensor:
    """As functions of d / ℓ, written out."""
    a = math.sqrt(2 * nu) * distance if not math.isinf(nu) else distance
    if nu == 0.5:
        return (-a).exp()
    if nu == 1.5:
        return (1 + a) * (-a).exp()
    if nu == 2.5:
        return (1 + a + a * a / 3) * (-a).exp()
    return (-0.5 * a * a).exp()


def explicit_distances(network: nn.Module, x1: Tensor, x2: Tensor, outputs: int = 1) -> Tensor:
    """(*batch, n, m, C), by differences of rows of J."""
    jacobian1, jacobian2 = (
        explicit_jacobian(network, x).unflatten(-2, (x.shape[-2], outputs)).unsqueeze(dim)
        for x, dim in ((x1, -3), (x2, -4))
    )
    return (jacobian1 - jacobian2).square().sum(-1).sqrt()


def expected_matrix(
    network: nn.Module, x1: Tensor, x2: Tensor, nu: float, lengthscale: float | Tensor = 1.75, outputs: int = 1
) -> Tensor:
    """(*batch, n·C, m·C), point-major."""
    if isinstance(lengthscale, Tensor):
        lengthscale = lengthscale.unsqueeze(-1)
    values = stationary(explicit_distances(network, x1, x2, outputs) / lengthscale, nu)
    blocks = torch.diag_embed(values, dim1=-3, dim2=-1)
    return blocks.flatten(-2, -1).flatten(-3, -2)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


class TestValues:
    @pytest.mark.parametrize("engine", ["structured", "autodiff"])
    @pytest.mark.parametrize("outputs", [1, 3])
    @pytest.mark.parametrize("batch_shape", [(), (2,), (3, 2)])
    @pytest.mark.parametrize("nu", NUS)
    def test_against_explicit_jacobians(self, engine, outputs, batch_shape, nu):
        network = make_network(outputs=outputs)
        kernel = make_kernel(network, nu, output=None if outputs == 1 else "all", engine=engine)
        x1, x2 = randn(*batch_shape, 5, 3), randn(*batch_shape, 4, 3)
        gram, cross = (expected_matrix(network, x1, x, nu, outputs=outputs) for x in (x1, x2))
        rhs = randn(*batch_shape, 4 * outputs, 6)
        assert kernel(x1, x2).shape == cross.shape
        assert_close(kernel(x1).to_dense(), gram)
        assert_close(kernel(x1, x2).to_dense(), cross)
        assert_close(kernel(x1, diag=True), torch.ones(gram.shape[:-1], dtype=torch.float64))
        assert_close(kernel(x1[..., :4, :], x2, diag=True), cross.diagonal(dim1=-2, dim2=-1))
        assert_close(kernel(x1, x2) @ rhs, cross @ rhs)
        assert_close(kernel(x1, x2).mT @ gram, cross.mT @ gram)
        assert_close(kernel(x1)[..., 2 * outputs :, : 3 * outputs].to_dense(), gram[..., 2 * outputs :, : 3 * outputs])
        operator = kernel(x1, x2).evaluate_kernel()
        assert_close(operator[..., 1:4, 2:].to_dense(), cross[..., 1:4, 2:])
        assert_close(operator[..., 3, :], cross[..., 3, :])
        rows, columns = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 2])
        assert_close(operator[..., rows, columns], cross[..., rows, columns])
        assert_close(operator.mT.to_dense(), cross.mT)

    @pytest.mark.parametrize("nu", NUS)
    def test_float32_inputs_lose_no_distances(self, nu):
        """Float32 throughout would leave less than half of the digits of points so close to one another."""
        network = make_network()
        x = (1.0 + 1e-3 * randn(6, 3)).float()
        lengthscale = float(explicit_distances(network, x.double(), x.double()).median())
        kernel = make_kernel(network.float(), nu, lengthscale).float()
        expected = expected_matrix(network.double(), x.double(), x.double(), nu, kernel.lengthscale.detach().double())
        actual = kernel(x).to_dense()
        assert actual.dtype == torch.float32
        assert_close(actual.double(), expected, 2e-7)

    def test_kernels_in_a_batch_have_lengthscales_of_their_own(self):
        network, x = make_network(), randn(5, 3)
        lengthscale = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64).reshape(3, 1, 1)
        kernel = make_kernel(network, 1.5, lengthscale, batch_shape=Size([3]))
        expected = expected_matrix(network, x, x, 1.5, lengthscale)
        assert kernel(x).shape == expected.shape
        assert_close(kernel(x).to_dense(), expected)
        assert_close(kernel(x)[1].to_dense(), expected[1])
        assert_close(kernel[2](x).to_dense(), expected[2])
        assert_close(kernel.expand_batch(2, 3)(x).to_dense(), expected.expand(2, 3, 5, 5))
        assert_close(kernel(randn(3, 5, 3), diag=True), torch.ones(3, 5, dtype=torch.float64))

    def test_active_dims_and_input_shape(self):
        network, x = make_network(), randn(5, 4)
        kernel = make_kernel(network, 1.5, active_dims=(0, 2, 3))
        assert_close(kernel(x).to_dense(), expected_matrix(network, x[:, [0, 2, 3]], x[:, [0, 2, 3]], 1.5))
        image = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1)).double()
        pictures = randn(4, 1, 3, 3)
        kernel = make_kernel(image, 1.5, input_shape=(1, 3, 3))
        jacobian = explicit_jacobian(image, pictures.flatten(1), input_shape=(1, 3, 3))
        assert_close(kernel(pictures).to_dense(), stationary(torch.cdist(jacobian, jacobian) / 1.75, 1.5), 1e-7)

    def test_selected_parameters(self):
        network, x = make_network(), randn(5, 3)
        jacobian = explicit_jacobian(network, x, parameters=["2.*"])
        expected = stationary((jacobian[:, None] - jacobian).norm(dim=-1) / 1.75, 1.5)
        assert_close(make_kernel(network, 1.5, parameters=["2.*"])(x).to_dense(), expected)


class TestCoincidingInputs:
    """Where x = x' the distance is zero to the last bit, wherever the two are; roundoff would be 1e-8."""

    @pytest.mark.parametrize("nu", NUS)
    def test_value_is_one(self, nu):
        network, x = make_network(width=64), randn(40, 3)
        x[7] = x[31]
        others = torch.cat([randn(3, 3), x[5:9]])
        kernel = make_kernel(network, nu)
        gram, cross = kernel(x).to_dense(), kernel(x, others).to_dense()
        assert gram.diagonal().eq(1.0).all()
        assert gram[7, 31] == gram[31, 7] == 1.0
        assert cross[5:9, 3:].diagonal().eq(1.0).all()
        assert cross[31, 5] == 1.0
        assert kernel(x[5:9], others[3:], diag=True).eq(1.0).all()
        assert kernel(x, x.clone()).to_dense().equal(gram)

    def test_zeros_of_either_sign_are_one_input(self):
        x, other = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64).neg()
        assert make_kernel(make_network(), 0.5)(x, other).to_dense().eq(1.0).all()

    @pytest.mark.parametrize("nu", NUS)
    def test_derivatives_are_finite(self, nu):
        x = randn(5, 3)
        x[3] = x[1]
        x.requires_grad_()
        kernel = make_kernel(make_network(), nu)
        weights = randn(5, 5)
        values = kernel(x).to_dense()
        gradients = torch.autograd.grad((weights * values).sum(), [x, kernel.raw_lengthscale])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)

    def test_matrix_is_symmetric_and_positive(self):
        x = randn(60, 3)
        matrix = make_kernel(make_network(), 0.5)(x).to_dense()
        assert matrix.equal(matrix.mT)
        assert torch.linalg.eigvalsh(matrix).min() > 0


class TestDerivatives:
    @pytest.mark.parametrize("nu", NUS)
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_by_lengthscale(self, nu, outputs):
        network, x, z = make_network(outputs=outputs), randn(6, 3), randn(4, 3)
        kernel = make_kernel(network, nu, output=None if outputs == 1 else "all")
        for other in (x, z):
            weights = randn(6 * outputs, len(other) * outputs)
            lengthscale = torch.tensor(1.75, dtype=torch.float64, requires_grad=True)
            distances = explicit_distances(network, x, other, outputs).clamp_min(1e-30)
            values = torch.diag_embed(stationary(distances / lengthscale, nu), dim1=-3, dim2=-1)
            expected = torch.autograd.grad((weights * values.flatten(-2).flatten(0, 1)).sum(), lengthscale)[0]
            actual = torch.autograd.grad((weights * kernel(x, other).to_dense()).sum(), kernel.raw_lengthscale)[0]
            chain = torch.autograd.grad(kernel.lengthscale.sum(), kernel.raw_lengthscale)[0]
            assert_close(actual, (expected * chain).reshape(1, 1), 1e-11)

    @pytest.mark.parametrize("nu", NUS)
    def test_twice_by_lengthscale(self, nu):
        network, x, weights = make_network(), randn(6, 3), randn(6, 6)
        kernel = make_kernel(network, nu)

        def value(raw: Tensor) -> Tensor:
            moved = copy.deepcopy(kernel)
            del moved.raw_lengthscale
            moved.raw_lengthscale = raw
            return (weights * moved(x).to_dense()).sum()

        raw = kernel.raw_lengthscale.detach().clone().requires_grad_()
        assert torch.autograd.gradgradcheck(value, raw, fast_mode=True)
        assert torch.autograd.gradcheck(value, raw, fast_mode=True)

    @pytest.mark.parametrize("nu", NUS)
    @pytest.mark.parametrize("which", ["first", "second", "both", "one"])
    def test_by_inputs(self, nu, which):
        network, x, z = make_network(), randn(3, 3), randn(2, 3)
        kernel = make_kernel(network, nu).requires_grad_(False)
        if which == "one":
            assert torch.autograd.gradcheck(lambda x: kernel(x).to_dense(), x.requires_grad_(), fast_mode=True)
            return
        x.requires_grad_(which != "second")
        z.requires_grad_(which != "first")
        assert torch.autograd.gradcheck(lambda x, z: kernel(x, z).to_dense(), (x, z), fast_mode=True)
        rhs = randn(2, 2)
        assert torch.autograd.gradcheck(lambda x, z: kernel(x, z).evaluate_kernel() @ rhs, (x, z), fast_mode=True)

    def test_diagonal_of_two_sets_by_inputs(self):
        kernel = make_kernel(make_network(), 1.5).requires_grad_(False)
        x, z = randn(3, 3).requires_grad_(), randn(3, 3)
        assert torch.autograd.gradcheck(lambda x: kernel(x, z, diag=True), x, fast_mode=True)

    def test_in_batches(self):
        network, x = make_network(), randn(2, 4, 3)
        lengthscale = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(2, 1, 1)
        kernel, weights = make_kernel(network, 1.5, lengthscale, batch_shape=Size([2])), randn(2, 4, 4)
        actual = torch.autograd.grad((weights * kernel(x).to_dense()).sum(), kernel.raw_lengthscale)[0]
        for i in range(2):
            alone = make_kernel(network, 1.5, lengthscale[i])
            expected = torch.autograd.grad((weights[i] * alone(x[i]).to_dense()).sum(), alone.raw_lengthscale)[0]
            assert_close(actual[i], expected)


class TestMemory:
    def test_what_does_not_fit_is_multiplied_some_rows_at_a_time(self):
        network, x, z, rhs = make_network(), randn(60, 3), randn(50, 3), randn(50, 2)
        kernel = make_kernel(network, 1.5)
        expected = expected_matrix(network, x, z, 1.5) @ rhs
        largest = []
        with ntk_gp.settings.memory_budget(20_000):
            operator = kernel(x, z).evaluate_kernel()
            kind = type(operator)
            dense = kind.to_dense

            def counted(self):
                largest.append(self.shape.numel())
                return dense(self)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(kind, "to_dense", counted)
                product = operator @ rhs
                gradient = torch.autograd.grad(product.sum(), kernel.raw_lengthscale)[0]
        assert_close(product, expected, 1e-11)
        assert max(largest) <= 20_000 / 32
        whole = torch.autograd.grad((kernel(x, z).evaluate_kernel() @ rhs).sum(), kernel.raw_lengthscale)[0]
        assert_close(gradient, whole, 1e-11)

    def test_distances_are_kept_between_steps_of_fitting(self, monkeypatch):
        kernel, x = make_kernel(make_network(), 1.5), randn(20, 3)
        count = count_grams(monkeypatch)
        for lengthscale in (1.0, 2.0, 3.0):
            kernel.lengthscale = lengthscale
            kernel(x).to_dense().sum().backward()
        assert len(count) == 1

    def test_variances_form_no_matrix(self, monkeypatch):
        count = count_grams(monkeypatch)
        kernel = make_kernel(make_network(), 1.5)
        assert kernel(randn(50, 3), diag=True).eq(1.0).all()
        assert kernel(randn(50, 3), randn(50, 3), diag=True).shape == (50,)
        assert count == []


def count_grams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the Gram matrices that the engines form from now on."""
    sizes: list[tuple[int, int]] = []
    for kind in (AutodiffJacobian, StructuredJacobian):
        original = kind.gram

        def gram(self, other, variances, original=original):
            sizes.append((self.num_rows, other.num_rows))
            return original(self, other, variances)

        monkeypatch.setattr(kind, "gram", gram)
    return sizes


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, kernel: gpytorch.kernels.Kernel):
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = NetworkMean(network)
        self.covar_module = kernel

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def recipe(network: nn.Module) -> gpytorch.kernels.Kernel:
    tangent = TangentMaternKernel(network)
    tangent.lengthscale = 2.5
    features = FeatureKernel(network, MaternKernel(nu=1.5))
    parts = (NTKKernel(network), MaternKernel(nu=1.5), features, tangent)
    return sum((ScaleKernel(part) for part in parts[1:]), start=ScaleKernel(parts[0]))


def recipe_matrix(model: Model, network: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """The sum by dense algebra, differentiable by all that is fitted."""
    scaled = model.covar_module.kernels
    lengthscales = [scaled[i].base_kernel.lengthscale for i in (1, 3)]
    lengthscales.insert(1, scaled[2].base_kernel.base_kernel.lengthscale)
    phi_x, phi_z = (network[:2](points).detach() for points in (x, z))
    distances = [
        (x[:, None] - z).norm(dim=-1),
        (phi_x[:, None] - phi_z).norm(dim=-1),
        explicit_distances(network, x, z)[..., 0],
    ]
    matrices = [references.kernel(network, x, z).detach()]
    matrices += [stationary(d / length, 1.5) for d, length in zip(distances, lengthscales, strict=True)]
    return sum(part.outputscale * matrix for part, matrix in zip(scaled, matrices, strict=True))


class TestModels:
    """NTK + Matérn + Matérn on features + Matérn in the network's metric, in a user's own ExactGP."""

    def make(self, n: int = 30) -> tuple[Model, nn.Module, Tensor, Tensor]:
        network, x = make_network(), randn(n, 3)
        y = torch.sin(x.sum(-1)) + 0.1 * randn(n)
        model = Model(x, y, network, recipe(network)).double()
        model.likelihood.noise = 0.05
        return model, network, x, y

    def test_marginal_likelihood_and_its_derivatives(self):
        model, network, x, y = self.make()
        model.train()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        parameters = list(model.parameters())
        actual = mll(model(x), y)
        covariance = recipe_matrix(model, network, x, x) + model.likelihood.noise * torch.eye(30, dtype=torch.float64)
        expected = references.log_marginal_likelihood(y - network(x).detach().squeeze(-1), covariance)
        assert_close(actual, expected)
        for one, other in zip(*(torch.autograd.grad(v, parameters) for v in (actual, expected)), strict=True):
            assert_close(one, other, 1e-9)

    def test_predictions_at_any_size(self):
        model, network, x, y = self.make(n=60)
        model.eval()
        z = randn(7, 3)
        both = torch.cat([x, z])
        prior = recipe_matrix(model, network, both, both).detach()
        mean, covariance = references.posterior(
            network(both).detach().squeeze(-1), prior, model.likelihood.noise.detach(), y
        )
        with torch.no_grad(), gpytorch.settings.max_eager_kernel_size(10), gpytorch.settings.max_cholesky_size(10):
            prediction = model(z)
            assert_close(prediction.mean, mean, 1e-9)
            assert_close(prediction.variance, covariance.diagonal(), 1e-9)
            assert_close(prediction.covariance_matrix, covariance, 1e-9)

    def test_derivatives_of_predictions_by_test_inputs(self):
        model, *_ = self.make(n=10)
        model.eval().requires_grad_(False)
        z = randn(2, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: (model(z).mean, model(z).covariance_matrix), z, fast_mode=True)

    def test_in_single_precision(self):
        model, network, x, y = self.make(n=40)
        z = randn(5, 3)
        single = Model(x.float(), y.float(), network, recipe(network)).float().eval()
        single.load_state_dict(model.state_dict())
        rounded = copy.deepcopy(network).float().double()
        both = torch.cat([x, z]).float().double()
        model.load_state_dict(single.state_dict())
        prior = recipe_matrix(model, rounded, both, both).detach()
        means = rounded(both).detach().squeeze(-1)
        mean, covariance = references.posterior(means, prior, model.likelihood.noise.detach(), y.float().double())
        with torch.no_grad():
            prediction = single(z.float())
        assert prediction.mean.dtype == torch.float32
        assert_close(prediction.mean.double(), mean, 1e-4)
        assert_close(prediction.variance.double(), covariance.diagonal(), 1e-4)

    def test_a_gram_matrix_is_formed_once_for_all(self, monkeypatch):
        model, _, x, y = self.make()
        model.train()
        mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
        sizes = count_grams(monkeypatch)
        for _ in range(3):
            mll(model(x), y).backward()
        assert sizes == [(30, 30)]

    def test_each_kernel_alone_predicts(self):
        _, network, x, y = self.make()
        z = randn(4, 3)
        for kernel, tolerance in ((make_kernel(network, 1.5), 1e-9), (ScaleKernel(make_kernel(network, 0.5)), 1e-9)):
            model = Model(x, y, network, kernel).double().eval()
            both = torch.cat([x, z])
            with torch.no_grad():
                prior = kernel(both).to_dense()
                means = network(both).squeeze(-1)
                mean, covariance = references.posterior(means, prior, model.likelihood.noise, y)
                assert_close(model(z).mean, mean, tolerance)
                assert_close(model(z).covariance_matrix, covariance, tolerance)

    def test_a_network_changed_after_predictions_were_prepared(self):
        model, _, x, _ = self.make()
        model.eval()
        model(x[:3])
        model.covar_module.kernels[3].base_kernel.linearize(make_network(width=4))
        with pytest.raises(RuntimeError, match="network has changed"):
            model(x[:3])

    def test_outputs_of_a_multitask_model(self):
        network, x, y, z = make_network(outputs=2), randn(12, 3), randn(12, 2), randn(4, 3)

        class Multitask(gpytorch.models.ExactGP):
            def __init__(self):
                likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(num_tasks=2, has_task_noise=False)
                super().__init__(x, y, likelihood)
                self.mean_module = NetworkMean(network, output="all")
                self.covar_module = NTKKernel(network, output="all") + make_kernel(network, 1.5, output="all")

            def forward(self, x):
                return gpytorch.distributions.MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))

        model = Multitask().double().eval()
        model.likelihood.noise = 0.1
        both = torch.cat([x, z])
        prior = references.kernel(network, both) + expected_matrix(network, both, both, 1.5, outputs=2)
        mean, covariance = references.posterior(network(both).reshape(-1), prior, 0.1, y.reshape(-1))
        with torch.no_grad():
            assert_close(model(z).mean.reshape(-1), mean, 1e-7)
            assert_close(model(z).covariance_matrix, covariance, 1e-7)

    def test_threads_predict_what_one_does(self):
        model, *_ = self.make()
        check_predictions(model.eval(), [randn(5, 3) for _ in range(THREADS)], assert_close)


class TestAsAKernelOfGPyTorch:
    def test_lengthscale_prior_and_constraint(self):
        constraint = gpytorch.constraints.GreaterThan(0.1)
        kernel = TangentMaternKernel(
            make_network(), lengthscale_prior=GammaPrior(2.0, 1.0), lengthscale_constraint=constraint
        )
        kernel.lengthscale = 0.7
        assert kernel.lengthscale.shape == (1, 1)
        assert [name for name, *_ in kernel.named_priors()] == ["lengthscale_prior"]
        assert kernel.raw_lengthscale_constraint is constraint
        assert kernel.lengthscale.dtype == torch.float64

    def test_state_pickle_and_copy(self):
        network, x = make_network(), randn(5, 3)
        kernel = make_kernel(network, 1.5)
        expected = kernel(x).to_dense()
        for copied in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
            assert_close(copied(x).to_dense(), expected)
        other = TangentMaternKernel(make_network(), 1.5)
        other.load_state_dict(kernel.state_dict())
        assert_close(other(x).to_dense(), expected)
        operator = pickle.loads(pickle.dumps(kernel(x).evaluate_kernel()))
        assert_close(operator.to_dense(), expected)

    def test_a_kernel_for_each_column_is_refused(self):
        with pytest.raises(NotImplementedError, match="active_dims"), pytest.warns(DeprecationWarning):
            make_kernel(make_network(), 1.5)(randn(4, 3), last_dim_is_batch=True).to_dense()

    @pytest.mark.parametrize("nu", [1.0, 0, "1.5"])
    def test_other_smoothness_is_refused(self, nu):
        with pytest.raises(ValueError, match="nu must be"):
            TangentMaternKernel(make_network(), nu)

    def test_bad_inputs(self):
        kernel, x = make_kernel(make_network(), 1.5), randn(4, 3)
        with pytest.raises(ValueError, match="NaN"):
            kernel(x.masked_fill(x > 0, torch.nan)).to_dense()
        with pytest.raises(ValueError, match="two sets of inputs differ"):
            kernel(x, x.float()).to_dense()
        with pytest.raises(ValueError, match="2 outputs"):
            make_kernel(make_network(outputs=2), 1.5)(x).to_dense()

    def test_new_snapshot(self):
        first, second, x = make_network(), make_network(width=5), randn(4, 3)
        kernel = make_kernel(first, 1.5)
        kernel(x).to_dense()
        kernel.linearize(second)
        assert_close(kernel(x).to_dense(), expected_matrix(second, x, x, 1.5))

    def test_user_network_is_left_alone(self):
        network, x = make_network().train(), randn(4, 3)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        make_kernel(network, 1.5).float()(x).to_dense().sum().backward()
        assert network.training
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


class TestMedianDistance:
    def test_is_that_of_all_pairs(self):
        network, x = make_network(), randn(20, 3)
        above = torch.ones(20, 20).triu(1).bool()
        expected = explicit_distances(network, x, x)[..., 0][above].median()
        assert make_kernel(network, 1.5).median_distance(x) == pytest.approx(float(expected), rel=1e-9)

    def test_many_points_and_batches(self):
        kernel, x = make_kernel(make_network(), 1.5), randn(2, 1500, 3)
        some = kernel.median_distance(x)
        assert some == kernel.median_distance(x)
        assert some == pytest.approx(kernel.median_distance(x[0, :900]), rel=0.1)

    def test_there_is_none_of_one_point(self):
        with pytest.raises(ValueError, match="two inputs"):
            make_kernel(make_network(), 1.5).median_distance(randn(1, 3).expand(4, 3))
