"""Modules handed out: they own their tensors, are traced, transformed, exported and saved, and served from threads."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable

import gpytorch
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from ntk_gp import LinearizedNetwork, NetworkMean, NTKKernel, adapted_network, draw_functions
from tests import references
from tests.adapted import SMALL, AdaptedGP, assert_close, data, network
from tests.in_threads import in_threads
from tests.networks import CASES, Case

# Those of them that are different for a tracer: selections and groups of parameters are not.
NAMES = ("mlp_outputs", "selected_biases", "vision_transformer", "weight_norm", "heads")
TRACED = [case for case in CASES if case.name in NAMES]
# torch's second derivatives of convolutions and embeddings ask for the number of inputs.
FIXED_SIZE = ("vision_transformer",)


def named(cases: list[Case]) -> Callable:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def model_of(net: nn.Module, dtype: torch.dtype = torch.float64, **options) -> AdaptedGP:
    outputs = 2 if options.get("output") == "all" else None
    x, y = data(SMALL, outputs=outputs)
    model = AdaptedGP(x.to(dtype), y.to(dtype), net, NTKKernel(net, **options), output=options.get("output"))
    if outputs is not None:
        model.likelihood = gpytorch.likelihoods.MultitaskGaussianLikelihood(2, has_task_noise=False).double()
    return model.to(dtype).eval()


def linearized(case: Case, seed: int = 0) -> tuple[LinearizedNetwork, nn.Module, Tensor]:
    """The linearised network, the plain one, and a displacement."""
    options = {name: value for name, value in case.options.items() if name != "group_by"}
    net = case.network()
    size = LinearizedNetwork(net, **options).displacement.shape
    displacement = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return LinearizedNetwork(net, displacement, **options), net, displacement


def expected_values(case: Case, net: nn.Module, module: LinearizedNetwork, displacement: Tensor, x: Tensor) -> Tensor:
    """f(x) + J(x) w by one gradient for each output of each input."""
    shape = case.options.get("input_shape", (case.width,))
    shaped = nn.Sequential(nn.Unflatten(1, shape), net) if len(shape) > 1 else net
    parameters = [dict(net.named_parameters())[name] for name in module.network.parameter_names]
    values = shaped(x).detach().reshape(len(x), -1)
    values = values + (references.jacobian(shaped, x, parameters) @ displacement).reshape(values.shape)
    output = case.options.get("output")
    return values if output == "all" else values[:, output or 0]


def gradient(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(module(x).sin().sum(), x)[0]


class TestOwnership:
    @pytest.mark.parametrize("build", [adapted_network, lambda model: draw_functions(model, 2)])
    @pytest.mark.parametrize(
        "change",
        [
            lambda module: module.half(),
            lambda module: module.to(torch.bfloat16),
            lambda module: [buffer.zero_() for buffer in module.buffers()],
            lambda module: [buffer.data.add_(1.0) for buffer in module.buffers()],
            lambda module: module.load_state_dict({k: 0 * v for k, v in module.state_dict().items()}),
        ],
        ids=["half", "to", "in place", "data", "load"],
    )
    def test_neither_sees_a_change_of_the_other(self, build, change):
        model, x = model_of(network()), data(5, seed=1)[0]
        module = build(model)
        prediction, value = model(x), module(x)
        before = prediction.mean.clone(), prediction.covariance_matrix.clone()
        copied = copy.deepcopy(module)
        change(copied)
        assert torch.equal(module(x), value)
        change(module)
        assert torch.equal(model(x).mean, before[0])
        assert torch.equal(model.train().eval()(x).covariance_matrix, before[1])
        module = build(model) if build is adapted_network else None
        with torch.no_grad():
            change(model.mean_module), change(model.covar_module)
        if module is not None:
            assert torch.equal(module(x), value)

    def test_storages_are_its_own(self):
        model = model_of(network())
        theirs = {tensor.data_ptr() for tensor in (*model.buffers(), *model.parameters())}
        for module in (adapted_network(model), draw_functions(model, 2), LinearizedNetwork(network())):
            own = {tensor.data_ptr() for tensor in module.buffers()}
            again = {tensor.data_ptr() for tensor in copy.deepcopy(module).buffers()}
            assert own.isdisjoint(theirs) and own.isdisjoint(again)
            assert not list(module.parameters())


@pytest.mark.engine_independent
@pytest.mark.costly
class TestTracing:
    @named(TRACED)
    def test_export(self, case):
        module, net, displacement = linearized(case)
        x = case.inputs(5)[0]
        assert_close(module(x), expected_values(case, net, module, displacement, x), 1e-10)
        dynamic = None if case.name in FIXED_SIZE else ({0: Dim("n", min=1)},)
        exported = export(module, (x,), dynamic_shapes=dynamic).module()
        for z in (x,) if dynamic is None else (x, x[:1], case.inputs(9, seed=1)[0]):
            assert_close(exported(z), module(z).detach(), 1e-12)
        assert_close(gradient(exported, x), gradient(module, x), 1e-10)

    def test_exported_programs_hold_no_derivatives(self):
        module = adapted_network(model_of(network()))
        x = data(5)[0]
        program = export(module, (x,), dynamic_shapes=({0: Dim("n")},))
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert all(isinstance(target, torch._ops.OpOverload) or target.__module__ == "_operator" for target in targets)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        z = data(3, seed=2)[0]
        assert_close(torch.export.load(file).module()(z), module(z), 1e-12)

    def test_batches_selections_and_drawn_functions(self):
        model, x = model_of(network(outputs=2), output="all", parameters="2.*"), data(2, 3, seed=1)[0]
        for module in (adapted_network(model), draw_functions(model, 3)):
            exported = export(module, (x,), dynamic_shapes=({0: Dim("b"), 1: Dim("n")},)).module()
            z = data(3, 4, seed=2)[0]
            assert_close(exported(z), module(z), 1e-12)

    def test_a_module_that_was_loaded_and_never_called(self):
        adapted = adapted_network(model_of(network()))
        loaded = LinearizedNetwork(network(seed=3))
        loaded.load_state_dict(adapted.state_dict())
        x = data(5, seed=1)[0]
        assert_close(export(loaded, (x,)).module()(x), adapted(x), 1e-12)

    def test_a_network_that_detaches(self):
        class Gated(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * x.detach().sigmoid().mean(-1, keepdim=True)

        module, x = LinearizedNetwork(Gated(3, 1).double(), torch.ones(4)), data(5)[0]
        with pytest.warns(UserWarning, match="calls detach"):
            exported = export(module, (x,)).module()
        assert_close(exported(x), module(x), 1e-12)

    def test_padding_rows(self):
        """torch's forward mode moves the padding row of an embedding, which no gradient reaches."""
        net = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 1)).double()
        net.insert(0, layer := nn.Identity())
        layer.forward = lambda x: x.long()
        module = LinearizedNetwork(net, torch.ones(22, dtype=torch.float64))
        x = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
        exported = export(module, (x,)).module()
        jacobian = references.jacobian(net, x)
        assert_close(exported(x), net(x).detach().squeeze(-1) + jacobian.sum(-1), 1e-12)

    @pytest.mark.parametrize(
        ("backend", "loaded"),
        [("aot_eager", True), ("aot_eager", False), pytest.param("inductor", False, marks=pytest.mark.thorough)],
    )
    def test_compile(self, backend, loaded):
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)).double()
        module = adapted_network(model_of(net))
        if loaded:
            state, module = module.state_dict(), LinearizedNetwork(net)
            module.load_state_dict(state)
        compiled, x = torch.compile(module, backend=backend, fullgraph=True), data(5, seed=1)[0]
        assert_close(compiled(x), module(x), 1e-12)
        assert_close(gradient(compiled, x), gradient(module, x), 1e-10)
        assert_close(compiled(x[:3]), module(x[:3]), 1e-12)

    @pytest.mark.parametrize(
        "name", [pytest.param("transformer_batch_first", marks=pytest.mark.thorough), "weight_norm"]
    )
    def test_compile_other_networks(self, name):
        torch._dynamo.reset()
        (case,) = [case for case in CASES if case.name == name]
        module, x = linearized(case)[0], case.inputs(4)[0]
        compiled = torch.compile(module, backend="aot_eager")
        assert_close(compiled(x), module(x), 1e-12)
        assert_close(gradient(compiled, x), gradient(module, x), 1e-10)

    def test_compiled_functions(self):
        torch._dynamo.reset()
        functions, x = draw_functions(model_of(network()), 2), data(5, seed=1)[0]
        assert_close(torch.compile(functions, backend="aot_eager")(x), functions(x), 1e-12)

    def test_onnx(self, tmp_path):
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        module, x = adapted_network(model_of(network())), data(5, seed=1)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(module, (x,), dynamo=True, dynamic_shapes=({0: Dim("n")},), verbose=False)
        program.save(tmp_path / "adapted.onnx")
        session = runtime.InferenceSession(tmp_path / "adapted.onnx")
        (values,) = session.run(None, {session.get_inputs()[0].name: x[:3].cpu().numpy()})
        assert_close(torch.as_tensor(values), module(x[:3]), 1e-10)


class TestTransforms:
    @pytest.mark.parametrize("build", [adapted_network, lambda model: draw_functions(model, 2)])
    @pytest.mark.parametrize("case", ["layer norm", "weight norm"])
    def test_vmap_jacrev_jvp_grad_and_hessian(self, build, case):
        first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)) if case == "weight norm" else nn.Linear(3, 4)
        net = nn.Sequential(first, nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
        module, x = build(model_of(net)), data(3, seed=1)[0]

        def one(row: Tensor) -> Tensor:
            return module(row.unsqueeze(0))[..., 0]

        values = module(x)
        assert_close(torch.func.vmap(one, out_dims=-1)(x), values, 1e-12)
        jacobian = torch.autograd.functional.jacobian(module, x).diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            assert_close(torch.func.vmap(transform(one), out_dims=-2)(x), jacobian, 1e-10)
        out, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
        assert_close(out, values, 1e-12)
        assert_close(tangent, jacobian.sum(-1), 1e-10)
        total = torch.func.grad(lambda x: module(x).sum())(x)
        assert_close(total, jacobian.reshape(-1, *x.shape).sum(0), 1e-10)
        hessian = torch.autograd.functional.hessian(lambda x: module(x).sum(), x)
        assert_close(torch.func.hessian(lambda x: module(x).sum())(x), hessian, 1e-9)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert_close(torch.autograd.forward_ad.unpack_dual(module(dual)).tangent, tangent, 1e-10)

    def test_checks_stay_outside(self):
        module = adapted_network(model_of(network()))
        x = data(4)[0]
        x[1, 2] = float("nan")
        with pytest.raises(ValueError, match=r"NaN or infinite features, first in rows \[\[1\]\]"):
            module(x)
        with pytest.raises(ValueError, match="cannot be evaluated at inputs of shape"):
            module(torch.randn(4, 5, dtype=torch.float64))


class TestLoading:
    def test_a_state_dict_by_weights_only(self):
        (case,) = [case for case in CASES if case.name == "cnn"]
        module, _, _ = linearized(case)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        other = LinearizedNetwork(case.build().double(), input_shape=(2, 6, 6)).double()
        other.load_state_dict(torch.load(file, weights_only=True))
        x = case.inputs(3)[0]
        assert torch.equal(other(x), module(x))
        assert torch.equal(other(x.reshape(3, 2, 6, 6)), module(x))

    @pytest.mark.parametrize("build", [adapted_network, lambda model: draw_functions(model, 2)])
    def test_whole_modules(self, build):
        module, x = build(model_of(network())), data(5, seed=1)[0]
        cold, expected = io.BytesIO(), module(x)
        torch.save(module, cold)
        module(x.float())
        warm = io.BytesIO()
        torch.save(module, warm)
        assert abs(len(warm.getvalue()) - len(cold.getvalue())) <= 64
        warm.seek(0)
        assert torch.equal(torch.load(warm, weights_only=False)(x), expected)

    def test_an_unloaded_one_is_the_network(self):
        net, x = network(), data(5)[0]
        assert_close(LinearizedNetwork(net)(x), net(x).squeeze(-1).detach(), 1e-14)

    def test_wrong_arguments(self):
        net = network()
        with pytest.raises(ValueError, match=r"shape \(41,\).*got \(40,\)"):
            LinearizedNetwork(net, torch.zeros(40))
        with pytest.raises(TypeError, match="leave them out"):
            LinearizedNetwork(NTKKernel(net).network, output=0)

    def test_float32_models_give_float32_modules(self):
        model = model_of(network().float(), torch.float32)
        adapted, x = adapted_network(model), data(5, seed=1)[0].float()
        assert {buffer.dtype for buffer in adapted.buffers()} == {torch.float32}
        assert_close(adapted(x), model(x).mean, 1e-5)
        assert adapted(x.double()).dtype == torch.float64


ROUNDS, MARK = 8, 1e6


class Guarded(nn.Sequential):
    """Raises where it meets a marked input."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch._C._functorch.is_functorch_wrapped_tensor(x) and bool((x.detach() == MARK).any()):
            raise ArithmeticError("a marked input")
        return super().forward(x)


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize(
    "build",
    [adapted_network, lambda model: draw_functions(model, 2, generator=torch.Generator().manual_seed(0))],
    ids=["adapted", "drawn"],
)
def test_threads(build, with_gradients, warm):
    net = Guarded(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()
    module = build(model_of(net))
    zs = [data(4 + i % 3, seed=i)[0] for i in range(6)]
    call = (lambda z: gradient(together, z)) if with_gradients else lambda z: together(z)
    together = module
    expected = [call(z).detach() for z in zs]
    together = module if warm else build(model_of(net))
    marked = zs[0].clone()
    marked[-1, 0] = MARK

    def work(number: int) -> None:
        for i in range(ROUNDS):
            j = (5 * number + i) % len(zs)
            if (i + number) % 5 == 0:
                with contextlib.suppress(ArithmeticError, ValueError):
                    call(marked)
            assert_close(call(zs[j]).detach(), expected[j], 1e-9)

    in_threads(work)


class TestSharing:
    """Mean and kernel of one network hold its weights once, and stay apart in everything else."""

    @staticmethod
    def shared(one: nn.Module, other: nn.Module) -> set[bool]:
        tensors, others = dict(one.network.named_buffers()), dict(other.network.named_buffers())
        return {tensor is others[name] for name, tensor in tensors.items()}

    @staticmethod
    def bytes_of(module: nn.Module) -> int:
        storages = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in module.buffers()}
        return sum(storages.values())

    def test_through_conversion_loading_copies_and_pickles(self):
        net = network(width=50)
        size = sum(p.nbytes for p in net.parameters())
        model = model_of(net)
        parts = model.mean_module, model.covar_module
        small = self.bytes_of(model)
        assert size <= small <= size + 500
        model.float()
        assert self.shared(*parts) == {True} and self.bytes_of(model) <= small
        model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})
        assert self.shared(*parts) == {True}
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for new in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert self.shared(new.mean_module, new.covar_module) == {True}
            new.double()
            assert self.shared(new.mean_module, new.covar_module) == {True}

    @pytest.mark.parametrize(
        "change",
        [
            lambda part: part.double(),
            lambda part: part.half(),
            lambda part: part.load_state_dict({name: 2 * t for name, t in part.state_dict().items()}),
            lambda part: part.linearize(network(seed=7)),
        ],
        ids=["double", "half", "load", "linearize"],
    )
    @pytest.mark.parametrize("changed", [0, 1])
    def test_a_change_of_one_is_no_change_of_the_other(self, change, changed):
        net, x = network().float(), data(5)[0].float()
        parts = NetworkMean(net), NTKKernel(net)
        assert self.shared(*parts) == {True}
        value = [lambda: parts[0](x), lambda: parts[1](x).to_dense()]
        before = value[1 - changed]()
        state = {name: t.clone() for name, t in parts[1 - changed].state_dict().items()}
        change(parts[changed])
        assert torch.equal(value[1 - changed](), before)
        assert all(torch.equal(t, state[name]) for name, t in parts[1 - changed].state_dict().items())

    @pytest.mark.parametrize(
        "change",
        [
            lambda net: net[0].weight.data.add_(1.0),
            lambda net: net[0].weight.detach().numpy().__setitem__(0, 3.0),
            lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach() + 1)),
            lambda net: net.float(),
        ],
        ids=["data", "numpy", "another parameter", "another dtype"],
    )
    def test_a_network_that_has_changed_meanwhile(self, change):
        net, x = network(), data(5)[0]
        mean = NetworkMean(net)
        before = mean(x)
        change(net)
        kernel = NTKKernel(net)
        assert False in self.shared(mean, kernel)
        assert torch.equal(mean(x), before)
        assert_close(kernel(x).to_dense(), references.kernel(net.double(), x), 1e-10)

    def test_networks_are_not_kept_alive(self):
        import gc
        import weakref

        net = network()
        mean, kernel = NetworkMean(net), NTKKernel(net)
        reference, tensor = weakref.ref(net), weakref.ref(mean.network.get_buffer("tensors.0.weight"))
        del net
        gc.collect()
        assert reference() is None and tensor() is not None
        del mean, kernel
        gc.collect()
        assert tensor() is None

    def test_two_networks_of_equal_weights_share_nothing(self):
        assert self.shared(NetworkMean(network()), NTKKernel(network())) == {False}
