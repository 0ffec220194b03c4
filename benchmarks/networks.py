"""The networks that are measured, in PyTorch. All take flat inputs, (n, d)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

RESNET = "resnet20"
TRANSFORMER = "transformer"
IMAGE_SHAPE = (3, 32, 32)
SEQUENCE_SHAPE = (16, 8)
NUM_HEADS = 4


def build(name: str, seed: int = 0) -> nn.Module:
    """A network by name, with random weights: "resnet20", "transformer", or the widths of an MLP like "5-200-200-1"."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == RESNET:
            network = ResNet20()
        elif name == TRANSFORMER:
            network = Transformer()
        else:
            network = mlp(*widths(name))
        _randomise_statistics(network)
    return network.eval()


def input_size(name: str) -> int:
    """d, the width of a flat input."""
    shapes = {RESNET: IMAGE_SHAPE, TRANSFORMER: SEQUENCE_SHAPE}
    return math.prod(shapes[name]) if name in shapes else widths(name)[0]


def is_mlp(name: str) -> bool:
    return name not in (RESNET, TRANSFORMER)


def widths(name: str) -> list[int]:
    """The widths of an MLP: "5-200-200-1" to [5, 200, 200, 1]."""
    return [int(width) for width in name.split("-")]


def num_parameters(network: nn.Module) -> int:
    """P."""
    return sum(parameter.numel() for parameter in network.parameters())


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet20(nn.Sequential):
    """The ResNet-20 of CIFAR (He et al., 2016) with projection shortcuts and one output: P = 271,889."""

    def __init__(self) -> None:
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        blocks = [
            ResidualBlock(channels_in if block == 0 else channels, channels, stride if block == 0 else 1)
            for channels_in, channels, stride in stages
            for block in range(3)
        ]
        stem = [nn.Unflatten(1, IMAGE_SHAPE), nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))


class Transformer(nn.Module):
    """Two encoder layers over 16 tokens with a learned positional embedding, then a linear head on the mean token."""

    def __init__(self, width: int = 64, num_layers: int = 2):
        super().__init__()
        length, features = SEQUENCE_SHAPE
        self.embedding = nn.Linear(features, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, NUM_HEADS, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(num_layers)
        )
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x.reshape(-1, *SEQUENCE_SHAPE)) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden.mean(1))


def _randomise_statistics(network: nn.Module) -> None:
    """Gives batch normalisation statistics as after training: a mean of 0 and a variance of 1 would hide mistakes."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
