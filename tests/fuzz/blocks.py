"""What random networks are made of: one function for each block, from hidden features (n, WIDTH) to (n, WIDTH).

A block gets itself (its members are made by the functions named in its decorator), the hidden features h and the
network's inputs x. Each row must come from its own row of h and x alone. Adding a block is adding a function here.

The columns of x are numbers, of which the first says in which region a row is, and then TOKENS integers below
VOCABULARY.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence

WIDTH = 8
TOKENS = 3
VOCABULARY = 5


@dataclass(frozen=True)
class Kind:
    """A kind of block.

    :param function: (block, h, x) to the next h.
    :param members: What makes its layers, parameters, buffers (tensors) and other attributes.
    :param first: It writes into h, which must not be what another layer's derivative needs: only before all others.
    :param exact: Its parameters are used as they were made, not moved at random.
    :param once: Plain autograd cannot run it a second time for the backward pass.
    :param detached: Autograd's derivative in x is not that of the function, on purpose.
    :param single: A part of it is float32 in any case.
    :param may_refuse: It cannot be linearised faithfully, and a clear refusal is as good as the right numbers.
    """

    function: Callable[[Any, Tensor, Tensor], Tensor]
    members: dict[str, Callable[[], Any]]
    first: bool = False
    exact: bool = False
    once: bool = False
    detached: bool = False
    single: bool = False
    may_refuse: bool = False


BLOCKS: dict[str, Kind] = {}


FLAGS = {field.name for field in fields(Kind)} - {"function", "members"}


def block(**options: Any) -> Callable[[Callable], Callable]:
    """Adds a function to the table of blocks, by its name; takes what makes its members, and the flags of a `Kind`."""

    def add(function: Callable) -> Callable:
        flags = {name: options[name] for name in options.keys() & FLAGS}
        members = {name: make for name, make in options.items() if name not in FLAGS}
        BLOCKS[function.__name__] = Kind(function, members, **flags)
        return function

    return add


class Block(nn.Module):
    """One block with members of its own."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        kind = BLOCKS[name]
        for member, make in kind.members.items():
            value = make()
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(member, value)
            else:
                setattr(self, member, value)
        if not kind.exact:
            _move(self)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return BLOCKS[self.name].function(self, h, x)


@torch.no_grad()
def _move(module: nn.Module) -> None:
    """Away from the zeros and ones that layers begin with, running statistics too."""
    for parameter in module.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    for child in module.modules():
        if getattr(child, "running_var", None) is not None:
            child.running_mean.normal_(0, 0.3)
            child.running_var.uniform_(0.5, 2.0)


def region(x: Tensor) -> Tensor:
    return x[:, 0] > 0


def tokens(x: Tensor) -> Tensor:
    return x[:, -TOKENS:].long()


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(0.5 * torch.randn(*shape))


def linear(d_in: int = WIDTH, d_out: int = WIDTH, bias: bool = True) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(d_in, d_out, bias)


# --- Layers that multiply by their parameters


@block(layer=linear())
def dense(self, h, x):
    return self.layer(h)


@block(up=linear(WIDTH, 12, bias=False), down=linear(12, WIDTH))
def bottleneck(self, h, x):
    return self.down(F.silu(self.up(h)))


@block(weight=parameter(WIDTH, WIDTH), bias=parameter(WIDTH))
def matrix_from_the_right(self, h, x):
    return torch.addmm(self.bias, h, self.weight)


@block(weight=parameter(4, 4))
def matrix_from_the_left(self, h, x):
    return (self.weight @ h.view(-1, 4, 2)).flatten(1)


@block(weight=parameter(WIDTH, WIDTH))
def einsum(self, h, x):
    return torch.einsum("ni,oi->no", h, self.weight)


@block(weight=parameter(4, WIDTH, 2))
def one_matrix_per_head(self, h, x):
    return torch.matmul(h[:, None, None], self.weight).flatten(1)


@block(weight=parameter(4, 2, 2))
def one_matrix_per_head_of_its_own_features(self, h, x):
    return torch.matmul(h.view(-1, 4, 1, 2), self.weight).flatten(1)


@block(bilinear=lambda: nn.Bilinear(4, 4, WIDTH))
def bilinear(self, h, x):
    return self.bilinear(h[:, :4].contiguous(), h[:, 4:].contiguous())


@block(conv=lambda: nn.Conv2d(2, 4, 3, padding=1), back=lambda: nn.Conv2d(4, 2, 1, groups=2, bias=False))
def convolution(self, h, x):
    return self.back(torch.tanh(self.conv(h.view(-1, 2, 2, 2)))).flatten(1)


@block(conv=lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"))
def sequence_convolution(self, h, x):
    return self.conv(h.view(-1, 2, 4)).flatten(1)


@block(down=lambda: nn.Conv1d(1, 2, 2, stride=2), up=lambda: nn.ConvTranspose1d(2, 1, 2, stride=2))
def transposed_convolution(self, h, x):
    return self.up(torch.tanh(self.down(h.unsqueeze(1)))).flatten(1)


# --- Norms


@block(norm=lambda: nn.BatchNorm1d(WIDTH))
def batch_norm(self, h, x):
    return self.norm(h)


@block(norm=lambda: nn.BatchNorm2d(2))
def batch_norm_of_images(self, h, x):
    return self.norm(h.view(-1, 2, 2, 2)).flatten(1)


@block(norm=lambda: nn.LayerNorm(WIDTH))
def layer_norm(self, h, x):
    return self.norm(h + x.cos())


@block(norm=lambda: nn.GroupNorm(2, WIDTH))
def group_norm(self, h, x):
    return self.norm(h + x.cos())


@block(norm=lambda: nn.InstanceNorm1d(2, affine=True))
def instance_norm(self, h, x):
    return self.norm((h + x.cos()).view(-1, 2, 4)).flatten(1)


@block(norm=lambda: nn.RMSNorm(WIDTH))
def rms_norm(self, h, x):
    return self.norm(h + x.cos())


# --- Attention


@block(attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True))
def multihead_attention(self, h, x):
    sequence = h.view(-1, 2, 4)
    return self.attention(sequence, sequence, sequence, need_weights=False)[0].flatten(1)


@block(attention=lambda: nn.MultiheadAttention(2, 1, kdim=1, vdim=3))
def attention_to_inputs(self, h, x):
    """Sequence first, with keys and values of other widths, and the weights it attends with."""
    keys, values = x[:, :5].T.unsqueeze(-1), x[:, :6].view(-1, 2, 3).transpose(0, 1).repeat(3, 1, 1)[:5]
    attended, weights = self.attention(h.view(-1, 4, 2).transpose(0, 1), keys, values)
    return attended.transpose(0, 1).flatten(1) + weights.sum((1, 2)).sin().unsqueeze(-1)


@block(layer=lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, norm_first=True))
def transformer_layer(self, h, x):
    return self.layer(h.view(-1, 2, 4)).flatten(1)


def _heads(self, h):
    """Query, key and value, (n, heads, positions, features)."""
    return (
        layer(h.view(-1, 2, 4)).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)
    )


@block(query=linear(4, 4), key=linear(4, 4), value=linear(4, 4), out=linear(4, 4))
def attention_by_hand(self, h, x):
    """The bias of the keys has no gradient: softmax takes no notice of it."""
    query, key, value = _heads(self, h)
    weights = (query @ key.transpose(-2, -1) / 2**0.5).softmax(-1)
    return self.out((weights @ value).transpose(1, 2).flatten(2)).flatten(1)


@block(query=linear(4, 4), key=linear(4, 4), value=linear(4, 4))
def fused_attention(self, h, x):
    query, key, value = _heads(self, h)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(1)


@block(attention=lambda: nn.MultiheadAttention(4, 1, batch_first=True))
def attention_with_padding(self, h, x):
    sequence, padding = h.view(-1, 2, 4), torch.stack([tokens(x)[:, 0] < 0, tokens(x)[:, 0] == 0], 1)
    return self.attention(sequence, sequence, sequence, key_padding_mask=padding)[0].flatten(1)


# --- Recurrent layers


@block(layer=lambda: nn.LSTM(2, WIDTH, batch_first=True))
def lstm(self, h, x):
    return self.layer(h.view(-1, 4, 2))[1][0][-1]


@block(layer=lambda: nn.GRU(2, 4, batch_first=True, bidirectional=True))
def gru(self, h, x):
    return self.layer(h.view(-1, 4, 2))[0].mean(1)


@block(cell=lambda: nn.GRUCell(2, WIDTH))
def cell_by_hand(self, h, x):
    state = h.new_zeros(len(h), WIDTH)
    for step in h.view(-1, 4, 2).unbind(1):
        state = self.cell(step, state)
    return state


@block(layer=lambda: nn.GRU(2, WIDTH, batch_first=True))
def packed_sequence(self, h, x):
    lengths = 1 + tokens(x)[:, 0].clamp(0, 3)
    return self.layer(pack_padded_sequence(h.view(-1, 4, 2), lengths.cpu(), True, enforce_sorted=False))[1][-1]


# --- Embeddings


@block(table=lambda: nn.Embedding(VOCABULARY, WIDTH))
def embedding(self, h, x):
    return h + self.table(tokens(x)).mean(1)


@block(table=lambda: nn.Embedding(VOCABULARY, WIDTH, padding_idx=0))
def padded_embedding(self, h, x):
    return h * self.table(tokens(x)).sum(1)


@block(table=lambda: nn.Embedding(VOCABULARY, WIDTH, padding_idx=0))
def tied_embedding(self, h, x):
    logits = torch.einsum("nd,vd->nv", torch.tanh(h + self.table(tokens(x)).mean(1)), self.table.weight)
    return F.pad(logits, (0, WIDTH - VOCABULARY))


@block(table=lambda: nn.EmbeddingBag(VOCABULARY, WIDTH, mode="sum"))
def embedding_bag(self, h, x):
    return h + self.table(tokens(x), per_sample_weights=h[:, :TOKENS].contiguous())


@block(table=lambda: nn.Embedding(VOCABULARY, WIDTH, sparse=True))
def embedding_with_sparse_gradients(self, h, x):
    return h + self.table(tokens(x)).mean(1)


# --- Raw parameters


@block(offset=parameter(WIDTH))
def added(self, h, x):
    return h + self.offset


@block(scale=parameter(1, WIDTH))
def multiplied(self, h, x):
    return h.tanh() * self.scale


@block(temperature=lambda: nn.Parameter(torch.tensor(0.7)))
def scalar(self, h, x):
    return h * self.temperature


@block(bias=lambda: nn.Parameter(torch.tensor(0.3)), slope=parameter(1))
def scalar_inside(self, h, x):
    return torch.sigmoid(h * self.slope + self.bias)


@block(p=parameter(3))
def elements(self, h, x):
    return self.p[0] * h + self.p[2] * h.sin() + self.p[1]


@block(p=parameter(WIDTH, 3))
def columns(self, h, x):
    return h * self.p[:, 0] + self.p[:, 1:].sum(1)


@block(p=parameter(3, WIDTH))
def row_by_token(self, h, x):
    return h + self.p[tokens(x)[:, 0].clamp(max=2)]


@block(ps=lambda: nn.ParameterList([torch.randn(WIDTH), torch.randn(())]))
def parameter_list(self, h, x):
    return h * self.ps[0] + self.ps[1]


@block(p=parameter(WIDTH))
def cumulative(self, h, x):
    return h * self.p.cumsum(0)


@block(slope=lambda: nn.PReLU(WIDTH))
def learned_slope(self, h, x):
    return self.slope(h)


# --- Gates and branches


@block(gate=linear(), value=linear())
def gate(self, h, x):
    return torch.sigmoid(self.gate(h)) * self.value(h)


@block(layer=linear(WIDTH, 2 * WIDTH))
def gated_linear_unit(self, h, x):
    return F.glu(self.layer(h))


@block(left=linear(), right=linear())
def where(self, h, x):
    return torch.where(region(x).unsqueeze(-1), self.left(h), self.right(h).sin())


@block(layer=linear())
def masked_branch(self, h, x):
    out, mask = h.clone(), region(x)
    out[mask] = torch.tanh(self.layer(h[mask]))
    return out


@block(layer=linear())
def masked_branch_of_the_others(self, h, x):
    out, mask = h * 0.5, ~region(x)
    out[mask] = self.layer(h[mask])
    return out


@block(layer=linear())
def branch_taken_if_any(self, h, x):
    mask = region(x)
    return torch.where(mask.unsqueeze(-1), h * self.layer(h), h) if bool(mask.any()) else h


@block(scale=parameter(1), layer=linear())
def small_behind_the_gate(self, h, x):
    return h + 1e-6 * torch.where(region(x), 1e6, 1.0).unsqueeze(-1) * self.layer(h.flip(0)).flip(0) * self.scale


@block(detached=True, layer=linear())
def detached_gate(self, h, x):
    z = self.layer(h)
    return z * torch.sigmoid(z).detach()


# --- Rows that change places inside


@block(layer=linear())
def flipped_rows(self, h, x):
    return torch.tanh(self.layer(h.flip(0))).flip(0)


@block(layer=linear())
def sorted_rows(self, h, x):
    order = region(x).long().argsort(stable=True)
    out = torch.tanh(self.layer(h[order]))
    return torch.empty_like(out).index_copy(0, order, out)


@block(experts=lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), router=linear(WIDTH, 3))
def mixture_of_experts(self, h, x):
    weights, choice = self.router(h).softmax(-1), tokens(x)[:, 1].clamp(max=2)
    out = torch.zeros_like(h)
    for i, expert in enumerate(self.experts):
        rows = (choice == i).nonzero().squeeze(-1)
        out = out.index_add(0, rows, expert(h[rows]) * weights[rows, i : i + 1])
    return out


@block(layer=linear())
def positions_folded_into_rows(self, h, x):
    a, b = self.layer(torch.cat([h, h.sin()])).chunk(2)
    return a * b


# --- Pooling, and points without a derivative


@block(layer=linear())
def max_pooling(self, h, x):
    return F.interpolate(F.max_pool2d(self.layer(h).view(-1, 2, 2, 2), 2), scale_factor=2.0).flatten(1)


@block(exact=True, a=lambda: nn.Parameter(torch.ones(WIDTH)), b=lambda: nn.Parameter(torch.ones(WIDTH)))
def largest_of_equals(self, h, x):
    return torch.stack([h * self.a, h * self.b]).amax(0)


@block(exact=True, a=lambda: nn.Parameter(torch.ones(WIDTH)), b=lambda: nn.Parameter(torch.ones(WIDTH)))
def maximum_of_equals(self, h, x):
    return torch.maximum(h * self.a, h * self.b) + torch.stack([h.sin() * self.a, h.sin() * self.b], 1).max(1)[0]


@block(layer=linear(), places=lambda: torch.tensor([0, 1, 1, 2, 2, 2, 3, 4]))
def scatter_reduce(self, h, x):
    z = self.layer(h)
    return torch.zeros_like(z).scatter_reduce(1, self.places.expand(len(z), -1), z, "amax", include_self=False)


@block(layer=linear(), pool=lambda: nn.AdaptiveAvgPool1d(4))
def average_pooling(self, h, x):
    return self.pool(torch.relu(self.layer(h)).unsqueeze(1)).squeeze(1).repeat(1, 2)


@block(layer=linear())
def leaky(self, h, x):
    return F.leaky_relu(self.layer(h), 0.2)


# --- Writing in place


@block(first=True)
def inplace_first(self, h, x):
    return F.relu(h, inplace=True)


@block(first=True, layer=linear())
def centred_in_place_first(self, h, x):
    h -= h.mean(1, keepdim=True)
    return self.layer(h)


@block(layer=linear())
def inplace_activation(self, h, x):
    return F.relu(self.layer(h), inplace=True)


@block(layer=linear(), bias=parameter(WIDTH))
def added_in_place(self, h, x):
    z = self.layer(h)
    z += self.bias
    z[:, 0] *= 2.0
    return z


# --- Weights that are computed


@block(layer=lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))
def weight_norm(self, h, x):
    return self.layer(h)


@block(layer=lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))
def spectral_norm(self, h, x):
    return self.layer(h)


def _normed_in_the_old_way() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))


@block(layer=_normed_in_the_old_way)
def weight_norm_in_the_old_way(self, h, x):
    return self.layer(h)


@block(layer=linear(), down=parameter(2, WIDTH), up=parameter(WIDTH, 2))
def low_rank_update(self, h, x):
    return F.linear(h, self.layer.weight + self.up @ self.down, self.layer.bias)


@block(weight=parameter(WIDTH, WIDTH), bias=parameter(WIDTH), mask=lambda: (torch.rand(WIDTH, WIDTH) < 0.7).float())
def masked_and_positive(self, h, x):
    return F.linear(h, F.softplus(self.weight) * self.mask / 4, self.bias.exp() - 1)


@block(layer=linear(), down=parameter(2, WIDTH), up=parameter(WIDTH, 2), size=parameter(WIDTH, 1))
def normalised_update(self, h, x):
    return F.linear(h, self.size * F.normalize(self.layer.weight + self.up @ self.down), self.layer.bias)


class Merging(nn.Linear):
    """A low-rank update that is merged into the weight in eval mode, as loralib does."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.down, self.up = parameter(2, WIDTH)(), parameter(WIDTH, 2)()
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return super().train(mode)

    def forward(self, h: Tensor) -> Tensor:
        out = F.linear(h, self.weight, self.bias)
        return out if self.merged else out + h @ self.down.T @ self.up.T


@block(layer=Merging)
def merged_in_eval(self, h, x):
    return self.layer(h)


class Exponential(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.3 * weight.exp()


def _parametrized() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Exponential())
    return layer


@block(layer=_parametrized)
def parametrized(self, h, x):
    return self.layer(h)


@block(weight=parameter(WIDTH, WIDTH), bias=parameter(WIDTH))
def standardised_weight(self, h, x):
    weight = (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True)
    return F.linear(h, weight, self.bias)


@block(layer=linear())
def tied_with_its_transpose(self, h, x):
    return F.linear(torch.tanh(self.layer(h)), self.layer.weight.T)


@block(layer=linear())
def rows_of_a_weight(self, h, x):
    upper, lower = self.layer.weight.chunk(2)
    return torch.cat([F.linear(h, upper), F.linear(h.sin(), lower)], -1) + self.layer.bias


@block(once=True, may_refuse=True, layer=linear(), cached=lambda: None)
def weight_cached_in_eval(self, h, x):
    """Filled at the first call: what it was computed from is cut off, in any later graph."""
    if self.training or self.cached is None:
        self.cached = self.layer.weight / self.layer.weight.norm(dim=1, keepdim=True)
    return F.linear(h, self.cached, self.layer.bias)


# --- What torch.func refuses, or differentiates otherwise


@torch.jit.script
def _swish(z):
    return z * torch.sigmoid(z)


@block(once=True, layer=linear())
def scripted(self, h, x):
    return _swish(self.layer(h))


class _Cube(torch.autograd.Function):
    """In the old style, with a context in forward."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return 3 * z**2 * grad


@block(layer=linear())
def function_in_the_old_style(self, h, x):
    return _Cube.apply(self.layer(h))


@block(layer=linear(WIDTH, 5))
def gradient_inside(self, h, x):
    with torch.enable_grad():
        z = h if h.requires_grad else h.detach().requires_grad_()
        energy = torch.tanh(self.layer(z)).sum()
        return torch.autograd.grad(energy, z, create_graph=True)[0]


@block(layer=linear())
def hook_on_a_gradient(self, h, x):
    z = self.layer(h)
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * 1.0)
    return z.sin()


def _hooked() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_forward_hook(lambda module, args, out: out + args[0] * module.bias)
    return layer


@block(layer=_hooked)
def forward_hook(self, h, x):
    return self.layer(h)


def _wants_gradients() -> nn.Module:
    """As libraries do to fine-tune adapters under checkpointing."""
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return layer


@block(layer=_wants_gradients)
def output_that_requires_gradients(self, h, x):
    return self.layer(h)


@block(scale=parameter(WIDTH))
def vmap_inside(self, h, x):
    return torch.func.vmap(lambda row: torch.sin(row * self.scale))(h)


@block(once=True, layer=linear(WIDTH, 3))
def func_gradient_inside(self, h, x):
    """Which torch does not run inside of a checkpoint."""
    return torch.func.grad(lambda z: torch.tanh(self.layer(z)).sum())(h)


class _Unhashable:
    """A callable that modes see, and cannot look up."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, h: Tensor, weight: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((h, weight)):
            return torch.overrides.handle_torch_function(self, (h, weight), h, weight)
        return h @ weight


@block(weight=parameter(WIDTH, WIDTH), apply=_Unhashable)
def unhashable_callable(self, h, x):
    return self.apply(h, self.weight)


def _phase() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, dtype=torch.complex64), requires_grad=False)


@block(layer=linear(), phase=_phase)
def complex_constant(self, h, x):
    z = torch.view_as_complex(self.layer(h).view(-1, 4, 2))
    return torch.view_as_real(z * self.phase).flatten(1)


@block(layer=linear())
def spectrum(self, h, x):
    return torch.fft.irfft(torch.fft.rfft(self.layer(h)) * (0.5 + 1j), n=WIDTH)


@block(layer=linear(), dropout=lambda: nn.Dropout(0.5))
def dropout(self, h, x):
    return F.dropout(self.dropout(self.layer(h)), training=self.training)


@block(layer=linear(), mixing=lambda: torch.eye(WIDTH).roll(1, 0).to_sparse())
def sparse_buffer(self, h, x):
    return torch.sparse.mm(self.mixing, self.layer(h).T).T


@block(single=True, layer=linear())
def single_precision_inside(self, h, x):
    return torch.sin(self.layer(h).float()).to(h.dtype)


# --- Side effects


@block(layer=linear(), calls=lambda: 0, count=lambda: torch.zeros((), dtype=torch.long))
def counters(self, h, x):
    self.calls += 1
    self.count += 1
    return self.layer(h)


@block(layer=linear(), total=lambda: torch.zeros(()))
def running_total(self, h, x):
    with torch.no_grad():
        self.total += h.detach().mean()
    return self.layer(h)


@block(layer=linear(), log=lambda: [])
def logged_by_numpy(self, h, x):
    z = self.layer(h)
    self.log.append(float(z.detach().cpu().numpy().mean()))
    return z


@block(layer=linear())
def stored_activation(self, h, x):
    self.last = torch.tanh(self.layer(h))
    return self.last


@block(layer=linear(), kept=lambda: {})
def activation_stored_in_a_dictionary(self, h, x):
    self.kept["last"] = self.layer(h)
    return self.kept["last"].sin()


@block(layer=linear(), masks=lambda: {})
def constants_kept_by_dtype(self, h, x):
    if h.dtype not in self.masks:
        self.masks[h.dtype] = torch.linspace(0.5, 1.5, WIDTH, dtype=h.dtype, device=h.device)
    return self.layer(h) * self.masks[h.dtype]
