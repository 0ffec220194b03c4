"""Products of matrices, whichever library they go to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import jvp, vmap

from ntk_gp.replacements import onednn as module
from ntk_gp.replacements.onednn import matmul

pytestmark = pytest.mark.cpu_only


@pytest.fixture(autouse=True, scope="module")
def however_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WORTHWHILE", 0)
        patch.setattr(module, "_NARROW", 2)
        yield


def matrix(rows: int, columns: int, layout: str, lead: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + 100 * columns)
    if layout == "transposed":
        return torch.randn(*lead, columns, rows, dtype=dtype, generator=generator).mT
    if layout == "strided":
        return torch.randn(*lead, 2 * rows, columns + 3, dtype=dtype, generator=generator)[..., ::2, 3:]
    if layout == "expanded":
        return torch.randn(*lead, 1, columns, dtype=dtype, generator=generator).expand(*lead, rows, columns)
    return torch.randn(*lead, rows, columns, dtype=dtype, generator=generator)


layouts = st.sampled_from(["plain", "transposed", "strided", "expanded"])
leads = st.sampled_from([(), (1,), (1, 1), (3,), (2, 3)])


@given(*[st.integers(1, 40)] * 3, layouts, layouts, leads, st.sampled_from([torch.float32, torch.float64]))
def test_any_layout(m, k, n, left_layout, right_layout, lead, dtype):
    left, right = matrix(m, k, left_layout, lead, dtype), matrix(k, n, right_layout, lead, dtype)
    product, expected = matmul(left, right), left.double() @ right.double()
    assert product.shape == expected.shape and product.dtype == dtype
    scale = left.double().abs() @ right.double().abs()
    assert ((product - expected).abs() <= 2 * k * torch.finfo(dtype).eps * scale).all()


def test_derivatives_are_not_lost():
    left, right = torch.randn(30, 20, requires_grad=True), torch.randn(20, 40)
    (gradient,) = torch.autograd.grad(matmul(left, right).sum(), left)
    torch.testing.assert_close(gradient, right.sum(1).expand(30, 20))
    left = left.detach()
    _, slope = jvp(lambda x: matmul(x, right), (left,), (left,))
    torch.testing.assert_close(slope, left @ right)
    with torch.no_grad(), forward_ad.dual_level():
        dual = matmul(forward_ad.make_dual(left, left), right)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, left @ right)
    many = torch.randn(5, 30, 20)
    torch.testing.assert_close(vmap(lambda x: matmul(x, right))(many), many @ right)


def test_whoever_switches_onednn_off_is_heard(monkeypatch):
    def forbidden(*_):
        raise AssertionError

    left, right = torch.randn(30, 20), torch.randn(20, 40)
    matmul(left, right)  # the first product tries whether this build has oneDNN
    monkeypatch.setattr(module, "onednn_linear", forbidden)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(matmul(left, right), left @ right)
