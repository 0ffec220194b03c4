"""Layers as they are recorded: the values and derivatives of PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from ntk_gp.replacements import onednn
from ntk_gp.replacements.recorded import batch_norm, linear, tanh

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    monkeypatch.setattr(onednn, "_WORTHWHILE", 0)
    monkeypatch.setattr(onednn, "_WORTHWHILE_TANH", 1)


def check(layer, reference, x, *constants):
    """Values, the gradient for one cotangent, and for many at once, against float64."""
    x = x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    value = layer(x, *constants)
    expected = reference(exact, *(None if c is None else c.double() for c in constants))
    assert value.dtype == x.dtype
    tolerance = {"rtol": 20 * torch.finfo(x.dtype).eps, "atol": 20 * torch.finfo(x.dtype).eps}
    torch.testing.assert_close(value.double(), expected, **tolerance)
    cotangents = torch.randn(3, *value.shape, dtype=x.dtype)

    def pull(v):
        return torch.autograd.grad(value, x, v, retain_graph=True)[0]

    rows = torch.stack([torch.autograd.grad(expected, exact, v.double(), retain_graph=True)[0] for v in cotangents])
    torch.testing.assert_close(pull(cotangents[0]).double(), rows[0], **tolerance)
    torch.testing.assert_close(torch.vmap(pull)(cotangents).double(), rows, **tolerance)
    torch.testing.assert_close(torch.vmap(pull, in_dims=1)(cotangents.movedim(0, 1)).double(), rows, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5), (0, 5), (5,)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(dtype, shape, has_bias):
    weight = torch.randn(4, 5, dtype=dtype)
    check(linear, F.linear, torch.randn(shape, dtype=dtype), weight, torch.randn(4, dtype=dtype) if has_bias else None)


def test_a_weight_that_was_computed_keeps_its_gradient():
    x, weight = torch.randn(7, 5), torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x, 2 * weight).sum(), weight)
    torch.testing.assert_close(gradient, 2 * x.sum(0).expand(4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(300,), (30, 20), (2, 3, 4, 5, 6)])
def test_tanh(dtype, shape):
    check(tanh, torch.tanh, 3 * torch.randn(shape, dtype=dtype))
    check(tanh, torch.tanh, 1e-4 * torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 5)])
def test_batch_norm(shape, has_weight, has_bias):
    mean, variance = torch.randn(3), torch.rand(3) + 0.5
    weight, bias = torch.randn(3) if has_weight else None, torch.randn(3) if has_bias else None
    check(batch_norm, F.batch_norm, torch.randn(shape), mean, variance, weight, bias)


def test_batch_norm_by_the_batch_is_left_as_it_is():
    x = torch.randn(6, 3)
    torch.testing.assert_close(batch_norm(x, None, None, training=True), F.batch_norm(x, None, None, training=True))
