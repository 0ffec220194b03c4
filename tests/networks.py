"""Networks as shared data: every kind of layer and of parameter use, and a set that tries to fool the capture.

Each case builds a small network in float64 with random weights (also biases and running statistics), and says how to
freeze it. `CASES` are ordinary networks, `ADVERSARIAL` ones use their parameters in ways that are easy to miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ntk_gp.network import FrozenNetwork


@dataclass(frozen=True)
class Case:
    """A network and its inputs.

    :param build: Makes the network.
    :param width: d, the features of one input.
    :param options: Arguments of `FrozenNetwork`.
    :param autodiff: The parameters that no rule serves, by name; "all" of them; or None where that is not said.
    :param integers: Inputs are integers below this number, as floats.
    :param tolerance: How close to explicit Jacobians, relative, in float64.
    """

    name: str
    build: Callable[[], nn.Module]
    width: int
    options: dict[str, Any] = field(default_factory=dict)
    autodiff: tuple[str, ...] | str | None = ()
    integers: int | None = None
    tolerance: float = 1e-10

    def network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = self.build().double()
            with torch.no_grad():
                for tensor in (*network.parameters(), *network.buffers()):
                    if tensor.is_floating_point():
                        tensor.copy_(0.3 * torch.randn_like(tensor))
                for module in network.modules():
                    if getattr(module, "running_var", None) is not None:
                        module.running_var.uniform_(0.5, 2.0)
        return network.eval()

    def frozen(self) -> FrozenNetwork:
        return FrozenNetwork(self.network(), **self.options)

    def inputs(self, n: int, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """(batch, n, d)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, n, self.width)
        if self.integers is not None:
            return torch.randint(self.integers, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), ResidualBlock(4, 4, 1),
        ResidualBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding="same", dilation=2), nn.GroupNorm(2, 4), nn.SiLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2), nn.PReLU(4),
        nn.Conv2d(4, 6, (2, 1), groups=2, bias=False), nn.InstanceNorm2d(6, affine=True), nn.Tanh(),
        nn.Conv2d(6, 6, 2, padding=1, padding_mode="circular"), nn.Tanh(),
        nn.Flatten(), nn.LazyLinear(1),
    )  # fmt: skip


def built(network: nn.Module, *shape: int) -> nn.Module:
    """With its lazy layers made."""
    network(torch.zeros(2, *shape))
    return network


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(1, 3, 3, padding=1)
        self.down2 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.tanh(self.down1(x))
        deep = torch.tanh(self.down2(skip))
        return self.out(torch.cat([skip, torch.tanh(self.up(deep))], dim=1)).mean((2, 3))


class Transformer(nn.Module):
    """An encoder; sequence first, as torch's default is."""

    def __init__(self, batch_first: bool = False, norm_first: bool = False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(x.shape[0], 4, 8)
        if self.batch_first:
            return self.head(self.encoder(tokens).mean(1))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(0))


class CrossAttention(nn.Module):
    """Attention with query, keys and values of different widths."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=5, batch_first=True)
        self.packed = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values = (x[:, 4 * i : 4 * i + 4].unsqueeze(-1) for i in range(3))
        query, keys, values = query.expand(-1, -1, 4) + 1, keys.expand(-1, -1, 3).sin(), values.expand(-1, -1, 5)
        attended, weights = self.attention(query, keys, values)
        attended, _ = self.packed(attended, query * 2, attended.sin(), need_weights=False)
        return self.head(attended.mean(1)) + weights.square().sum((1, 2)).unsqueeze(-1)


class VisionTransformer(nn.Module):
    """Patches, class token, positional embedding, LayerScale."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.positions = nn.Parameter(torch.zeros(1, 12, 6))
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1)
        tokens = tokens + self.positions[:, : tokens.shape[1]]
        normed = self.norm(tokens)
        tokens = tokens + self.scale * self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(tokens[:, 0])


class EmbeddingLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3, padding_idx=0)
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x.long()))[0][:, -1])


class Language(nn.Module):
    """Token and positional embeddings, the token embedding also being the decoder."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.positions = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x.long()) + self.positions(torch.arange(x.shape[1], device=x.device))
        h = torch.tanh(self.mix(h)).mean(1)
        return F.linear(h, self.tokens.weight)[:, :3]


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.encoder(x)) @ self.encoder.weight + self.bias


class RecurrentByHand(nn.Module):
    """The same cell at every time step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 4)
        for step in x.reshape(x.shape[0], 3, 2).unbind(1):
            state = torch.tanh(self.cell(torch.cat([state, step], dim=-1)))
        return self.head(state)


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.conv = nn.Conv1d(1, 1, 3, padding=1)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(torch.tanh(self.first(x))))
        h = torch.tanh(self.conv(self.conv(h.unsqueeze(1)).sin()))[:, 0]
        return self.norm(self.norm(h).sin()).square().sum(-1)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.offset = nn.Parameter(torch.zeros(1))
        self.gate = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * torch.tanh(self.block(x))
        x = torch.tanh(x - self.offset).mul(self.gate) + (1 - self.gate)
        return self.head(x)


class SharedWithUnknown(nn.Module):
    """One parameter used by a linear layer and by code that no rule knows; another by that code alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.other = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.linear(x)) + torch.einsum("ni,oi->no", torch.tanh(x), self.linear.weight)
        return self.head(torch.einsum("ni,i->ni", h, self.other))


class Windows(nn.Module):
    """Positions folded into the batch dimension, with layers of every kind on the fold."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.group = nn.GroupNorm(1, 2)
        self.slope = nn.PReLU(2)
        self.linear = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.reshape(-1, 1, 4))
        h = self.slope(self.group(self.norm(h)))
        h = self.linear(h.flatten(1)).sin() * self.scale
        return h.reshape(x.shape[0], -1).sum(-1)


class Heads(nn.Module):
    """Raw matrices: from the right, from the left, one for each head, a vector."""

    def __init__(self):
        super().__init__()
        self.right = nn.Parameter(torch.zeros(3, 4))
        self.left = nn.Parameter(torch.zeros(5, 2))
        self.heads = nn.Parameter(torch.zeros(2, 2, 3))
        self.vector = nn.Parameter(torch.zeros(3))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x.reshape(-1, 2, 3) @ self.right)  # (n, 2, 4)
        h = torch.tanh(self.left @ h)  # (n, 5, 4)
        h = torch.addmm(self.bias, h[:, 0, :3], self.right) + h[:, 1]  # (n, 4)
        h = torch.tanh(torch.matmul(h.reshape(-1, 2, 1, 2), self.heads))  # (n, 2, 1, 3)
        return h.sum((1, 2)) @ self.vector


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bilinear(x[:, :2], x[:, 2:])))


class Volume(nn.Module):
    """Three dimensions, transposed convolutions with groups and dilation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=1)
        self.up = nn.ConvTranspose3d(2, 4, 2, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm3d(4)
        self.up1 = nn.ConvTranspose1d(4, 2, 3, dilation=2, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.up(torch.tanh(self.conv(x)))))
        return self.up1(h.flatten(2)).sin().sum((1, 2))


CASES = [
    Case("mlp", lambda: mlp(3, 6, 5, 1), 3),
    Case("mlp_outputs", lambda: mlp(3, 20, 20, 4), 3, {"output": "all"}),
    Case("mlp_one_output", lambda: mlp(3, 20, 20, 4), 3, {"output": 2}),
    Case("mlp_groups", lambda: mlp(3, 20, 20, 2), 3, {"output": "all", "group_by": lambda name: name.split(".")[0]}),
    Case("mlp_bias_group", lambda: mlp(3, 20, 20, 1), 3, {"group_by": lambda name: name.split(".")[1]}),
    Case("selected_weights", lambda: mlp(3, 20, 20, 1), 3, {"parameters": "*.weight"}),
    Case("selected_biases", lambda: mlp(3, 20, 20, 2), 3, {"parameters": "*.bias", "output": "all"}),
    Case("last_layer", lambda: mlp(3, 6, 5, 4), 3, {"parameters": "4.*", "output": "all"}),
    Case("cnn", lambda: built(cnn(), 2, 6, 6), 72, {"input_shape": (2, 6, 6)}),
    Case("cnn_biases", lambda: built(cnn(), 2, 6, 6), 72, {"input_shape": (2, 6, 6), "parameters": "*.bias"}),
    Case("resnet", resnet, 50, {"input_shape": (2, 5, 5), "output": "all"}),
    Case("unet", UNet, 36, {"input_shape": (1, 6, 6)}),
    Case("volume", Volume, 27, {"input_shape": (1, 3, 3, 3)}),
    Case("transformer", Transformer, 32, {"output": "all"}),
    Case("transformer_batch_first", lambda: Transformer(True, True), 32, {"output": "all"}),
    Case("cross_attention", CrossAttention, 12),
    Case("vision_transformer", VisionTransformer, 36, {"input_shape": (1, 6, 6), "output": "all"}),
    Case(
        "embedding_lstm",
        EmbeddingLSTM,
        5,
        autodiff=("lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"),
        integers=7,
    ),
    Case("language", Language, 5, {"output": "all"}, integers=7),
    Case("tied_autoencoder", TiedAutoencoder, 4, {"output": "all"}),
    Case("recurrent_by_hand", RecurrentByHand, 6, {"output": "all"}),
    Case("used_twice", UsedTwice, 3),
    Case("layer_scale", LayerScale, 4),
    Case(
        "weight_norm",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
        3,
    ),
    Case("shared_with_unknown", SharedWithUnknown, 3, autodiff=("linear.weight", "other")),
    Case("windows", Windows, 8),
    Case("heads", Heads, 6),
    Case("bilinear", Bilinear, 5, {"output": "all"}),
]


class _Scaled(torch.autograd.Function):
    """The identity, with a derivative of its own."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -2.0 * grad

    @staticmethod
    def vmap(info, in_dims, tensor):
        return _Scaled.apply(tensor), in_dims[0]

    @staticmethod
    def jvp(ctx, tangent):
        return -2.0 * tangent


class _HiddenLinear(torch.autograd.Function):
    """A product with a parameter that no torch function call shows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent):
        x, weight = ctx.saved_tensors
        out = 0 if weight_tangent is None else x @ weight_tangent.T
        return out if x_tangent is None else out + x_tangent @ weight.T


_linear_alias = F.linear


class Adversary(nn.Module):
    """A hidden layer whose weight, 4 × 4, is used as `trick(weight, x)` says, with an ordinary use beside it."""

    def __init__(self, trick: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))
        self.first = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.trick = trick

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.trick(self, h)))


def _rows_of_weight(net: Adversary, h: Tensor) -> Tensor:
    upper, lower = net.weight.chunk(2)
    return torch.cat([F.linear(h, upper), F.linear(h.sin(), lower)], dim=-1)


def _overlapping_slices(net: Adversary, h: Tensor) -> Tensor:
    return (
        F.linear(h, net.weight[:3]).sum(-1, keepdim=True) + F.linear(h.sin(), net.weight[1:]).sum(-1, keepdim=True) + h
    )


def _transposed_and_not(net: Adversary, h: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(h, net.weight)), net.weight.t())


def _cast(net: Adversary, h: Tensor) -> Tensor:
    return F.linear(h, net.weight.to(torch.float32).to(h.dtype)) + F.linear(h, net.weight)


def _changed_in_place(net: Adversary, h: Tensor) -> Tensor:
    h = F.linear(h, net.weight)
    h += net.weight[0]
    h.mul_(2.0)
    h[:, 0] += 1.0
    return h.tanh_()


def _input_changed_after_use(net: Adversary, h: Tensor) -> Tensor:
    z = h + net.weight[0]
    out = z.cumsum(-1)
    z.mul_(0.0)
    return out + z


def _expanded(net: Adversary, h: Tensor) -> Tensor:
    return F.linear(h, net.weight[:1].expand(4, 4)) + h


def _einsum_and_linear(net: Adversary, h: Tensor) -> Tensor:
    return torch.einsum("ni,oi->no", h, net.weight) + F.linear(h.sin(), net.weight)


def _twice_in_one_call(net: Adversary, h: Tensor) -> Tensor:
    return h @ F.linear(net.weight, net.weight)


def _gathered(net: Adversary, h: Tensor) -> Tensor:
    return F.linear(h, net.weight[[0, 0, 1, 3]])


def _own_derivative(net: Adversary, h: Tensor) -> Tensor:
    return F.linear(h, _Scaled.apply(net.weight)) + F.linear(h, net.weight)


def _hidden(net: Adversary, h: Tensor) -> Tensor:
    return _HiddenLinear.apply(h, net.weight) + F.linear(h.sin(), net.weight)


def _detached(net: Adversary, h: Tensor) -> Tensor:
    return F.linear(h, net.weight.detach()) + F.linear(h.sin(), net.weight)


def _without_gradient(net: Adversary, h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = F.linear(h, net.weight)
    return F.linear(h, net.weight) * scale


def _by_keyword(net: Adversary, h: Tensor) -> Tensor:
    return _linear_alias(weight=net.weight, input=h) + torch._C._nn.linear(h, bias=net.weight[1], weight=net.weight)


def _operator_call(net: Adversary, h: Tensor) -> Tensor:
    return torch.ops.aten.linear(h, net.weight) + F.linear(h.sin(), net.weight)


def _written_with_out(net: Adversary, h: Tensor) -> Tensor:
    table = h.new_zeros(4, 4)
    table[:2] = net.weight[:2]
    return F.linear(h, table) + F.linear(h, net.weight)


def _points_in_the_middle(net: Adversary, h: Tensor) -> Tensor:
    z = torch.stack([h, h.sin(), h.cos()])  # (3, n, 4): the points come second
    z = F.linear(z, net.weight) * net.weight[0] + net.weight[:3, None]
    return z.prod(0)


def _positions_first_in_the_fold(net: Adversary, h: Tensor) -> Tensor:
    z = torch.cat([h, h.sin(), h.cos()])  # (3n, 4): positions and points folded, positions first
    a, b, c = F.linear(z, net.weight).chunk(3)
    return a * b + c


def _points_last(net: Adversary, h: Tensor) -> Tensor:
    return (net.weight @ h.T).T + F.linear(h.T.contiguous().T, net.weight)


def _pushed_through_ones(net: Adversary, h: Tensor) -> Tensor:
    return h * F.linear(torch.ones(1, 4, dtype=h.dtype), net.weight)


def _hooked() -> nn.Module:
    network = mlp(3, 4, 4, 2)
    network[0].register_forward_hook(lambda module, args, out: out * 2 + args[0].sum(-1, keepdim=True) * module.bias)
    network[2].register_forward_pre_hook(lambda module, args: (args[0] @ module.weight,))
    return network


def _compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class DataDependent(nn.Module):
    """Rows take either way by a mask; which layers run depends on whether any row does."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :1] > 1.0
        out = torch.tanh(self.left(x))
        if bool(mask.any()):
            out = torch.where(mask, out * self.right(x), out)
        return out


_TRICKS: list[tuple[Callable, tuple[str, ...]]] = [
    (_rows_of_weight, ()),
    (_overlapping_slices, ()),
    (_transposed_and_not, ()),
    (_cast, ()),
    (_changed_in_place, ()),
    (_input_changed_after_use, ()),
    (_expanded, ()),
    (_einsum_and_linear, ("weight",)),
    (_twice_in_one_call, ()),
    (_gathered, ()),
    (_own_derivative, ("weight",)),
    (_hidden, ("weight",)),
    (_detached, ()),
    (_without_gradient, ()),
    (_by_keyword, ()),
    (_operator_call, ("weight",)),
    (_written_with_out, ("weight",)),
    (_points_in_the_middle, ()),
    (_positions_first_in_the_fold, ("weight",)),
    (_points_last, ("weight",)),
    (_pushed_through_ones, ()),
]

ADVERSARIAL = [
    *(
        Case(
            trick.__name__.strip("_"),
            lambda trick=trick: Adversary(trick),
            4,
            {"output": "all"},
            autodiff,
            tolerance=1e-6 if trick is _cast else 1e-10,  # a part of it is computed in float32
        )
        for trick, autodiff in _TRICKS
    ),
    Case("hooked", _hooked, 3, {"output": "all"}),
    Case("compiled", _compiled, 3, {"output": "all"}),
    Case("data_dependent", DataDependent, 3, {"output": "all"}, None),
]
