"""Layers at the processor's full rate."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from ntk_gp.replacements import onednn
from ntk_gp.replacements.full_rate import FullRateLayers

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    monkeypatch.setattr(onednn, "_NARROW", 2)
    monkeypatch.setattr(onednn, "_WORTHWHILE_TANH", 1)
    monkeypatch.setattr(onednn, "_PIECE", 700)


@pytest.mark.parametrize("moving", ["input", "weight", "bias", "weight bias", "input weight bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_layers_in_forward_mode(moving, dtype):
    x, weight, bias = torch.randn(30, 20, dtype=dtype), torch.randn(40, 20, dtype=dtype), torch.randn(40, dtype=dtype)
    primals = {"input": x, "weight": weight, "bias": bias}
    tangents = {name: torch.randn_like(primals[name]) for name in moving.split()}

    def linear(**moved):
        return torch.nn.functional.linear(**{**primals, **moved})

    expected = jvp(lambda moved: linear(**moved), ({name: primals[name] for name in tangents},), (tangents,))
    with torch.no_grad(), forward_ad.dual_level(), FullRateLayers():
        duals = {name: forward_ad.make_dual(primals[name], tangents[name]) for name in tangents}
        actual = forward_ad.unpack_dual(linear(**duals))
    torch.testing.assert_close(tuple(actual), expected, rtol=0.0, atol=1e2 * torch.finfo(dtype).eps)


def test_linear_layers_keep_to_the_rules_around_them():
    x, layer = torch.randn(30, 20), torch.nn.Linear(20, 40)
    with FullRateLayers():
        assert layer(x).requires_grad
        with torch.no_grad():
            torch.testing.assert_close(layer(x[None]), layer(x)[None])
            torch.testing.assert_close(vmap(layer)(x), layer(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            with torch.backends.mkldnn.flags(enabled=False):
                torch.testing.assert_close(layer(x), x @ layer.weight.mT + layer.bias)


@pytest.mark.parametrize("tanh", [torch.tanh, torch.Tensor.tanh, torch.nn.functional.tanh, torch.nn.Tanh()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_in_forward_mode(tanh, dtype):
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.logspace(-20, 0, 999), torch.tensor([0.0, torch.inf])]).to(
        dtype
    )
    tangent = torch.randn_like(x)
    value, slope = jvp(torch.tanh, (x.double(),), (tangent.double(),))
    with torch.no_grad(), forward_ad.dual_level(), FullRateLayers():
        actual = forward_ad.unpack_dual(tanh(forward_ad.make_dual(x, tangent)))
    assert actual.primal.dtype == dtype
    torch.testing.assert_close(actual.primal.double(), value, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    torch.testing.assert_close(actual.tangent.double(), slope, rtol=0.0, atol=1e1 * torch.finfo(dtype).eps)


def test_tanh_keeps_to_the_rules_around_it():
    x = torch.randn(3, 4, 5, 6, 7, 8, requires_grad=True)
    with FullRateLayers():
        assert torch.tanh(x).requires_grad
        assert torch.tanh(torch.tensor([torch.nan])).isnan().all()
        with torch.no_grad():
            for y in (x, x[0, 0, 0, 0].mT, x[0, 0, 0, 0, 0, 0], x[:0]):
                torch.testing.assert_close(torch.tanh(y), y.double().tanh().float())
            torch.testing.assert_close(vmap(torch.tanh)(x), torch.tanh(x))


def test_values_and_derivatives_of_a_network_in_single_precision():
    network = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Tanh(), torch.nn.Linear(20, 20), torch.nn.Tanh())
    parameters = dict(network.named_parameters())
    tangents = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    x = torch.randn(40, 3)

    def function(parameters):
        return torch.func.functional_call(network, parameters, x.to(parameters["0.weight"].dtype))

    double = [{name: tensor.detach().double() for name, tensor in part.items()} for part in (parameters, tangents)]
    expected = jvp(function, (double[0],), (double[1],))
    with torch.no_grad(), forward_ad.dual_level(), FullRateLayers():
        duals = {name: forward_ad.make_dual(tensor.detach(), tangents[name]) for name, tensor in parameters.items()}
        actual = forward_ad.unpack_dual(function(duals))
    for part, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(part.double(), reference, rtol=0.0, atol=1e-5)


def test_a_callable_that_cannot_be_hashed():
    class Doubling:
        __hash__ = None

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return torch.overrides.handle_torch_function(self, (x,), x) if _has_mode() else 2 * x

    def _has_mode() -> bool:
        return torch._C._is_torch_function_mode_enabled()

    x = torch.ones(3)
    with FullRateLayers():
        assert torch.equal(Doubling()(x), 2 * x)
