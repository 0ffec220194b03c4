r"""Fully connected networks in the neural tangent parametrisation: of any width, and of infinite width.

A layer computes h = σ_w W φ(h') / √(d_in) + σ_b b, with standard normal W and b (Jacot, Gabriel and Hongler, "Neural
tangent kernel: convergence and generalization in neural networks", NeurIPS 2018). As widths grow, the network's outputs
at random weights become a Gaussian process with covariance Σ, and its tangent kernel becomes Θ, both known in closed
form: with layers l = 1, 2, …, L, d inputs and φ after every layer but the last,

    Σ¹(x, x') = σ_w² xᵀx' / d + σ_b²,            Σˡ⁺¹ = σ_w² E[φ(u) φ(v)] + σ_b²,
    Θ¹(x, x') = Σ¹(x, x'),                       Θˡ⁺¹ = Σˡ⁺¹ + σ_w² Θˡ E[φ'(u) φ'(v)],

where (u, v) is Gaussian with the covariance [[Σˡ(x, x), Σˡ(x, x')], [Σˡ(x, x'), Σˡ(x', x')]] = [[a, c], [c, b]].
This is what the notebook 07_training_dynamics uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import gpytorch
import torch
from torch import Tensor, nn


class Activation(NamedTuple):
    """A nonlinearity, and what the recursion needs of it.

    :param module: Makes φ.
    :param moments: E[φ(u) φ(v)] and E[φ'(u) φ'(v)] from a, b and c.
    """

    module: Callable[[], nn.Module]
    moments: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


def erf_moments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(2/π) arcsin(2c / √((1 + 2a)(1 + 2b))) and (4/π) / √((1 + 2a)(1 + 2b) − 4c²) (Williams, "Computing with infinite
    networks", NeurIPS 1996)."""
    product = (1 + 2 * a) * (1 + 2 * b)
    return 2 / math.pi * torch.asin(2 * c / product.sqrt()), 4 / math.pi / (product - 4 * c**2).sqrt()


def relu_moments(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """With cos θ = c / √(ab): √(ab) (sin θ + (π − θ) cos θ) / 2π and (π − θ) / 2π, the arc-cosine kernels of degree one
    and zero, halved (Cho and Saul, "Kernel methods for deep learning", NeurIPS 2009)."""
    size = (a * b).sqrt()
    cosine = (c / size).clamp(-1, 1)  # for rounding
    angle = torch.acos(cosine)
    value = size * (torch.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
    return value, (math.pi - angle) / (2 * math.pi)


ACTIVATIONS = {"relu": Activation(nn.ReLU, relu_moments), "erf": Activation(Erf, erf_moments)}


class InfiniteWidthKernel(gpytorch.kernels.Kernel):
    """Θ, or Σ with `kind="nngp"`, as a kernel of GPyTorch's.

    :param layers: L, the number of layers with weights; L − 1 of them are hidden.
    :param activation: `"relu"` or `"erf"`.
    :param kind: `"ntk"` for Θ, `"nngp"` for Σ.
    :param weight_variance: σ_w².
    :param bias_variance: σ_b².
    """

    def __init__(
        self,
        layers: int = 3,
        activation: str = "erf",
        kind: str = "ntk",
        weight_variance: float = 1.5,
        bias_variance: float = 0.1,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}.")
        if kind not in ("ntk", "nngp"):
            raise ValueError(f"kind must be 'ntk' or 'nngp', got {kind!r}.")
        self.layers, self.activation, self.kind = layers, activation, kind
        self.weight_variance, self.bias_variance = weight_variance, bias_variance

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_) -> Tensor:
        a, b = ((x.square().sum(-1) * self.weight_variance / x.shape[-1] + self.bias_variance) for x in (x1, x2))
        inner = (x1 * x2).sum(-1) if diag else x1 @ x2.mT
        if not diag:
            a, b = a.unsqueeze(-1), b.unsqueeze(-2)
        covariance = self.weight_variance * inner / x1.shape[-1] + self.bias_variance
        tangent = covariance
        moments = ACTIVATIONS[self.activation].moments
        for _layer in range(self.layers - 1):
            value, slope = moments(a, b, covariance)
            covariance = self.weight_variance * value + self.bias_variance
            a, b = (self.weight_variance * moments(v, v, v)[0] + self.bias_variance for v in (a, b))
            tangent = covariance + self.weight_variance * tangent * slope
        return tangent if self.kind == "ntk" else covariance


class NTKLinear(nn.Module):
    """σ_w W x / √(d_in) + σ_b b with standard normal W and b; as one linear layer between two factors, of which
    `ntk_gp` knows a rule."""

    def __init__(self, d_in: int, d_out: int, weight_variance: float, bias_variance: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in))
        self.bias = nn.Parameter(torch.randn(d_out)) if bias_variance > 0 else None
        self.after = math.sqrt(bias_variance) if bias_variance > 0 else 1.0
        self.before = math.sqrt(weight_variance / d_in) / self.after

    def forward(self, x: Tensor) -> Tensor:
        return self.after * nn.functional.linear(self.before * x, self.weight, self.bias)


def make_network(
    inputs: int,
    width: int,
    layers: int = 3,
    activation: str = "erf",
    weight_variance: float = 1.5,
    bias_variance: float = 0.1,
) -> nn.Sequential:
    """Random weights, one output, of shape (n,)."""
    widths = [inputs, *[width] * (layers - 1), 1]
    modules: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        modules += [NTKLinear(d_in, d_out, weight_variance, bias_variance), ACTIVATIONS[activation].module()]
    return nn.Sequential(*modules[:-1], nn.Flatten(0))


# ---- The experiment of the notebook ----


class Data(NamedTuple):
    x: Tensor
    y: Tensor
    test_x: Tensor
    truth: Tensor


NOISE = 0.3


def angles_to_inputs(angles: Tensor) -> Tensor:
    """Points on a circle of radius √2, so that their mean square is one."""
    return math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], dim=-1)


def target(angles: Tensor) -> Tensor:
    return (2 * angles).sin() + 0.5 * (3 * angles).cos()


def draw_data(n: int, test_points: int = 64, seed: int = 0) -> Data:
    """n noisy observations of a function on a circle."""
    generator = torch.Generator().manual_seed(seed)
    angles = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    y = target(angles) + NOISE * torch.randn(n, generator=generator, dtype=torch.float64)
    test = torch.linspace(0, 2 * math.pi, test_points + 1, dtype=torch.float64)[:-1]
    return Data(angles_to_inputs(angles), y, angles_to_inputs(test), target(test))


def train(network: nn.Module, data: Data, rate: float, steps: list[int]) -> tuple[Tensor, Tensor]:
    """Gradient descent on the mean squared error, all data at once; the network's values at the training and the test
    inputs after each of these numbers of steps, (len(steps), n) and (len(steps), test points)."""
    dtype = next(network.parameters()).dtype
    x, y, test_x = data.x.to(dtype), data.y.to(dtype), data.test_x.to(dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    at_train, at_test = [], []
    for step in range(max(steps) + 1):
        optimizer.zero_grad()
        values = network(x)
        if step in steps:
            at_train.append(values.detach().double())
            with torch.no_grad():
                at_test.append(network(test_x).double())
        nn.functional.mse_loss(values, y).backward()
        optimizer.step()
    return torch.stack(at_train), torch.stack(at_test)


def relative_change(before: Tensor, after: Tensor) -> float:
    """‖after − before‖ / ‖before‖."""
    return float((after - before).norm() / before.norm())


def alignment(kernel: Tensor, y: Tensor) -> float:
    """yᵀKy / (‖K‖ ‖y‖²): the cosine between K and yyᵀ (Cristianini, Shawe-Taylor, Elisseeff and Kandola, "On
    kernel-target alignment", NeurIPS 2001)."""
    return float(y @ kernel @ y / (kernel.norm() * y.square().sum()))


def slope(widths: list[int], values: Tensor) -> float:
    """Of the line through (log width, log value): −1/2 where values fall as 1/√width."""
    x = torch.tensor(widths, dtype=torch.float64).log()
    x, y = x - x.mean(), values.double().log() - values.double().log().mean()
    return float((x * y).sum() / x.square().sum())


def mean_and_error(values: Tensor) -> str:
    """Mean and standard error over seeds."""
    error = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(math.nan)
    return f"{float(values.mean()):.2g} ± {float(error):.1g}"
