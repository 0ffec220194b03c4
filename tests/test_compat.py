"""Each private name of another package means what this package takes it for."""

from __future__ import annotations

import gpytorch
import pytest
import torch
import torch.nn.functional as F
from gpytorch.constraints import Positive
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import RBFKernel, ScaleKernel
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    IdentityLinearOperator,
    KernelLinearOperator,
    RootLinearOperator,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.overrides import TorchFunctionMode

from ntk_gp import _compat
from tests.adapted import assert_close

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only, pytest.mark.every_case]

F64 = torch.float64

# Kept: torch 2.8 goes on naming the operators of a library that is gone, and no torch.compile works after that.
LIBRARY = torch.library.Library("ntk_gp_tests", "FRAGMENT")
LIBRARY.define("without_batching_rule(Tensor x) -> Tensor")
LIBRARY.impl("without_batching_rule", lambda x: 2 * x, "CPU")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(0))


class TestTransforms:
    def test_innermost_transform(self):
        found = []

        def twice(x: Tensor) -> Tensor:
            found.append(_compat.innermost_transform())
            return 2 * x

        x = randn(3)
        with forward_ad.dual_level():  # that is none
            twice(forward_ad.make_dual(x, x))
        assert found == [None]
        vmap(twice)(x)
        jvp(twice, (x,), (x,))
        vjp(twice, x)
        assert None not in found[1:]
        vmap(lambda x: vmap(twice)(twice(x)))(randn(3, 2))
        assert found[-1].level() == found[-2].level() + 1
        assert _compat.innermost_transform() is None

    def test_is_transform_wrapper(self):
        x, found = randn(3), []

        def looks(y: Tensor) -> Tensor:
            found.append((_compat.is_transform_wrapper(x), _compat.is_transform_wrapper(y)))
            return y.sin()

        vmap(looks)(x)
        jvp(looks, (x,), (x,))
        vjp(looks, x)
        assert found == [(False, True)] * 3
        with forward_ad.dual_level():
            assert not _compat.is_transform_wrapper(forward_ad.make_dual(x, x))

    def test_set_vmap_warns_of_loops(self, recwarn, capfd):
        loop = vmap(torch.ops.ntk_gp_tests.without_batching_rule)
        warned = []
        try:
            for value in (False, True):
                _compat.set_vmap_warns_of_loops(value)
                loop(randn(3))
                printed = capfd.readouterr().err + "".join(str(warning.message) for warning in recwarn)
                warned.append("batching rule" in printed)
        finally:
            _compat.set_vmap_warns_of_loops(True)
        assert warned == [False, True]

    def test_dual_level_number(self):
        assert _compat.dual_level_number() == -1
        with forward_ad.dual_level():
            assert _compat.dual_level_number() == 0
        assert _compat.dual_level_number() == -1

    def test_function_modes(self):
        class Mode(TorchFunctionMode):
            calls = 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                self.calls += 1
                return function(*args, **(kwargs or {}))

        x = randn(3)
        with Mode() as outer, Mode() as inner:
            assert _compat.active_function_modes() == [outer, inner]
            with _compat.without_innermost_mode():
                assert _compat.active_function_modes() == [outer]
                torch.sin(x)
            assert _compat.active_function_modes() == [outer, inner]
            assert (outer.calls, inner.calls) == (1, 0)
        assert _compat.active_function_modes() == []

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.filterwarnings("ignore:.*CUDA is not available")
    def test_is_any_autocast_enabled(self, device):
        assert not _compat.is_any_autocast_enabled()
        context = torch.autocast(device, dtype=torch.bfloat16)
        with context:
            assert _compat.is_any_autocast_enabled() == context._enabled  # not without a GPU
            assert device == "cuda" or context._enabled
        assert not _compat.is_any_autocast_enabled()


class TestSwitches:
    @pytest.mark.parametrize(
        ("read", "write", "backend", "name"),
        [
            (_compat.is_onednn_enabled, _compat.set_onednn_enabled, torch.backends.mkldnn, "enabled"),
            (_compat.is_cudnn_enabled, _compat.set_cudnn_enabled, torch.backends.cudnn, "enabled"),
            (_compat.is_cudnn_deterministic, _compat.set_cudnn_deterministic, torch.backends.cudnn, "deterministic"),
            (_compat.is_cudnn_tf32_allowed, _compat.set_cudnn_tf32_allowed, torch.backends.cudnn, "allow_tf32"),
        ],
    )
    def test_of_a_backend(self, read, write, backend, name):
        before = read()
        try:
            for value in (not before, before, not before):
                write(value)
                assert read() is value
                assert getattr(backend, name) is value
        finally:
            write(before)

    @pytest.mark.parametrize("name", _compat.attention_switches)
    def test_of_attention(self, name):
        _, write = _compat.attention_switches[name]
        before = {each: read() for each, (read, _) in _compat.attention_switches.items()}
        try:
            write(not before[name])
            after = {each: read() for each, (read, _) in _compat.attention_switches.items()}
            assert after == before | {name: not before[name]}
        finally:
            write(before[name])

    def test_of_flash_attention(self):
        assert {"flash", "mem_efficient", "math"} <= _compat.attention_switches.keys()
        read, write = _compat.attention_switches["flash"]
        query, before = randn(1, 2, 8, 4).requires_grad_(), read()
        used = []
        try:
            for value in (True, False):
                write(value)
                result = F.scaled_dot_product_attention(query, query, query)
                used.append("Flash" in result.grad_fn.name())
        finally:
            write(before)
        assert used == [True, False]


class TestOperators:
    @pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
    @pytest.mark.parametrize("has_bias", [False, True])
    def test_onednn_linear(self, has_bias):
        x, weight, bias = (randn(*shape).float() for shape in ((5, 3), (4, 3), (4,)))
        expected = x @ weight.mT + (bias if has_bias else 0)
        assert_close(_compat.onednn_linear(x, weight, bias if has_bias else None, "none", [], ""), expected, 1e-6)

    def test_view_as_own(self):
        x = randn(2, 3).requires_grad_()
        product = 2 * x
        shaped = _compat.view_as_own(product, (3, 2))
        assert not _compat.is_view(shaped)
        assert shaped.data_ptr() == product.data_ptr()
        shaped.mul_(3).sum().backward()
        assert_close(x.grad, torch.full_like(x, 6))

    def test_weight_norm(self):
        v, g = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[10.0], [1.0]])
        torch.testing.assert_close(_compat.weight_norm(v, g, 0), torch.tensor([[6.0, 8.0], [0.0, 1.0]]))

    def test_norm_of_each(self):
        tensors = randn(10).split([3, 1, 6])
        norms = torch.stack(_compat.norm_of_each(tensors))
        assert_close(norms, torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))


class TestTensors:
    def test_version_of(self):
        x = randn(3)
        version = _compat.version_of(x)
        x.detach()[0].add_(1)
        assert _compat.version_of(x) == version + 1
        x.add(1)
        x.data.add_(1)  # leaves no trace
        assert _compat.version_of(x) == version + 1

    def test_views(self):
        parameter = nn.Parameter(randn(4, 3))
        for view in (parameter[1], parameter.mT[0], parameter.view(-1), parameter.expand(2, 4, 3)):
            assert _compat.is_view(view)
            assert _compat.base_of(view) is parameter
        for other in (parameter, parameter + 1, parameter[[0, 1]], parameter.clone()):
            assert not _compat.is_view(other)
            assert _compat.base_of(other) is None

    def test_sparse(self):
        x = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 3.0], (4,), check_invariants=True)
        assert not x.is_coalesced()
        assert _compat.sparse_indices(x).tolist() == [[0, 0, 2]]
        assert _compat.sparse_values(x).tolist() == [1.0, 2.0, 3.0]
        _compat.sparse_values(x)[0] = 5.0  # as it is in memory
        assert x.to_dense().tolist() == [7.0, 0.0, 3.0, 0.0]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


class TestGraphs:
    def test_input_metadata(self):
        x = randn(4, 3).requires_grad_()
        for node, shapes in (((x @ x.mT).grad_fn, [(4, 4)]), (x.unbind(0)[1].grad_fn, [(3,)] * 4)):
            assert [tuple(each.shape) for each in _compat.input_metadata(node)] == shapes

    def test_backward_class(self):
        x = randn(3).requires_grad_()
        assert type(_Twice.apply(x).grad_fn) is _compat.backward_class(_Twice)

    @pytest.mark.parametrize("dim", [0, 1, -1])
    @pytest.mark.parametrize(
        "function",
        [
            lambda x, dim: torch.cat([x, x], dim),
            lambda x, dim: x.log_softmax(dim),
            lambda x, dim: x.mean(dim),
            lambda x, dim: x.select(dim, 0),
            lambda x, dim: x.narrow(dim, 0, 1),
            lambda x, dim: x.softmax(dim),
            lambda x, dim: x.sum(dim),
        ],
        ids=["cat", "log_softmax", "mean", "select", "slice", "softmax", "sum"],
    )
    def test_saved_dimension(self, function, dim):
        saved = _compat.saved_dim(function(randn(3, 3, 3).requires_grad_(), dim).grad_fn)
        (saved,) = saved if isinstance(saved, tuple) else (saved,)
        assert saved in (dim % 3, dim % (1 << 64))  # negative ones as unsigned numbers of 64 bits

    def test_saved_slice(self):
        node = randn(7, 3)[2:].requires_grad_()[-3::2].grad_fn
        assert _compat.saved_start(node) in (2, -3, (1 << 64) - 3)
        assert _compat.saved_step(node) == 2

    def test_saved_arguments(self):
        node = randn(2, 3, 4).requires_grad_().transpose(0, 2).grad_fn
        assert (_compat.saved_dim0(node), _compat.saved_dim1(node)) == (0, 2)
        weight = randn(5, 2).requires_grad_()
        node = F.embedding(torch.tensor([0, 3]), weight, padding_idx=3).grad_fn
        assert _compat.saved_padding_idx(node) == 3
        node = F.layer_norm(randn(2, 3, 4).requires_grad_(), (3, 4)).grad_fn
        assert tuple(_compat.saved_normalized_shape(node)) == (3, 4)


class TestModules:
    def test_parameters(self):
        layer = nn.Linear(2, 2, bias=False)
        assert _compat.parameters_in(layer) == {"weight": layer.weight, "bias": None}
        assert _compat.parameters_in(layer) is vars(layer)[_compat.PARAMETERS]
        _compat.parameters_in(layer)["weight"] = new = nn.Parameter(randn(2, 2))
        assert layer.weight is new

    def test_buffers(self):
        layer = nn.BatchNorm1d(2)
        assert list(_compat.buffers_in(layer)) == ["running_mean", "running_var", "num_batches_tracked"]
        assert _compat.buffers_in(layer) is vars(layer)[_compat.BUFFERS]
        _compat.buffers_in(layer)["running_mean"] = new = randn(2)
        assert layer.running_mean is new

    def test_children(self):
        first, last = nn.Linear(2, 2), nn.Linear(2, 2)
        layers = nn.Sequential(first, nn.Tanh(), first)
        layers.register_module("3", None)
        assert list(_compat.children_in(layers)) == ["0", "1", "2", "3"]
        assert _compat.children_in(layers) is vars(layers)[_compat.CHILDREN]
        _compat.children_in(layers)["2"] = last
        assert layers[2] is last

    def test_compiled(self):
        layer = nn.Linear(2, 2)
        compiled = torch.compile(layer)
        assert _compat.children_in(compiled) == {_compat.COMPILED: layer}
        assert set(compiled.state_dict()) == {f"{_compat.COMPILED}.{name}" for name in layer.state_dict()}

    def test_leave_only_forward(self):
        def refuse(*_: object) -> None:
            raise AssertionError("called")

        layer, x = nn.Linear(2, 2, dtype=F64), randn(2).requires_grad_()
        expected = layer(x).detach()
        layer.register_full_backward_hook(refuse)
        layer.register_full_backward_pre_hook(refuse)
        layer.register_forward_hook(lambda module, args, output: output + 1)
        with pytest.raises(AssertionError, match="called"):
            layer(x).sum().backward()
        layer.compile(backend=refuse)
        with pytest.raises(Exception, match="called"):
            layer(x)
        _compat.leave_only_forward(layer)
        result = layer(x)
        result.sum().backward()
        assert_close(result.detach(), expected + 1)


class TestGPyTorch:
    def test_check_sample(self):
        for value in (torch.zeros(2), torch.full((3,), torch.nan)):
            _compat.check_sample(MultivariateNormal(torch.zeros(3), torch.eye(3)), value)
            with pytest.raises(ValueError):
                _compat.check_sample(MultivariateNormal(torch.zeros(3), torch.eye(3), validate_args=True), value)
        _compat.check_sample(MultivariateNormal(torch.zeros(3), torch.eye(3), validate_args=True), torch.ones(3))

    def test_own_batch_shape(self):
        kernel = ScaleKernel(RBFKernel(batch_shape=torch.Size([2])))
        assert (_compat.own_batch_shape(kernel), kernel.batch_shape) == (torch.Size(), torch.Size([2]))
        assert _compat.own_batch_shape(kernel.base_kernel) == torch.Size([2])

    def test_transforms_of(self):
        transform, inverse = _compat.transforms_of(Positive())
        raw = torch.linspace(-3, 3, 5)
        assert_close(inverse(transform(raw)), raw)
        assert _compat.transforms_of(Positive(torch.exp, torch.log)) == (torch.exp, torch.log)

    def test_is_interleaved(self):
        mean, covariance = torch.zeros(3, 2), torch.eye(6)
        assert _compat.is_interleaved(MultitaskMultivariateNormal(mean, covariance))
        assert not _compat.is_interleaved(MultitaskMultivariateNormal(mean, covariance, interleaved=False))

    def test_feature_flag(self):
        class flag(_compat.FeatureFlag):
            _default = True

        assert flag.on()
        assert flag.is_default()
        with flag(False):
            assert flag.off()
            assert not flag.is_default()
            with flag():
                assert flag.on()
            assert flag.off()
        assert flag.is_default()
        assert issubclass(gpytorch.settings.fast_pred_var, _compat.FeatureFlag)

    def test_value_setting(self):
        class setting(_compat.ValueSetting):
            _global_value = 3

            @classmethod
            def _set_value(cls, value: int) -> None:
                super()._set_value(abs(value))

        assert setting.value() == 3
        with setting(-4):
            assert setting.value() == 4
        assert setting.value() == 3
        assert issubclass(gpytorch.settings.eval_cg_tolerance, _compat.ValueSetting)


class TestLinearOperators:
    def test_arguments(self):
        diagonal = ConstantDiagLinearOperator(randn(2, 1).exp(), diag_shape=3)
        x, scale = randn(3, 1), randn(1).exp()
        kernel = KernelLinearOperator(
            x, x, covar_func=_scaled_products, scale=scale, num_nonbatch_dimensions={"scale": 0}
        )
        for operator in (diagonal, kernel, RootLinearOperator(diagonal)):
            arguments, keywords = _compat.arguments_of(operator), _compat.keyword_arguments_of(operator)
            assert_close(type(operator)(*arguments, **keywords).to_dense(), operator.to_dense())
        assert _compat.arguments_of(RootLinearOperator(diagonal)) == (diagonal,)
        assert _compat.keyword_arguments_of(diagonal) == {"diag_shape": 3}
        assert vars(diagonal)[_compat.OPTIONS] == {"diag_shape": 3}
        assert _compat.keyword_arguments_of(kernel)["scale"] is not None

    def test_added_diagonal(self):
        matrix, noise = DenseLinearOperator(randn(3, 3)), DiagLinearOperator(randn(3))
        for parts in ((matrix, noise), (noise, matrix)):
            operator = AddedDiagLinearOperator(*parts)
            assert _compat.without_diagonal(operator) is matrix
            assert _compat.added_diagonal(operator) is noise

    def test_constant_in(self):
        base, constant = DenseLinearOperator(randn(2, 3, 3)), randn(2)
        operator = ConstantMulLinearOperator(base, constant)
        assert _compat.constant_in(operator) is constant
        assert_close(operator.to_dense(), base.to_dense() * constant[:, None, None])

    def test_inv_quad_logdet(self):
        """Exact where there are as many probe vectors, and steps, as rows."""
        n = 5
        root = randn(n, n)
        dense = (root @ root.mT + torch.eye(n)).requires_grad_()
        y = randn(n, 2).requires_grad_()
        operator = DenseLinearOperator(dense)
        identity = IdentityLinearOperator(n, dtype=F64)
        probes = torch.eye(n, dtype=F64)  # of length √n, so that the mean of their outer products is I
        with gpytorch.settings.cg_tolerance(1e-12):
            inv_quad, logdet = _compat.InvQuadLogdet.apply(
                operator.representation_tree(),
                identity.representation_tree(),
                None,
                len(identity.representation()),
                True,
                probes,
                probes.new_full((1, n), n**0.5),
                y,
                *operator.representation(),
                *identity.representation(),
            )
        expected = (y * torch.linalg.solve(dense, y)).sum(-2)
        assert_close(inv_quad.detach(), expected.detach(), 1e-8)
        assert_close(logdet.detach(), torch.logdet(dense.detach()), 1e-8)
        for actual, wanted in zip(
            torch.autograd.grad(inv_quad.sum() + logdet, [dense, y]),
            torch.autograd.grad(expected.sum() + torch.logdet(dense), [dense, y]),
            strict=True,
        ):
            assert_close(actual, wanted, 1e-7)


def _scaled_products(x1: Tensor, x2: Tensor, scale: Tensor) -> Tensor:
    return scale * (x1 @ x2.mT)


def test_gaussian_likelihood_base():
    base = _compat.GaussianLikelihoodBase
    assert issubclass(gpytorch.likelihoods.GaussianLikelihood, base)
    assert issubclass(gpytorch.likelihoods.FixedNoiseGaussianLikelihood, base)
    assert callable(base._shaped_noise_covar)
