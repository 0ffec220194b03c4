"""Small classifiers, and Laplace's approximation by dense algebra and autograd: no code is shared with the package."""

from __future__ import annotations

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import Kernel, ScaleKernel
from gpytorch.likelihoods import BernoulliLikelihood, SoftmaxLikelihood
from gpytorch.means import Mean
from torch import Tensor, nn

from ntk_gp import LaplaceGP, LogisticLikelihood, NetworkMean, NTKKernel
from ntk_gp.testing import explicit_jacobian

LIKELIHOODS = ("softmax", "logistic", "probit")
CLASSES = 3


class Classifier(LaplaceGP):
    def __init__(self, x: Tensor, labels: Tensor, likelihood: nn.Module, mean: Mean, kernel: Kernel, **options):
        super().__init__(x, labels, likelihood, **options)
        self.mean_module = mean
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        several = isinstance(self.likelihood, SoftmaxLikelihood)
        kind = MultitaskMultivariateNormal if several else MultivariateNormal
        return kind(self.mean_module(x), self.covar_module(x))


def likelihood_of(name: str, classes: int = CLASSES) -> nn.Module:
    if name == "softmax":
        return SoftmaxLikelihood(num_classes=classes, mixing_weights=False)
    return LogisticLikelihood() if name == "logistic" else BernoulliLikelihood()


def log_likelihood(name: str, f: Tensor, labels: Tensor) -> Tensor:
    """f (n, C), by the distributions' own formulas."""
    if name == "softmax":
        return -nn.functional.cross_entropy(f, labels, reduction="sum")
    if name == "logistic":
        return -nn.functional.binary_cross_entropy_with_logits(f[:, 0], labels.to(f), reduction="sum")
    return torch.distributions.Normal(0.0, 1.0).cdf((2 * labels.to(f) - 1) * f[:, 0]).log().sum()


class Problem:
    """n points in two dimensions, a network with one output or one for each class, and two prior variances.

    :param name: Of the likelihood.
    :param n: The number of training points.
    :param sureness: What the weights of the last layer are multiplied by.
    """

    def __init__(self, name: str, n: int = 8, classes: int = CLASSES, width: int = 4, sureness: float = 1.0):
        torch.manual_seed(0)
        self.name = name
        self.outputs = classes if name == "softmax" else 1
        self.output = "all" if name == "softmax" else None
        self.network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, self.outputs)).double()
        with torch.no_grad():
            self.network[2].weight *= sureness
        self.x, self.test_x = torch.randn(n, 2).double(), torch.randn(5, 2).double()
        self.labels = torch.arange(n) % (classes if name == "softmax" else 2)
        self.jacobian, self.test_jacobian = (
            explicit_jacobian(self.network, points, output="all").reshape(len(points) * self.outputs, -1)
            for points in (self.x, self.test_x)
        )
        sizes = [sum(p.numel() for p in self.network[i].parameters()) for i in (0, 2)]
        self.groups = torch.arange(2).repeat_interleave(torch.tensor(sizes))

    def values(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(x)

    @property
    def mean(self) -> Mean:
        return NetworkMean(self.network, output=self.output)

    def kernel(self, **options) -> NTKKernel:
        return NTKKernel(self.network, output=self.output, **options)

    def model(
        self, kernel: Kernel | None = None, mean: Mean | None = None, scale: float = 2.0, **options
    ) -> Classifier:
        """With a scale, and a prior variance for each layer, by default."""
        is_own = kernel is not None
        kernel = kernel if is_own else ScaleKernel(self.kernel(variance_groups="layer"))
        mean = self.mean if mean is None else mean
        likelihood = likelihood_of(self.name, self.outputs)
        model = Classifier(self.x, self.labels, likelihood, mean, kernel, **options).double()
        if not is_own:
            kernel.outputscale, kernel.base_kernel.variance = scale, torch.tensor([0.5, 1.5])
        return model

    @property
    def variances(self) -> Tensor:
        """Those of :meth:`model`, (2,)."""
        return 2.0 * torch.tensor([0.5, 1.5]).double()

    def gram(self, variances: Tensor) -> Tensor:
        """K, (N, N), from those of both groups."""
        return (self.jacobian * variances[self.groups]) @ self.jacobian.mT


class Reference:
    """Laplace's approximation by Newton's method on f with autograd's Hessian, halving steps that lead down.

    :param name: Of the likelihood.
    :param matrix: K, (N, N), positive definite but for rounding; with a graph where derivatives are wanted.
    :param mean: m, (n, C).
    :param at_mean: Expand at the prior mean.
    """

    def __init__(self, name: str, matrix: Tensor, mean: Tensor, labels: Tensor, at_mean: bool = False):
        self.name, self.matrix, self.mean, self.labels = name, matrix, mean, labels
        a = torch.zeros_like(mean).reshape(-1).detach()
        if not at_mean:
            a = self._mode(a)
            a = a + self._step(a)  # once more, with the graph: the derivative of the mode
        self.a = a
        self.f = mean.reshape(-1) + matrix @ a
        self.hessian = self.negative_hessian(self.f)
        identity = torch.eye(len(a)).double()
        logdet = torch.linalg.slogdet(identity + self.hessian @ matrix).logabsdet
        self.log_evidence = self.objective(self.f, a) - logdet / 2

    def value(self, f: Tensor) -> Tensor:
        return log_likelihood(self.name, f.reshape(self.mean.shape), self.labels)

    def objective(self, f: Tensor, a: Tensor) -> Tensor:
        return self.value(f) - a @ self.matrix @ a / 2

    def negative_hessian(self, f: Tensor) -> Tensor:
        return -torch.func.hessian(self.value)(f)

    def _step(self, a: Tensor) -> Tensor:
        f = self.mean.reshape(-1) + self.matrix @ a
        left = torch.eye(len(a)).double() + self.negative_hessian(f) @ self.matrix
        return torch.linalg.solve(left, torch.func.grad(self.value)(f) - a)

    def _mode(self, a: Tensor) -> Tensor:
        matrix, mean = self.matrix.detach(), self.mean.detach().reshape(-1)
        with torch.no_grad():
            for _ in range(30):
                step, length = self._step(a), 1.0
                while length > 1e-4 and self.objective(mean + matrix @ (a + length * step), a + length * step) < (
                    self.objective(mean + matrix @ a, a)
                ):
                    length /= 2
                a = a + (step if length <= 1e-4 else length * step)  # what is left then is rounding
        return a

    def posterior(self, cross: Tensor, prior: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance at test points, from K(X, x), (N, M), K(x, x) and m(x), (M,)."""
        left = torch.eye(len(self.a)).double() + self.hessian @ self.matrix
        return mean + cross.mT @ self.a, prior - cross.mT @ torch.linalg.solve(left, self.hessian @ cross)
