import copy
import math
import pickle

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, Tensor, nn

import ntk_gp
from ntk_gp import NTKKernel, NTKLinearOperator
from tests import layers, references


def make_network(inputs: int = 3, outputs: int = 1, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=0.0, atol=tolerance * max([1.0, *expected.abs().flatten().tolist()])
    )


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


engines = pytest.mark.parametrize("engine", ["structured", "autodiff"])


class TestValues:
    """Gram and cross-covariance matrices, diagonals, products and slices, against explicit per-sample Jacobians."""

    @engines
    @pytest.mark.parametrize("outputs", [1, 3])
    @pytest.mark.parametrize("batch_shape", [(), (2,), (3, 2)])
    def test_against_explicit_jacobians(self, engine, outputs, batch_shape):
        network = make_network(outputs=outputs)
        kernel = NTKKernel(network, output=None if outputs == 1 else "all", engine=engine)
        x1, x2 = randn(*batch_shape, 5, 3), randn(*batch_shape, 4, 3)
        gram, cross = references.kernel(network, x1), references.kernel(network, x1, x2)
        rhs = randn(*batch_shape, 4 * outputs, 6)
        assert_close(kernel(x1).to_dense(), gram)
        assert_close(kernel(x1, x2).to_dense(), cross)
        assert_close(kernel(x1, diag=True), gram.diagonal(dim1=-2, dim2=-1))
        assert_close(kernel(x1[..., :4, :], x2, diag=True), cross.diagonal(dim1=-2, dim2=-1))
        assert_close(kernel(x1, x2) @ rhs, cross @ rhs)
        assert_close(kernel(x1, x2).mT @ gram, cross.mT @ gram)
        assert_close(kernel(x1)[..., 2 * outputs :, : 3 * outputs].to_dense(), gram[..., 2 * outputs :, : 3 * outputs])
        assert_close(kernel(x1, x2)[..., 1, :], cross[..., 1, :])
        assert_close(kernel(x1, x2)[..., 1:3, ::2].to_dense(), cross[..., 1:3, ::2])
        operator = kernel(x1, x2).evaluate_kernel()
        assert_close(operator[..., 1:4, 2:].to_dense(), cross[..., 1:4, 2:])
        assert_close(operator[..., 3, :], cross[..., 3, :])
        assert_close(operator[..., :, 2], cross[..., :, 2])
        assert_close(operator[..., torch.tensor([3, 0, 3]), 1:].to_dense(), cross[..., [3, 0, 3], 1:])
        rows, columns = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 2])
        assert_close(kernel(x1, x2)[..., rows, columns], cross[..., rows, columns])
        assert_close(kernel(x1)[..., rows, :].to_dense(), gram[..., rows, :])

    @pytest.mark.parametrize("name", layers.NETWORKS)
    def test_every_layer(self, name):
        network, x = layers.make(name)
        kernel = NTKKernel(network)
        assert_close(kernel(x[:3], x).to_dense(), references.kernel(network, x[:3], x))
        assert_close(kernel(x, diag=True), references.kernel(network, x).diagonal())

    @given(
        widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
        activation=st.sampled_from([nn.Tanh(), nn.ReLU(), nn.SiLU(), nn.Softplus()]),
        bias=st.booleans(),
        n1=st.integers(0, 4),
        n2=st.integers(1, 4),
        batch1=st.sampled_from([(), (1,), (2,), (3, 1), (3, 2)]),
        batch2=st.sampled_from([(), (1,), (2,), (3, 1), (3, 2)]),
        groups=st.sampled_from([None, "layer", "parameter"]),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        seed=st.integers(0, 1000),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_architecture_shape_and_dtype(
        self, widths, activation, bias, n1, n2, batch1, batch2, groups, dtype, seed
    ):
        torch.manual_seed(seed)
        network = nn.Sequential()
        for d_in, d_out in zip(widths, [*widths[1:], 2], strict=True):
            network.extend([nn.Linear(d_in, d_out, bias=bias), activation])
        network = network[:-1].double()
        kernel = NTKKernel(network, output="all", variance_groups=groups, batch_shape=Size(batch1))
        x1, x2 = randn(*batch1, n1, widths[0]), randn(*batch2, n2, widths[0])
        variances = None
        if groups is not None:
            kernel.variance = torch.rand_like(kernel.variance) + 0.5
            counts = [p.numel() for p in network.parameters()]
            if groups == "layer":
                counts = [sum(p.numel() for p in layer.parameters()) for layer in network if [*layer.parameters()]]
            variances = kernel.variance.detach().repeat_interleave(torch.tensor(counts), dim=-1)
        if n1 == 0:
            expected = torch.zeros(*torch.broadcast_shapes(batch1, batch2), 0, 2 * n2, dtype=torch.float64)
        else:
            expected = references.kernel(network, x1, x2, variances).detach()
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        actual = kernel(x1.to(dtype), x2.to(dtype))
        assert actual.shape == expected.shape
        assert actual.to_dense().dtype == dtype
        assert_close(actual.to_dense().double(), expected, tolerance)
        rhs = randn(2 * n2, 2)
        assert_close((actual.evaluate_kernel() @ rhs.to(dtype)).double(), expected @ rhs, 10 * tolerance)

    def test_tied_and_frozen_parameters(self):
        network, x = layers.make("tied")
        network[-1].requires_grad_(False)
        assert_close(NTKKernel(network)(x).to_dense(), references.kernel(network, x))

    @pytest.mark.parametrize(
        ("selection", "chosen"),
        [
            ("2.*", ("2.weight", "2.bias")),
            (["0.weight", "2.bias"], ("0.weight", "2.bias")),
            (lambda name, parameter: parameter.dim() == 1, ("0.bias", "2.bias")),
        ],
    )
    def test_selections(self, selection, chosen):
        network, x = make_network(), randn(5, 3)
        jacobian = references.jacobian(network, x, [dict(network.named_parameters())[name] for name in chosen])
        kernel = NTKKernel(network.requires_grad_(False), parameters=selection)
        assert kernel.network.parameter_names == chosen
        assert_close(kernel(x).to_dense(), jacobian @ jacobian.mT)

    @pytest.mark.parametrize("output", [0, 2, -1])
    def test_one_output(self, output):
        network, x = make_network(outputs=3), randn(5, 3)
        jacobian = references.jacobian(network, x).reshape(5, 3, -1)[:, output]
        assert_close(NTKKernel(network, output=output)(x).to_dense(), jacobian @ jacobian.mT)

    def test_input_shape_and_active_dims(self):
        network, x = layers.make("Conv2d")
        wide = torch.cat([randn(5, 2), x], dim=-1)
        kernel = NTKKernel(network[1:], input_shape=(1, 4, 4), active_dims=tuple(range(2, 18)))
        assert_close(kernel(wide).to_dense(), references.kernel(network, x))

    def test_jacobian(self):
        network, x = make_network(outputs=2), randn(4, 3)
        assert_close(NTKKernel(network, output="all").jacobian(x).to_dense(), references.jacobian(network, x))

    def test_one_dimensional_inputs(self):
        network, x = make_network(inputs=1), randn(4)
        assert_close(NTKKernel(network)(x).to_dense(), references.kernel(network, x.unsqueeze(-1)))

    def test_last_dim_is_batch(self):
        network, x = make_network(inputs=1), randn(5, 3)
        expected = torch.stack([references.kernel(network, column.unsqueeze(-1)) for column in x.mT])
        with pytest.warns(DeprecationWarning):
            assert_close(NTKKernel(network)(x, last_dim_is_batch=True).to_dense(), expected)

    def test_computes_in_the_dtype_of_the_inputs(self):
        network, x = make_network(), randn(5, 3)
        kernel = NTKKernel(copy.deepcopy(network).float())
        assert kernel(x).to_dense().dtype == torch.float64
        assert_close(kernel(x).to_dense(), references.kernel(copy.deepcopy(network).float().double(), x))
        assert kernel(x.float()).to_dense().dtype == torch.float32


class TestDerivatives:
    @pytest.mark.parametrize("groups", [None, "layer"])
    @pytest.mark.parametrize("same", [True, False])
    @pytest.mark.parametrize("way", ["dense", "product", "diagonal"])
    def test_inputs_and_scales(self, groups, same, way):
        network = make_network()
        kernel = ScaleKernel(NTKKernel(network, variance_groups=groups)).double()
        x1 = randn(5, 3).requires_grad_()
        x2 = x1 if same else randn(5, 3).requires_grad_()
        left, right = randn(5, 2), randn(5, 2)
        operator = kernel(x1, x2)
        if way == "dense":
            value = (left * (operator.to_dense() @ right)).sum()
        elif way == "product":
            value = (left * (operator @ right)).sum()
        else:
            value = (left[:, 0] * operator.diagonal()).sum()
        variances = kernel.outputscale
        if groups is not None:
            counts = [sum(p.numel() for p in network[i].parameters()) for i in (0, 2)]
            variances = variances * kernel.base_kernel.variance.repeat_interleave(torch.tensor(counts), dim=-1)
        expected = references.kernel(network, x1, x2, variances)
        reference = (left * (expected @ right)).sum() if way != "diagonal" else (left[:, 0] * expected.diagonal()).sum()
        assert_close(value, reference)
        wanted = [*({x1, x2}), *kernel.parameters()]
        gradients = torch.autograd.grad(value, wanted), torch.autograd.grad(reference, wanted)
        for actual, expected in zip(*gradients, strict=True):
            assert_close(actual, expected)

    @pytest.mark.parametrize("moving", ["x1", "x2", "both", "neither"])
    @pytest.mark.parametrize("indices", [([1, 1, 1], [0, 3, 2]), ([0, 1, 2, 3, 4, 1], [0, 3, 2, 1, 0, 1])])
    def test_single_entries(self, indices, moving):
        network = make_network()
        kernel = ScaleKernel(NTKKernel(network)).double()
        x1, x2 = randn(5, 3), randn(4, 3)
        wanted = [*kernel.parameters()]
        for x, name in ((x1, "x1"), (x2, "x2")):
            if moving in (name, "both"):
                wanted.append(x.requires_grad_())
        rows, columns = (torch.tensor(index) for index in indices)
        actual = kernel(x1, x2).evaluate_kernel()[rows, columns]
        expected = (kernel.outputscale * references.kernel(network, x1, x2))[rows, columns]
        assert_close(actual, expected)
        weights = randn(len(rows))
        gradients = torch.autograd.grad(actual @ weights, wanted), torch.autograd.grad(expected @ weights, wanted)
        for one, other in zip(*gradients, strict=True):
            assert_close(one, other)

    def test_one_set_of_inputs_alone(self):
        """Acquisition functions move the test inputs; the training inputs stay."""
        network, train = make_network(), randn(6, 3)
        test = randn(2, 4, 3).requires_grad_()
        rhs = randn(6, 1)
        (actual,) = torch.autograd.grad((NTKKernel(network)(test, train) @ rhs).sum(), test)
        (expected,) = torch.autograd.grad((references.kernel(network, test, train) @ rhs).sum(), test)
        assert_close(actual, expected)

    def test_gradcheck(self):
        kernel = NTKKernel(make_network())
        x1, x2 = randn(3, 3).requires_grad_(), randn(2, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: kernel(a, b).to_dense(), (x1, x2), fast_mode=True)
        assert torch.autograd.gradcheck(lambda a: kernel(a, diag=True), (x1,), fast_mode=True)

    def test_a_small_budget_changes_no_derivative(self):
        network = make_network()
        kernel = ScaleKernel(NTKKernel(network, variance_groups="layer")).double()
        gradients = []
        for budget in (1, 10**9):
            with ntk_gp.settings.memory_budget(budget):
                x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3).requires_grad_()
                value = (kernel(x) @ torch.ones(5, 1, dtype=torch.float64)).square().sum() + kernel(x).to_dense().sum()
                gradients.append(torch.autograd.grad(value, [x, *kernel.parameters()]))
        for small, large in zip(*gradients, strict=True):
            assert_close(small, large)


class TestComposition:
    def test_scale_is_absorbed(self):
        network, x = make_network(), randn(5, 3)
        kernel = ScaleKernel(NTKKernel(network)).double()
        kernel.outputscale = 2.5
        operator = kernel(x).evaluate_kernel()
        assert isinstance(operator, NTKLinearOperator)
        assert_close(operator.to_dense(), 2.5 * references.kernel(network, x))

    @pytest.mark.parametrize("batch_shape", [(2,), (3, 2)])
    @pytest.mark.parametrize("inner", [True, False])
    def test_batched_scale(self, batch_shape, inner):
        network, x = make_network(), randn(5, 3)
        kernel = ScaleKernel(
            NTKKernel(network, batch_shape=Size(batch_shape) if inner else None), batch_shape=Size(batch_shape)
        ).double()
        kernel.outputscale = torch.rand(*batch_shape, dtype=torch.float64) + 0.5
        expected = kernel.outputscale[..., None, None] * references.kernel(network, x)
        operator = kernel(x)
        assert operator.shape == expected.shape
        assert isinstance(operator.evaluate_kernel(), NTKLinearOperator)
        assert_close(operator.to_dense(), expected)
        assert_close(kernel(x, diag=True), expected.diagonal(dim1=-2, dim2=-1))
        rhs = randn(*batch_shape, 5, 2)
        assert_close(operator @ rhs, expected @ rhs)
        assert_close(operator[..., 1:, :2].to_dense(), expected[..., 1:, :2])

    def test_sums_and_products(self):
        network, x, z = make_network(), randn(5, 3), randn(4, 3)
        ntk, rbf = NTKKernel(network), RBFKernel().double()
        expected, stationary = references.kernel(network, x, z), rbf(x, z).to_dense()
        assert_close((ntk + rbf)(x, z).to_dense(), expected + stationary)
        assert_close((ntk * rbf)(x, z).to_dense(), expected * stationary)
        assert_close((ntk + ScaleKernel(ntk)).double()(x, z).to_dense(), expected * (1 + math.log(2)), 1e-7)
        assert_close((ntk * ntk)(x, z).to_dense(), expected.square())
        assert_close((ntk + rbf)(x, diag=True), references.kernel(network, x).diagonal() + 1)


class TestBatches:
    def test_variances_of_each_batch(self):
        network, x = make_network(), randn(2, 5, 3)
        kernel = NTKKernel(network, variance_groups="parameter", batch_shape=Size([3, 2]))
        kernel.variance = torch.rand(3, 2, 1, 4) + 0.5
        counts = torch.tensor([p.numel() for p in network.parameters()])
        expected = references.kernel(network, x, variances=kernel.variance.detach().repeat_interleave(counts, dim=-1))
        assert_close(kernel(x).to_dense(), expected)
        assert_close(kernel[1](x).to_dense(), expected[1])
        assert_close(kernel[:, 1](x[1]).to_dense(), expected[:, 1])
        assert_close(kernel[..., 1](x[1]).to_dense(), expected[:, 1])
        assert_close(kernel[torch.tensor([0, 2]), torch.tensor([1, 1])](x[[1, 1]]).to_dense(), expected[[0, 2], [1, 1]])
        assert_close(kernel(x)[2, 0].to_dense(), expected[2, 0])

    def test_expand_batch(self):
        network, x = make_network(), randn(5, 3)
        kernel = NTKKernel(network, variance_groups="layer", batch_shape=Size([2]))
        expanded = kernel.expand_batch(3, 2)
        assert expanded.batch_shape == Size([3, 2])
        assert expanded.variance.shape == (3, 2, 1, 2)
        assert kernel.expand_batch(Size([2])) is kernel
        assert kernel.batch_shape == Size([2])
        assert_close(expanded(x).to_dense(), kernel(x).to_dense().expand(3, 2, 5, 5))

    @pytest.mark.parametrize(
        "derive", [lambda kernel: kernel[0], lambda kernel: kernel.expand_batch(3, 2), copy.deepcopy]
    )
    def test_the_network_is_shared(self, derive):
        kernel = NTKKernel(make_network(), variance_groups="layer", batch_shape=Size([2]))
        derived = derive(kernel)
        for one, other in zip(kernel.network.buffers(), derived.network.buffers(), strict=True):
            assert one.data_ptr() == other.data_ptr()

    def test_equal_batches_share_one_jacobian(self, monkeypatch):
        """BoTorch's t-batches repeat the training inputs."""
        network, x = make_network(), randn(5, 3)
        kernel = NTKKernel(network)
        shapes = []
        linearize = type(kernel._linearization.engine).linearize
        monkeypatch.setattr(
            type(kernel._linearization.engine),
            "linearize",
            lambda self, x, *known: shapes.append(x.shape) or linearize(self, x, *known),
        )
        repeated = x.expand(7, 5, 3).contiguous()
        assert_close(kernel(repeated).to_dense(), references.kernel(network, x).expand(7, 5, 5))
        assert shapes == [(1, 5, 3)]


class TestVariances:
    def test_groups(self):
        kernel = NTKKernel(make_network(), variance_groups=lambda name: name.rpartition(".")[2])
        assert kernel.network.group_names == ("weight", "bias")
        assert [name for name, _ in kernel.named_parameters()] == ["raw_variance"]

    def test_setting_and_priors(self):
        kernel = NTKKernel(make_network(), variance_groups="layer", variance_prior=GammaPrior(2.0, 1.0))
        kernel.variance = torch.tensor([0.5, 2.0])
        assert_close(kernel.variance, torch.tensor([[0.5, 2.0]], dtype=torch.float64), 1e-6)
        kernel.initialize(variance=3.0)
        assert_close(kernel.variance, torch.full((1, 2), 3.0, dtype=torch.float64), 1e-6)
        ((_, module, prior, closure, _),) = kernel.named_priors()
        assert_close(
            prior.log_prob(closure(module)), prior.log_prob(torch.full((1, 2), 3.0, dtype=torch.float64)), 1e-6
        )
        with pytest.raises(TypeError, match=r"Expected gpytorch.priors.Prior but got float"):
            NTKKernel(make_network(), variance_groups="layer", variance_prior=1.0)

    def test_constraint(self):
        kernel = NTKKernel(
            make_network(), variance_groups="layer", variance_constraint=gpytorch.constraints.Interval(0.1, 0.3)
        )
        assert ((kernel.variance > 0.1) & (kernel.variance < 0.3)).all()


class TestState:
    def test_no_weight_is_a_parameter(self):
        kernel = ScaleKernel(NTKKernel(make_network(), variance_groups="layer"))
        assert sorted(name for name, _ in kernel.named_parameters()) == ["base_kernel.raw_variance", "raw_outputscale"]

    @pytest.mark.parametrize("groups", [None, "layer"])
    def test_state_dict_round_trip(self, groups):
        network, x = make_network(), randn(5, 3)
        source = NTKKernel(network, variance_groups=groups)
        target = NTKKernel(nn.Sequential(*[copy.deepcopy(layer) for layer in network]), variance_groups=groups)
        target.load_state_dict({name: 2 * tensor for name, tensor in source.state_dict().items()})
        before = target(x).to_dense()
        target.load_state_dict(source.state_dict())
        assert not torch.allclose(before, source(x).to_dense())
        assert torch.equal(target(x).to_dense(), source(x).to_dense())

    def test_linearize(self):
        network, x = make_network(), randn(5, 3)
        kernel = NTKKernel(network, variance_groups="layer", parameters="*weight")
        kernel.variance = 2.0
        kernel(x).to_dense()
        with torch.no_grad():
            network[0].weight.mul_(1.5)
        kernel.linearize(network)
        jacobian = references.jacobian(network, x, [network[0].weight, network[2].weight])
        assert_close(kernel(x).to_dense(), 2 * jacobian @ jacobian.mT, 1e-6)
        with pytest.raises(ValueError, match=r"variance groups are \('0',\), this kernel's \('0', '2'\). Make a new"):
            kernel.linearize(network[:1])

    def test_state_dict_names_are_the_networks(self):
        network = make_network()
        assert {f"network.tensors.{name}" for name in network.state_dict()} == set(NTKKernel(network).state_dict())

    @pytest.mark.parametrize(
        "network",
        [
            make_network(),
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).double(),
            nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).double(),
        ],
    )
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda kernel: pickle.loads(pickle.dumps(kernel))])
    @pytest.mark.parametrize("used", [True, False])
    def test_copies(self, network, copied, used):
        x = randn(5, 3)
        kernel = ScaleKernel(NTKKernel(network, variance_groups="layer")).double()
        if used:
            kernel(x).to_dense()
        copy_of_it = copied(kernel)
        assert torch.equal(copy_of_it(x).to_dense(), kernel(x).to_dense())
        before = kernel(x).to_dense()
        copy_of_it.load_state_dict({name: 2 * tensor for name, tensor in kernel.state_dict().items()})
        assert torch.equal(kernel(x).to_dense(), before)
        assert not torch.allclose(copy_of_it(x).to_dense(), before)

    @pytest.mark.parametrize("convert", [lambda k: k.float(), lambda k: k.to(torch.bfloat16), lambda k: k.half()])
    def test_conversion_rounds_the_weights(self, convert):
        network, x = make_network(), randn(5, 3)
        kernel = convert(NTKKernel(network))
        dtype = next(kernel.network.buffers()).dtype
        assert dtype != torch.float64
        expected = references.kernel(copy.deepcopy(network).to(dtype).double(), x)
        assert_close(kernel(x).to_dense(), expected)

    def test_optimisers_and_train_mode_leave_it_alone(self):
        network, x = (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)).double(),
            randn(5, 3),
        )
        kernel = NTKKernel(network)
        expected = kernel(x).to_dense()
        kernel.train().requires_grad_(True)
        assert list(kernel.parameters()) == []
        kernel._linearization.clear()
        assert torch.equal(kernel(x).to_dense(), expected)

    def test_dtype_and_device(self):
        kernel = NTKKernel(make_network(), variance_groups="layer")
        assert kernel.dtype == kernel.raw_variance.dtype == torch.float64
        assert NTKKernel(make_network().half()).dtype == torch.float32
        assert kernel.float().dtype == torch.float32
        assert kernel.half().dtype == torch.float32
        assert kernel.device == torch.device("cpu")


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")


class TestWrappers:
    @pytest.mark.parametrize("wrap", [compiled, nn.DataParallel])
    def test_wrapped_networks(self, wrap):
        network, x = make_network(), randn(5, 3)
        kernel = NTKKernel(wrap(network))
        assert kernel.network.parameter_names == tuple(name for name, _ in network.named_parameters())
        assert_close(kernel(x).to_dense(), references.kernel(network, x))

    def test_compiled_parts(self):
        network, x = make_network(), randn(5, 3)
        expected = references.kernel(network, x)
        network[0] = compiled(network[0])
        kernel = NTKKernel(network)
        assert kernel.network.parameter_names == ("0.weight", "0.bias", "2.weight", "2.bias")
        assert_close(kernel(x).to_dense(), expected)

    def test_compiled_in_place(self):
        network, x = make_network(), randn(5, 3)
        network.compile(backend="eager")
        assert_close(NTKKernel(network)(x).to_dense(), references.kernel(network, x))

    def test_autocast_does_not_reach_in(self):
        network, x = make_network().float(), torch.randn(5, 3)
        expected = NTKKernel(network)(x).to_dense()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = NTKKernel(network)(x).to_dense()
        assert torch.equal(actual, expected)

    def test_inference_mode(self):
        network = make_network()
        with torch.inference_mode():
            x = randn(5, 3)
            kernel = NTKKernel(network)
            dense, product = kernel(x).to_dense(), kernel(x) @ x
        expected = references.kernel(network, x.clone())
        assert_close(dense, expected)
        assert_close(product, expected @ x)
        z = x.clone().requires_grad_()
        kernel(z).to_dense().sum().backward()  # what was kept in inference mode is no obstacle


def analytic_relu_ntk(x: Tensor) -> Tensor:
    """The infinitely wide limit for one hidden ReLU layer without biases, both layers' weights N(0, 1/fan-in)·√2, 1.

    Arc-cosine kernels of order 0 and 1 (Cho and Saul, 2009): Θ = κ₁ + xᵀx' κ₀ (Jacot, Gabriel and Hongler, 2018).
    """
    norms = x.norm(dim=-1)
    scale = norms.unsqueeze(-1) * norms
    cosine = (x @ x.mT / scale).clamp(-1, 1)
    angle = torch.acos(cosine)
    first = scale * ((1 - cosine.square()).sqrt() + (math.pi - angle) * cosine) / math.pi
    return (first + scale * cosine * (math.pi - angle) / math.pi) / x.shape[-1]


class WideNetwork(nn.Module):
    """√(2/m) v·relu(W x / √d) in the NTK parametrisation, v and W standard normal."""

    def __init__(self, inputs: int, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.hidden = nn.Parameter(torch.randn(width, inputs, dtype=torch.float64, generator=generator))
        self.head = nn.Parameter(torch.randn(width, dtype=torch.float64, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(x @ self.hidden.mT / math.sqrt(x.shape[-1]))
        return features @ self.head * math.sqrt(2 / len(self.head))


def test_wide_networks_tend_to_the_analytic_kernel():
    """The distance falls as 1/√width: by about 8 from width 64 to 4096."""
    torch.manual_seed(0)
    x = randn(6, 4)
    limit = analytic_relu_ntk(x)
    errors = {
        width: torch.stack(
            [(NTKKernel(WideNetwork(4, width, seed))(x).to_dense() - limit).norm() for seed in range(10)]
        ).square().mean().sqrt()
        for width in (64, 4096)
    }  # fmt: skip
    assert errors[4096] < 0.05 * limit.norm()
    assert 5 < errors[64] / errors[4096] < 12.8
