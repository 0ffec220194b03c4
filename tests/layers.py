"""One small network, in float64, for every kind of layer: what torch's transforms do with each differs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Custom(nn.Module):
    """A forward function of the module and x, with the named submodules and parameters."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **members: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def hidden(*layers: nn.Module, width: int = 6) -> nn.Module:
    """The layers between a linear one, 4 to 6, and a linear one, `width` to 1."""
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(width, 1))


def image(*layers: nn.Module, features: int) -> nn.Module:
    """The layers on a 1×4×4 image, tanh, and a linear layer."""
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), *layers, nn.Tanh(), nn.Flatten(), nn.Linear(features, 1))


def sequence(layer: nn.Module, width: int, apply: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A layer on a sequence of four vectors of four, averaged over the sequence, and a linear layer."""
    return Custom(
        lambda self, x: self.head(apply(self.layer, x.reshape(len(x), 4, 4)).mean(1)),
        layer=layer,
        head=nn.Linear(width, 1),
    )


def function(apply: Callable[[Tensor], Tensor], width: int = 6) -> nn.Module:
    """A function after a linear layer, 4 to 6, and before one from `width` to 1."""
    return Custom(lambda self, x: self.head(apply(self.body(x))), body=nn.Linear(4, 6), head=nn.Linear(width, 1))


def trained(network: nn.Module, inputs: int) -> nn.Module:
    """With the running statistics of a batch."""
    network.train()(2 * torch.randn(32, inputs) + 1)
    return network


def tied() -> nn.Module:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 1))


class SinOnce(torch.autograd.Function):
    """A function whose derivative its author has no derivative of."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class Square(torch.autograd.Function):
    """x², whose second derivatives are right and whose third ones are not."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return SquareBackward.apply(grad, *ctx.saved_tensors)


class SquareBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x)
        return 2 * grad * x

    @staticmethod
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        return 2 * cotangent * x.detach(), 2 * grad * cotangent


def differentiates_twice(apply: Callable[[Tensor], Tensor]) -> bool:
    """Whether torch has the second derivatives of a function of (3, 2)."""
    x = torch.arange(6.0).square().reshape(3, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(apply(x).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), x)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


def indices(x: Tensor) -> Tensor:
    return (2 * x.detach()).long().clamp(0, 4)


ACTIVATIONS = {
    activation.__class__.__name__: activation
    for activation in (
        nn.Tanh(), nn.Sigmoid(), nn.ReLU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.ELU(), nn.CELU(), nn.SELU(),
        nn.Softplus(3.0, 2.0),
        nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.ReLU6(), nn.LeakyReLU(), nn.RReLU(), nn.LogSigmoid(),
        nn.Softsign(), nn.Tanhshrink(), nn.Softshrink(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.Softmin(-1),
        nn.Dropout(0.5), nn.AlphaDropout(), nn.Identity(),
    )
}  # fmt: skip

PDIST = (4, lambda: function(lambda z: torch.stack([F.pdist(row.reshape(3, 2)) for row in z.tanh()]), width=3))

# name: (number of inputs, how to make it)
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    **{name: (4, lambda activation=activation: hidden(activation)) for name, activation in ACTIVATIONS.items()},
    "PReLU": (4, lambda: hidden(nn.PReLU(6))),
    "GELU_tanh": (4, lambda: hidden(nn.GELU("tanh"))),
    "GLU": (4, lambda: hidden(nn.GLU(), width=3)),
    "inplace": (4, lambda: hidden(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.SiLU(inplace=True))),
    "tied": (4, tied),
    "third_derivative": (4, lambda: function(lambda z: Square.apply(z))),
    "LayerNorm": (4, lambda: hidden(nn.LayerNorm(6), nn.Tanh())),
    "LayerNorm_last": (4, lambda: hidden(nn.Tanh(), nn.LayerNorm(6))),
    "RMSNorm": (4, lambda: hidden(nn.RMSNorm(6), nn.Tanh())),
    "GroupNorm": (4, lambda: hidden(nn.GroupNorm(2, 6), nn.Tanh())),
    "BatchNorm1d": (4, lambda: trained(hidden(nn.BatchNorm1d(6), nn.Tanh()), 4)),
    "BatchNorm2d": (16, lambda: trained(image(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), features=16), 16)),
    "GroupNorm_image": (16, lambda: image(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), features=16)),
    "InstanceNorm2d": (16, lambda: image(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True), features=16)),
    "LocalResponseNorm": (16, lambda: image(nn.Conv2d(1, 4, 3), nn.LocalResponseNorm(2), features=16)),
    "Conv2d": (16, lambda: image(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), features=4)),
    "Conv2d_padded": (16, lambda: image(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), features=32)),
    "ConvTranspose2d": (16, lambda: image(nn.ConvTranspose2d(1, 2, 3), features=72)),
    "MaxPool2d": (16, lambda: image(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), features=16)),
    "AvgPool2d": (16, lambda: image(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), features=16)),
    "AdaptiveAvgPool2d": (16, lambda: image(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), features=4)),
    "AdaptiveMaxPool2d": (16, lambda: image(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveMaxPool2d(2), features=16)),
    "LPPool2d": (16, lambda: image(nn.Conv2d(1, 4, 3, padding=1), nn.Sigmoid(), nn.LPPool2d(2, 2), features=16)),
    "Upsample": (16, lambda: image(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=2, mode="bilinear"), features=32)),
    "PixelShuffle": (16, lambda: image(nn.Conv2d(1, 4, 3), nn.PixelShuffle(2), features=16)),
    "MultiheadAttention": (
        16,
        lambda: sequence(
            nn.MultiheadAttention(4, 2, batch_first=True), 4, lambda layer, x: layer(x, x, x, need_weights=False)[0]
        ),
    ),
    "TransformerEncoderLayer": (
        16,
        lambda: sequence(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 4, lambda layer, x: layer(x)),
    ),
    "scaled_dot_product_attention": (
        16,
        lambda: sequence(
            nn.Linear(4, 12), 4, lambda layer, x: F.scaled_dot_product_attention(*layer(x).chunk(3, -1))
        ),
    ),
    "LSTM": (16, lambda: sequence(nn.LSTM(4, 5, batch_first=True), 5, lambda layer, x: layer(x)[0])),
    "GRU": (16, lambda: sequence(nn.GRU(4, 5, batch_first=True), 5, lambda layer, x: layer(x)[0])),
    "RNN": (16, lambda: sequence(nn.RNN(4, 5, batch_first=True), 5, lambda layer, x: layer(x)[0])),
    "GRUCell": (
        4,
        lambda: Custom(lambda self, x: self.head(self.cell(x)), cell=nn.GRUCell(4, 5), head=nn.Linear(5, 1)),
    ),
    "weight_norm": (
        4,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)),
    ),
    "weight_norm_old": (4, lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1))),
    "spectral_norm": (
        4,
        lambda: trained(
            nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 1)), 4
        ),
    ),
    "Bilinear": (
        4,
        lambda: Custom(
            lambda self, x: self.head(torch.tanh(self.body(x[:, :2], x[:, 2:]))),
            body=nn.Bilinear(2, 2, 5), head=nn.Linear(5, 1),
        ),
    ),
    "Embedding": (
        4,
        lambda: Custom(
            lambda self, x: self.head(torch.tanh(self.table(indices(x[:, 0])) + self.body(x))),
            table=nn.Embedding(5, 6), body=nn.Linear(4, 6), head=nn.Linear(6, 1),
        ),
    ),
    "EmbeddingBag": (
        4,
        lambda: Custom(
            lambda self, x: self.head(torch.tanh(self.table(indices(x)) + self.body(x))),
            table=nn.EmbeddingBag(5, 6), body=nn.Linear(4, 6), head=nn.Linear(6, 1),
        ),
    ),
    "cdist": (
        4,
        lambda: Custom(
            lambda self, x: self.head(torch.exp(-torch.cdist(x, self.centres))),
            centres=nn.Parameter(torch.randn(5, 4)), head=nn.Linear(5, 1),
        ),
    ),
    "cosine_similarity": (
        4,
        lambda: Custom(
            lambda self, x: self.head(F.cosine_similarity(x[:, None], self.centres[None], dim=-1)),
            centres=nn.Parameter(torch.randn(5, 4)), head=nn.Linear(5, 1),
        ),
    ),
    "einsum": (
        4,
        lambda: Custom(
            lambda self, x: torch.einsum("ni,ij,nj->n", x, self.matrix, torch.tanh(x)),
            matrix=nn.Parameter(torch.randn(4, 4)),
        ),
    ),
    "normalize": (4, lambda: function(lambda z: F.normalize(z, dim=-1))),
    "logsumexp": (4, lambda: function(lambda z: torch.logsumexp(z, -1, keepdim=True), width=1)),
    "std": (4, lambda: function(lambda z: z.std(-1, keepdim=True), width=1)),
    "sort": (4, lambda: function(lambda z: z.sort(-1)[0])),
    "cumprod": (4, lambda: function(lambda z: torch.tanh(z).cumprod(-1))),
    "fft": (4, lambda: function(lambda z: torch.fft.rfft(z).abs(), width=4)),
    "inverse": (4, lambda: function(lambda z: torch.linalg.inv(z[:, :4].reshape(-1, 2, 2)).flatten(1), width=4)),
}  # fmt: skip

# Layers whose derivative cannot be differentiated with respect to the inputs.
ONCE_DIFFERENTIABLE: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "once": (4, lambda: function(lambda z: SinOnce.apply(z))),
}  # fmt: skip
(NETWORKS if differentiates_twice(F.pdist) else ONCE_DIFFERENTIABLE)["pdist"] = PDIST  # torch 2.14 does


def make(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, float64, and five inputs for it."""
    inputs, build = {**NETWORKS, **ONCE_DIFFERENTIABLE}[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        return build().double().eval(), torch.randn(5, inputs)
    finally:
        torch.set_default_dtype(default)
