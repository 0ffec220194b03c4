"""GPyTorch's own test suites for kernels, means and models, run over the NTK."""

import unittest

import gpytorch
import pytest
import torch
from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
from gpytorch.test.base_kernel_test_case import BaseKernelTestCase
from gpytorch.test.base_mean_test_case import BaseMeanTestCase
from gpytorch.test.model_test_case import BaseModelTestCase
from torch import Size, Tensor, nn

from ntk_gp import FeatureKernel, GainKernel, NetworkMean, NTKKernel, TangentMaternKernel, TangentRBFKernel

pytestmark = pytest.mark.engine_independent


class AnyWidth(nn.Module):
    """A network for inputs of any width up to ten: the suites make their kernels before they say which."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(10, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.hidden.weight[:, : x.shape[-1]].mT + self.hidden.bias))


class _KernelSuite(BaseKernelTestCase):
    seed = 0


class TestPlain(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return NTKKernel(AnyWidth(), **kwargs)


class TestGain(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return GainKernel(AnyWidth(), **kwargs)


class TestVarianceGroups(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return NTKKernel(AnyWidth(), variance_groups="layer", **kwargs)


class TestNormalised(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return NTKKernel(AnyWidth(), normalize=10.0, **kwargs)


class TestTangentMatern(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return TangentMaternKernel(AnyWidth(), **kwargs)


@pytest.mark.thorough
class TestTangentRBF(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return TangentRBFKernel(AnyWidth(), **kwargs)


class TestFeatures(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return FeatureKernel(AnyWidth(), RBFKernel(batch_shape=kwargs.get("batch_shape")), **kwargs)


class TestScale(_KernelSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return ScaleKernel(NTKKernel(AnyWidth(), **kwargs), batch_shape=kwargs.get("batch_shape", Size()))


class _CompositeSuite(_KernelSuite):
    @unittest.expectedFailure
    def test_kernel_getitem_broadcast(self):
        """Sums and products cannot be indexed after `expand_batch`: see `test_stock_composites_fail_likewise`."""
        super().test_kernel_getitem_broadcast()


class TestSumWithGain(_CompositeSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return NTKKernel(AnyWidth(), **kwargs) + GainKernel(AnyWidth(), **kwargs)


@pytest.mark.thorough
class TestSum(_CompositeSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return NTKKernel(AnyWidth(), **kwargs) + RBFKernel(**kwargs)


class TestProduct(_CompositeSuite, unittest.TestCase):
    def create_kernel_no_ard(self, **kwargs) -> Kernel:
        return NTKKernel(AnyWidth(), **kwargs) * RBFKernel(**kwargs)


@pytest.mark.parametrize("compose", [Kernel.__add__, Kernel.__mul__])
def test_stock_composites_fail_likewise(compose):
    """GPyTorch's composite kernels keep no batch shape of their own, so `expand_batch` indexes beyond it."""

    class Stock(BaseKernelTestCase, unittest.TestCase):
        def create_kernel_no_ard(self, **kwargs):
            return compose(RBFKernel(**kwargs), RBFKernel(**kwargs))

    result = unittest.TestResult()
    Stock("test_kernel_getitem_broadcast").run(result)
    assert len(result.errors) == 1
    assert "IndexError" in result.errors[0][1]


class TestMean(BaseMeanTestCase, unittest.TestCase):
    def create_mean(self, **kwargs) -> NetworkMean:
        return NetworkMean(AnyWidth())


class AdaptedGP(gpytorch.models.ExactGP):
    def __init__(self, train_x: Tensor, train_y: Tensor, likelihood):
        super().__init__(train_x, train_y, likelihood)
        self.mean_module = NetworkMean(AnyWidth())
        self.covar_module = ScaleKernel(NTKKernel(AnyWidth()))

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


class TestModel(BaseModelTestCase, unittest.TestCase):
    def create_model(self, train_x, train_y, likelihood):
        return AdaptedGP(train_x, train_y, likelihood)

    def create_test_data(self):
        return torch.randn(50, 2)

    def create_likelihood_and_labels(self):
        return gpytorch.likelihoods.GaussianLikelihood(), torch.randn(50)

    def create_batch_test_data(self, batch_shape=(3,)):
        return torch.randn(*batch_shape, 50, 2)

    def create_batch_likelihood_and_labels(self, batch_shape=(3,)):
        return gpytorch.likelihoods.GaussianLikelihood(batch_shape=Size(batch_shape)), torch.randn(*batch_shape, 50)
