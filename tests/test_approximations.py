"""Kernels made of the tangent kernel that are not it, against explicit Jacobians."""

import gpytorch
import pytest
import torch
from gpytorch.kernels import RBFKernel, ScaleKernel
from torch import nn

from ntk_gp import CosineNTKKernel, NTKKernel, RandomProjectionNTKKernel
from tests import references
from tests.adapted import AdaptedGP, assert_close, data, network


def _cosine(net, x, z, variances=None):
    rows1, rows2 = (references.jacobian(net, each) for each in (x, z))
    scales = 1.0 if variances is None else variances.sqrt()
    one, other = (nn.functional.normalize(rows * scales, dim=-1) for rows in (rows1, rows2))
    return one @ other.mT


@pytest.mark.parametrize("outputs", [1, 2])
def test_cosine(outputs):
    net, x, z = network(outputs=outputs), data(6)[0], data(4, seed=1)[0]
    kernel = CosineNTKKernel(NTKKernel(net, output="all"))
    assert_close(kernel(x, z).to_dense(), _cosine(net, x, z), tolerance=1e-10)
    assert_close(kernel(x).to_dense(), _cosine(net, x, x), tolerance=1e-10)
    assert (kernel(x).to_dense().diagonal() == 1).all() and (kernel(x, diag=True) == 1).all()
    assert_close(kernel(x[:4], z, diag=True), _cosine(net, x[:4], z).diagonal(), tolerance=1e-10)


def test_groups_enter_the_norm_and_have_derivatives():
    net, x = network(), data(5)[0]
    base = NTKKernel(net, variance_groups="parameter").double()
    base.variance = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    sizes = torch.tensor([p.numel() for p in net.parameters()])
    x = x.requires_grad_()
    value = CosineNTKKernel(base)(x).to_dense()
    expected = _cosine(net, x, x, base.variance[0].repeat_interleave(sizes))
    grads, wanted = (torch.autograd.grad(v.square().sum(), [x, base.raw_variance]) for v in (value, expected))
    assert_close(value.detach(), expected.detach(), tolerance=1e-10)
    for one, other in zip(grads, wanted, strict=True):
        assert_close(one, other, tolerance=1e-9)


def test_cosine_posterior():
    net, (x, y), z = network(), data(12), data(4, seed=1)[0]
    model = AdaptedGP(x, y, net, ScaleKernel(CosineNTKKernel(NTKKernel(net))).double()).eval()
    joint = torch.cat([x, z])
    scale, noise = model.covar_module.outputscale.detach(), model.likelihood.noise.detach()
    mean, covariance = references.posterior(
        net(joint).squeeze(-1).detach(), scale * _cosine(net, joint, joint).detach(), noise, y
    )
    with torch.no_grad():
        assert_close(model(z).mean, mean, tolerance=1e-8)
        assert_close(model(z).covariance_matrix, covariance, tolerance=1e-8)


def test_cosine_refuses():
    with pytest.raises(TypeError, match="Expected an NTKKernel"):
        CosineNTKKernel(RBFKernel())
    net = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    with pytest.raises(ValueError, match="no direction"):
        CosineNTKKernel(NTKKernel(net))(torch.zeros(2, 3).double()).to_dense()


def test_projections_are_unbiased_and_their_error_is_told():
    net, x, z = network(), data(4)[0], data(3, seed=1)[0]
    exact = references.kernel(net, x, z)
    kernels = [RandomProjectionNTKKernel(net, 24, seed=seed) for seed in range(200)]
    found = torch.stack([kernel(x, z).to_dense() for kernel in kernels])
    errors = torch.stack([kernel.standard_error(x, z) for kernel in kernels])
    assert ((found.mean(0) - exact).abs() < 4 * found.std(0) / 200**0.5).all()
    covered = ((found - exact).abs() < 2 * errors).double().mean()
    assert 0.9 < covered < 0.99
    torch.testing.assert_close(errors.square().mean(0).sqrt(), found.std(0), rtol=0.2, atol=0.0)


def test_projections_are_reproducible_and_nested():
    net, x = network(), data(4)[0]
    kernel = RandomProjectionNTKKernel(net, 20, seed=3)
    assert torch.equal(kernel.features(x), RandomProjectionNTKKernel(net, 20, seed=3).features(x))
    assert not torch.equal(kernel.features(x), RandomProjectionNTKKernel(net, 20, seed=4).features(x))
    more = RandomProjectionNTKKernel(net, 40, seed=3).features(x) * 2**0.5
    assert_close(more[:, :20], kernel.features(x), tolerance=1e-12)
    assert_close(kernel(x, diag=True), kernel(x).to_dense().diagonal(), tolerance=1e-12)


def test_projected_posterior():
    net, (x, y), z = network(), data(12), data(4, seed=1)[0]
    kernel = RandomProjectionNTKKernel(net, 6)
    model = AdaptedGP(x, y, net, ScaleKernel(kernel).double()).eval()
    joint = torch.cat([x, z])
    features = kernel.features(joint)
    scale, noise = model.covar_module.outputscale.detach(), model.likelihood.noise.detach()
    expected = references.posterior(net(joint).squeeze(-1).detach(), scale * features @ features.mT, noise, y)
    with torch.no_grad():
        assert_close(model(z).mean, expected[0], tolerance=1e-8)
        assert_close(model(z).covariance_matrix, expected[1], tolerance=1e-8)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model.train())
    objective(model(x), y).backward()
    assert model.covar_module.raw_outputscale.grad.isfinite().all()


def test_projections_refuse_one_feature():
    with pytest.raises(ValueError, match="2 or more"):
        RandomProjectionNTKKernel(network(), 1)


def test_a_batch_of_outputs_is_not_projected():
    with pytest.raises(NotImplementedError, match="output='batch'"):
        RandomProjectionNTKKernel(torch.nn.Linear(2, 3), num_features=4, output="batch")
