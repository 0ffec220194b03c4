"""Networks as their users write them: of full depth, and narrow, so that all of their Jacobians can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ntk_gp import pack


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or channels != out_channels:
            shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """With names and layers as torchvision's, whose width is 64."""

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=0.1, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        attended, _ = self.self_attention(normed, normed, normed, need_weights=False)
        x = x + self.dropout(attended)
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """As torchvision's: a class token before the patches, learned positions, norms first."""

    def __init__(self, num_classes: int, size: int = 32, patch: int = 8, width: int = 48, heads: int = 4):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width).normal_(std=0.02))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(6)))
        self.ln = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = self.conv_proj(x)
        x = x.reshape(n, x.shape[1], -1).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        x = self.ln(self.layers(self.dropout(x + self.pos_embedding)))
        return self.head(x[:, 0])


class BertLayer(nn.Module):
    """Attention by hand, scores of padding far below the others, norms last."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Linear(width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        return x.view(n, length, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        weights = self.dropout((scores + bias).softmax(dim=-1))
        context = torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous().view(x.shape)
        x = self.attention_norm(x + self.dropout(self.attention_output(context)))
        return self.output_norm(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class BertClassifier(nn.Module):
    """Of token ids (n, length), int64, and a mask (n, length), int64, that is 0 at padding."""

    def __init__(self, num_classes: int, vocabulary: int = 100, length: int = 12, width: int = 32, layers: int = 3):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(length, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.register_buffer("position_ids", torch.arange(length).expand(1, -1))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(BertLayer(width, heads=4) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        embedded = self.word_embeddings(ids) + self.token_type_embeddings(torch.zeros_like(ids))
        x = self.dropout(self.norm(embedded + self.position_embeddings(self.position_ids[:, : ids.shape[1]])))
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, bias)
        return self.classifier(self.dropout(torch.tanh(self.pooler(x[:, 0]))))


class Tagger(nn.Module):
    """A tag for each word of a sentence, by an LSTM in both directions: ids (n, length) to (n, length, tags)."""

    def __init__(self, tags: int, vocabulary: int = 50, width: int = 8, hidden: int = 10):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2)
        self.hidden2tag = nn.Linear(2 * hidden, tags)

    def forward(self, sentence: Tensor) -> Tensor:
        states, _ = self.lstm(self.word_embeddings(sentence))
        return self.hidden2tag(states)


class DoubleConv(nn.Sequential):
    def __init__(self, channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions or interpolation: an image to a map of the same size."""

    def __init__(self, channels: int, width: int = 8):
        super().__init__()
        self.inc = DoubleConv(channels, width)
        self.down1, self.down2 = DoubleConv(width, 2 * width), DoubleConv(2 * width, 4 * width)
        self.up1, self.conv1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), DoubleConv(4 * width, 2 * width)
        self.up2 = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2 * width, width, 1))
        self.conv2 = DoubleConv(2 * width, width)
        self.outc = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inc(x)
        second = self.down1(F.max_pool2d(first, 2))
        deepest = self.down2(F.max_pool2d(second, 2))
        x = self.conv1(torch.cat([second, self.up1(deepest)], dim=1))
        x = self.conv2(torch.cat([first, self.up2(x)], dim=1))
        return self.outc(x).squeeze(1)


class BurgersPINN(nn.Module):
    """u(x, t), and the residual of Burgers' equation, u_t + u u_x − ν u_xx: outputs (n, 2)."""

    def __init__(self, width: int = 20):
        super().__init__()
        hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *hidden, nn.Linear(width, 1))

    def forward(self, xt: Tensor) -> Tensor:
        with torch.enable_grad():
            xt = xt.requires_grad_() if xt.is_leaf else xt
            u = self.net(xt)
            u_x, u_t = torch.autograd.grad(u.sum(), xt, create_graph=True)[0].split(1, dim=1)
            u_xx = torch.autograd.grad(u_x.sum(), xt, create_graph=True)[0][:, :1]
        return torch.cat([u, u_t + u * u_x - 0.01 / math.pi * u_xx], dim=1)


@dataclass(frozen=True)
class RealNetwork:
    """A network, inputs for it, and what it is to be told of by whoever makes a kernel of it.

    :param build: Makes the network.
    :param width: d, the numbers in one input.
    :param options: Of kernel and mean.
    :param integers: Inputs are integers below this number, as floats.
    :param autodiff: Patterns of those that no rule serves.
    """

    build: Callable[[], nn.Module]
    width: int
    options: dict[str, Any] = field(default_factory=dict)
    integers: int | None = None
    autodiff: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        """In eval mode, float64; biases and statistics as if it had been trained, none of them zero or one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.build().double()
            with torch.no_grad():
                for name, tensor in (*network.named_parameters(), *network.named_buffers()):
                    if name.endswith("running_var"):
                        tensor.uniform_(0.5, 2.0)
                    elif tensor.is_floating_point() and (tensor.dim() == 1 or name == "class_token"):
                        tensor += 0.1 * torch.randn_like(tensor)
        return network.eval()

    def inputs(self, n: int) -> Tensor:
        """(n, d), float64."""
        generator = torch.Generator().manual_seed(1)
        if self.integers is not None:
            return torch.randint(self.integers, (n, self.width), generator=generator).double()
        return torch.randn(n, self.width, generator=generator, dtype=torch.float64)

    def call(self, network: nn.Module, x: Tensor) -> Tensor:
        """The network at inputs (n, d), called as whoever trained it does."""
        x = x.to(self.options.get("input_dtype", x.dtype))
        return network(x.reshape(-1, *self.options.get("input_shape", x.shape[1:])))


class Sentences(RealNetwork):
    """Ids of words, and a mask that is 1 where there is one, 0 at padding: lengths from two on."""

    def inputs(self, n: int) -> Tensor:
        return pack(self.options["input_shape"], self._tokens(n), dtype=torch.float64)

    def call(self, network: nn.Module, x: Tensor) -> Tensor:
        return network(**self._tokens(len(x)))

    def _tokens(self, n: int) -> dict[str, Tensor]:
        """As a tokenizer gives them, int64."""
        ids, length = super().inputs(n).long()[:, : self.width // 2] + 1, self.width // 2
        mask = (torch.arange(length) < 2 + torch.arange(n)[:, None] % (length - 1)).long()
        return {"ids": ids * mask, "mask": mask}


IMAGE = {"input_shape": (3, 32, 32)}
WORDS = {"input_dtype": torch.long}
TOKENS = {"input_shape": {"ids": (12,), "mask": (12,)}, "input_dtype": torch.long}
REAL_NETWORKS = {
    "resnet18": RealNetwork(lambda: ResNet18(10, width=16), 3 * 32 * 32, {**IMAGE, "output": 3}),
    "vit": RealNetwork(lambda: VisionTransformer(3), 3 * 32 * 32, {**IMAGE, "output": "all"}),
    "bert": Sentences(lambda: BertClassifier(3), 24, {**TOKENS, "output": "all"}, integers=99),
    "lstm_tagger": RealNetwork(lambda: Tagger(3), 4, {**WORDS, "output": "all"}, integers=50, autodiff=("lstm.*",)),
    "unet": RealNetwork(lambda: UNet(3), 3 * 16 * 16, {"input_shape": (3, 16, 16), "output": 16 * 9 + 5}),
    "pinn": RealNetwork(BurgersPINN, 2, {"output": "all"}, autodiff=("*.weight",)),
}
