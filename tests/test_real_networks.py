"""Networks as their users write them: kernel, posterior and which parameters have rules, against explicit Jacobians."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood, MultitaskGaussianLikelihood
from torch import Tensor, nn

from ntk_gp import NetworkMean, NTKKernel
from ntk_gp.testing import explicit_jacobian
from tests import references
from tests.adapted import assert_close
from tests.real_networks import REAL_NETWORKS

pytestmark = pytest.mark.every_case

TRAIN, TEST, NOISE = 3, 2, 0.1


class Reference(NamedTuple):
    network: nn.Module
    x: Tensor  # (n, d), training inputs first
    y: Tensor  # (TRAIN, C)
    mean: Tensor  # (n·C,)
    jacobian: Tensor  # (n·C, P)


@cache
def reference(name: str) -> Reference:
    case = REAL_NETWORKS[name]
    network, x = case.network(), case.inputs(TRAIN + TEST)
    output = case.options.get("output")
    with torch.no_grad():
        values = case.call(network, x).reshape(len(x), -1)
    values = values if output == "all" else values[:, [output]]
    y = values[:TRAIN] + torch.randn(values[:TRAIN].shape, generator=torch.Generator().manual_seed(2)).double()
    return Reference(network, x, y, values.reshape(-1), explicit_jacobian(network, x, **case.options))


class Model(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, network: nn.Module, **options):
        several = options["output"] == "all"
        likelihood = MultitaskGaussianLikelihood(y.shape[-1], rank=0, has_task_noise=False) if several else None
        super().__init__(x, y if several else y.squeeze(-1), (likelihood or GaussianLikelihood()).double())
        self.mean_module = NetworkMean(network, **options)
        self.covar_module = NTKKernel(network, **options)
        self.distribution = MultitaskMultivariateNormal if several else MultivariateNormal
        self.likelihood.noise = torch.tensor(NOISE, dtype=torch.float64)  # a number would be rounded to float32

    def forward(self, x: Tensor) -> MultivariateNormal:
        return self.distribution(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("name", REAL_NETWORKS)
def test_kernel_matrix(name):
    network, x, _, _, jacobian = reference(name)
    with torch.no_grad():
        kernel_matrix = NTKKernel(network, **REAL_NETWORKS[name].options)(x).to_dense()
    assert_close(kernel_matrix, jacobian @ jacobian.mT, 1e-10)


@pytest.mark.parametrize("name", REAL_NETWORKS)
def test_posterior(name):
    network, x, y, prior_mean, jacobian = reference(name)
    mean, covariance = references.posterior(prior_mean, jacobian @ jacobian.mT, NOISE, y.reshape(-1))
    model = Model(x[:TRAIN], y, network, **REAL_NETWORKS[name].options).eval()
    with torch.no_grad():
        posterior = model(x[TRAIN:])
    assert_close(posterior.mean.reshape(-1), mean, 1e-10)
    assert_close(posterior.variance.reshape(-1), covariance.diagonal(), 1e-10)


@pytest.mark.names_engine
@pytest.mark.parametrize("name", REAL_NETWORKS)
def test_what_has_rules(name):
    case = REAL_NETWORKS[name]
    kernel = NTKKernel(case.network(), **case.options)
    without = [row["parameter"] for row in kernel.engine_report(case.inputs(2)) if row["served_by"] == "autodiff"]
    expected = [
        parameter
        for parameter in kernel.network.parameter_names
        if any(fnmatchcase(parameter, pattern) for pattern in case.autodiff)
    ]
    assert without == expected
