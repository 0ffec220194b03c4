"""Marginal likelihoods from one group's eigenvalues, with small groups beside it, against dense algebra."""

import pytest
import torch
from gpytorch.kernels import ConstantKernel, ScaleKernel
from torch import Tensor, nn

import ntk_gp.operators.ntk_added_diag_linear_operator as added_diag
from ntk_gp import GainKernel, NTKKernel
from ntk_gp.jacobian.columns import Inputs, Ones, Values
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.jacobian.widened import WidenedLinearization
from ntk_gp.network import FrozenNetwork
from ntk_gp.solvers import Spectrum, System
from ntk_gp.solvers.spectrum import Groups, SpectrumBeside
from tests import references
from tests.adapted import LARGE, SMALL, assert_close, data, network

pytestmark = pytest.mark.engine_independent


def layer(name: str) -> str:
    return name.rpartition(".")[0]


def problem(n: int, batch: int = 1, known: bool = True, grouped: bool = False) -> tuple:
    """The linearization, inputs (B, n, d), explicit features (B, n, P + q) and the group of each feature."""
    net, (x, _) = network(), data(n, batch)
    linearization = Linearization(FrozenNetwork(net, group_by=layer if grouped else None))
    groups = [0] * 32 + [int(grouped)] * 9
    rows = references.jacobian(net, x)
    if known:
        linearization = WidenedLinearization(
            linearization, [Values(1, FrozenNetwork(net)), Ones(1), Inputs(3, ard=True)]
        )
        first = groups[-1] + 1
        groups += [first, first + 1, first + 2, first + 3, first + 4]
        rows = torch.cat([rows, net(x), torch.ones(*x.shape[:-1], 1, dtype=x.dtype), x], dim=-1)
    return linearization, x, rows.detach(), torch.tensor(groups)


def beside(linearization: Linearization, x: Tensor, noise: Tensor) -> tuple[SpectrumBeside, int]:
    ones = torch.ones(1, linearization.network.num_groups, dtype=x.dtype)
    system = System(linearization, x, ones, noise)
    groups = Groups(system.jacobian.function)
    spectrum = Spectrum(added_diag._of_one_group(system, groups.large, system.noise))
    return SpectrumBeside(spectrum, system, groups), groups.large


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("kind", [{}, {"grouped": True}, {"known": False, "grouped": True}], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("own_noise", [False, True])
def test_terms_and_their_derivatives(n, kind, batch, own_noise):
    linearization, x, rows, group_of = problem(n, batch, **kind)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, n, dtype=x.dtype, generator=generator) + 0.5 if own_noise else torch.ones(1, n, dtype=x.dtype)
    variances = torch.rand(batch, int(group_of.max()) + 1, dtype=x.dtype, generator=generator).requires_grad_()
    sigma = torch.rand(batch, 1, dtype=x.dtype, generator=generator).add(0.1).requires_grad_()
    residual = torch.randn(batch, n, 2, dtype=x.dtype, generator=generator).requires_grad_()
    terms, large = beside(linearization, x, noise)
    assert large == 0
    inputs = (variances, sigma, residual)
    constant = [terms.inv_quad_logdet(residual.detach(), variances[:, :1], sigma, variances)[0] for _ in range(2)]
    actual = terms.inv_quad_logdet(residual, variances[:, :1], sigma, variances)
    matrix = (rows * variances[:, group_of].unsqueeze(-2)) @ rows.mT + torch.diag_embed(sigma * noise)
    expected = (residual * torch.linalg.solve(matrix, residual)).sum(-2), torch.logdet(matrix)
    for remembered in constant:  # what does not change is
        assert_close(remembered, expected[0], 1e-9)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-9)
        grads = [
            torch.autograd.grad(v.sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
            for v in (one, other)
        ]
        for a, b in zip(*grads, strict=True):
            assert_close(a, b, 1e-8)
        seconds = [
            torch.autograd.grad(g[0].square().sum() + g[1].square().sum(), inputs, allow_unused=True, retain_graph=True)
            for g in grads
        ]
        for a, b in zip(*seconds, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, 1e-7)


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_variances_of_zero(n):
    linearization, x, rows, group_of = problem(n)
    terms, _ = beside(linearization, x, torch.ones(1, n, dtype=x.dtype))
    residual = torch.randn(1, n, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([[0.2]], dtype=x.dtype)
    for zero in ([1, 3], [0], list(range(6))):
        variances = torch.ones(1, 6, dtype=x.dtype)
        variances[:, zero] = 0.0
        variances.requires_grad_()
        matrix = (rows * variances[:, group_of].unsqueeze(-2)) @ rows.mT + 0.2 * torch.eye(n, dtype=x.dtype)
        expected = (residual * torch.linalg.solve(matrix, residual)).sum(-2), torch.logdet(matrix)
        actual = terms.inv_quad_logdet(residual, variances[:, :1], sigma, variances)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)
            assert_close(*(torch.autograd.grad(v.sum(), variances, retain_graph=True)[0] for v in (one, other)))


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_little_noise_and_large_offsets(n, scale):
    """Where the condition number is 10⁸ and more."""
    linearization, x, rows, group_of = problem(n)
    terms, _ = beside(linearization, x, torch.ones(1, n, dtype=x.dtype))
    sigma = torch.tensor([[1e-6 * max(scale, 1.0)]], dtype=x.dtype)
    variances = torch.ones(1, 6, dtype=x.dtype)
    variances[:, 2] = scale
    residual = 10 + torch.randn(1, n, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    assert terms.spectrum.resolves(variances[:, :1], sigma, terms.trace(variances))
    inv_quad, logdet = terms.inv_quad_logdet(residual, variances[:, :1], sigma, variances)
    # By orthogonalisation, which does not square the features' condition number.
    features = rows * variances[:, group_of].sqrt().unsqueeze(-2)
    tall = torch.cat([features.mT, sigma.sqrt() * torch.eye(n, dtype=x.dtype).unsqueeze(0)], dim=-2)
    triangle = torch.linalg.qr(tall).R
    half = torch.linalg.solve_triangular(triangle.mT, residual, upper=False)
    assert_close(inv_quad, half.square().sum(-2), 1e-6)
    assert_close(logdet, 2 * triangle.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1), 1e-6)


def test_noise_that_is_lost_in_rounding_is_left_to_others():
    linearization, x, _, _ = problem(LARGE)
    terms, _ = beside(linearization, x, torch.ones(1, LARGE, dtype=x.dtype))
    variances, sigma = torch.ones(1, 6, dtype=x.dtype), torch.tensor([[1e-6]], dtype=x.dtype)
    assert terms.spectrum.resolves(variances[:, :1], sigma, terms.trace(variances))
    variances[:, 2] = 1e8
    assert not terms.spectrum.resolves(variances[:, :1], sigma, terms.trace(variances))


def test_the_large_group_and_the_few():
    wide = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    x, _ = data(5)
    for by, large, few in [("layer", 0, True), ("parameter", 0, False)]:
        function = NTKKernel(wide, variance_groups=by).double()(x).evaluate_kernel().function
        groups = Groups(function)
        assert groups.large == large
        assert groups.are_few == few
        index, group_of = groups.small(x.device)
        assert len(index) == groups.num_small
        assert not (group_of == large).any()


def test_one_decomposition_serves_all_sums(monkeypatch):
    """Of one network at the same inputs, whatever stands beside it and however the scales change."""
    made = []
    original = Spectrum.__init__

    def counted(self, system):
        made.append(system)
        original(self, system)

    monkeypatch.setattr(Spectrum, "__init__", counted)
    net, (x, y) = network(), data(LARGE)
    ntk = NTKKernel(net).double()
    for kernel in (ScaleKernel(ntk), ScaleKernel(ntk) + ConstantKernel(), ScaleKernel(ntk) + GainKernel(net)):
        kernel = kernel.double()
        for value in (0.5, 2.0):
            next(k for k in kernel.modules() if isinstance(k, ScaleKernel)).outputscale = value
            matrix = kernel(x).evaluate_kernel().add_diagonal(torch.tensor(0.1, dtype=torch.float64))
            matrix.inv_quad_logdet(y.unsqueeze(-1), logdet=True)
    assert len(made) == 1
