"""Convolutions: the input is kept as it is, and its patches are unfolded only where a product needs them."""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Term, once, split_points
from .features import FeatureTerm
from .matrix import MatrixTerm, join, weigh_outputs
from .view import ParameterView

# A convolution with a group for each point is slower with more points than these, or with more elements of the signals.
_GROUPED_POINTS = 32
_GROUPED_ELEMENTS = 1 << 19


class ConvolutionTerm(MatrixTerm):
    """A matrix multiplied by every patch of the input; products with vectors are convolutions themselves.

    :param weight: The kernels, (groups, channels out per group, channels in per group · kernel elements).
    :param bias: (groups, channels out per group), or None.
    :param inputs: The input without its padding, (B, n, S, channels in, *size): S signals for each point.
    :param gradients: g, (B, n, C, S, channels out, *output size).
    """

    tensors: tuple[str, ...] = ("inputs", "maps")
    of_each_output = ("maps",)

    def __init__(
        self,
        weight: ParameterView,
        bias: ParameterView | None,
        inputs: Tensor,
        gradients: Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ):
        self.weight = weight
        self.bias = bias
        self.inputs = inputs
        self.maps = gradients
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.padding = tuple(padding)
        self.dilation = tuple(dilation)

    def check(self, n: int, outputs: int) -> None:
        heads, d_out, _ = self.weight.shape
        signals = self.inputs.shape[2]
        self._expect(
            maps=(self.maps.shape[1:5], (n, outputs, signals, heads * d_out)),
            inputs=(self.inputs.shape[1:3], (n, signals)),
        )

    @property
    def gradients(self) -> Tensor:  # type: ignore[override]
        """g as a matrix term wants it: (B, n, C, T, H, d_out)."""
        heads = self.weight.shape[0]
        g = self.maps.flatten(5).unflatten(4, (heads, -1))  # (B, n, C, S, H, d_out, T)
        return g.permute(0, 1, 2, 3, 6, 4, 5).flatten(3, 4)

    @property
    def _gradient_elements(self) -> int:
        """The patches, too, are put together for each point."""
        if self._has_quick_gradients:
            return max(super()._gradient_elements, self.inputs[0, 0].numel())
        patches = self.weight.shape[0] * self.num_columns * self.num_positions
        return max(super()._gradient_elements, patches)

    @property
    def num_positions(self) -> int:
        return self.maps.shape[3] * math.prod(self.maps.shape[5:])

    @property
    def _num_outputs(self) -> int:
        return self.maps.shape[2]

    def key(self) -> Hashable:
        return ("convolution", self.views, self.kernel_size, self.stride, self.padding, self.dilation)

    def inputs_at(self, points: slice) -> Tensor:
        return self._unfolded(once(self.inputs)[:, points]).expand(len(self.inputs), -1, -1, -1, -1)

    def _unfolded(self, signals: Tensor) -> Tensor:
        """The patches of signals (B, m, S, channels, *size) with the bias' 1: (B, m, T, H, columns)."""
        batch, m, count, channels = signals.shape[:4]
        heads = self.weight.shape[0]
        patches = self._patches(signals.flatten(0, 2))
        dims = len(self.kernel_size)
        patches = patches.unflatten(1, (heads, channels // heads))
        # (N, H, channels, *out, *kernel) to (N, *out, H, channels, *kernel)
        patches = patches.permute(0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
        columns = self.weight.shape[-1]
        if self.bias is None:
            return patches.reshape(batch, m, -1, heads, columns)
        out = patches.new_empty(batch, m, count * math.prod(patches.shape[1 : 1 + dims]), heads, columns + 1)
        out[..., :columns] = patches.reshape(batch, m, -1, heads, columns)
        out[..., columns:] = 1
        return out

    def _patches(self, signals: Tensor) -> Tensor:
        """Of signals (N, channels, *size): (N, channels, *output size, *kernel size)."""
        margins = [margin for margin in reversed(self.padding) for _ in range(2)]
        padded = F.pad(signals, margins) if any(margins) else signals
        return unfold(padded, self.kernel_size, self.stride, self.dilation)

    def gradient_rows(self, points: slice, heads: slice = slice(None), outputs: slice = slice(None)) -> Tensor:
        if self._has_quick_gradients:
            return self._grouped_gradients(points, heads, outputs)
        # With the positions last, as the signals lie in memory, patches are copied in long runs.
        signals, dims = self.inputs[:, points], len(self.kernel_size)
        patches = self._patches(signals.flatten(0, 2))
        patches = patches.unflatten(1, (self.weight.shape[0], -1))[:, heads]
        patches = patches.permute(0, 1, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))
        h, columns = patches.shape[1], self.weight.shape[-1]
        right = patches.new_empty(len(patches), h, self.num_columns, math.prod(self.maps.shape[5:]))
        right[:, :, columns:] = 1
        right[:, :, :columns].unflatten(2, patches.shape[2 : 3 + dims]).unflatten(-1, self.maps.shape[5:]).copy_(
            patches
        )
        g = self.maps[:, points].flatten(5).unflatten(4, (self.weight.shape[0], -1))[:, :, :, :, heads, outputs]
        batch, m, count, signal_count, _, d_out, _ = g.shape
        left = g.permute(0, 1, 3, 4, 2, 5, 6).reshape(len(patches) * h, count * d_out, -1)
        rows = torch.bmm(left, right.flatten(0, 1).mT)
        rows = rows.reshape(batch, m, signal_count, h, count, d_out, self.num_columns)
        return (rows[:, :, 0] if signal_count == 1 else rows.sum(2)).transpose(2, 3)

    @property
    def _has_quick_gradients(self) -> bool:
        """Whether oneDNN's convolutions serve: they need no patches, and are three times as fast."""
        return (
            self.inputs.dtype == torch.float32 and self.inputs.device.type == "cpu" and self.maps.shape[2:4] == (1, 1)
        )

    def _grouped_gradients(self, points: slice, heads: slice, outputs: slice) -> Tensor:
        """Per-point gradients, for one output and one signal: of a convolution with a group for each point and head."""
        count = self.weight.shape[0]
        # (N, H, channels, *size) each
        signals = self.inputs[:, points, 0].unflatten(2, (count, -1))[:, :, heads].flatten(0, 1)
        maps = self.maps[:, points, 0, 0].unflatten(2, (count, -1))[:, :, heads, outputs].flatten(0, 1)
        size = max(1, min(_GROUPED_POINTS, _GROUPED_ELEMENTS // max(1, signals[0].numel())))
        pieces = [self._grouped(*pair) for pair in zip(signals.split(size), maps.split(size), strict=True)]
        rows = join(pieces, dim=0).flatten(3)  # (N, H, d_out, columns without the bias)
        if self.bias is not None:
            rows = torch.cat([rows, maps.flatten(3).sum(-1, keepdim=True)], dim=-1)
        return rows.unflatten(0, (self.inputs.shape[0], -1)).unsqueeze(2)

    def _grouped(self, signals: Tensor, maps: Tensor) -> Tensor:
        dims, groups = len(self.kernel_size), signals.shape[0] * signals.shape[1]
        flat_signals, flat_maps = (t.reshape(1, -1, *t.shape[3:]) for t in (signals, maps))
        kernels = maps.new_empty(groups * maps.shape[2], signals.shape[2], *self.kernel_size)
        gradient = torch.ops.aten.convolution_backward(
            flat_maps, flat_signals, kernels, None, self.stride, self.padding, self.dilation, False, [0] * dims, groups,
            [False, True, False],
        )[1]  # fmt: skip
        return gradient.unflatten(0, maps.shape[:3])

    def jvp(self, tangents: Tensor) -> Tensor:
        if tangents.shape[0] > 1:
            return super().jvp(tangents)
        batch, n, outputs = self.maps.shape[:3]
        heads, d_out, _ = self.weight.shape
        r = tangents.shape[1]
        kernels = self._kernels(self.weight.read(tangents)[0])
        bias = None if self.bias is None else self.bias.read(tangents)[0].transpose(0, 1).flatten()
        pieces = []
        for points in split_points(n, batch * r * self.maps[0, 0, 0].numel(), tangents.device):
            signals = self.inputs[:, points]
            z = self._convolve(signals.flatten(0, 2), kernels, bias)
            z = z.flatten(2).unflatten(1, (heads, r, d_out))  # (N, H, r, d_out, T)
            z = z.unflatten(0, signals.shape[:3]).permute(0, 1, 4, 2, 3, 5, 6)  # (B, m, r, S, H, d_out, T)
            g = self.maps[:, points].flatten(3)
            if outputs == 1:
                g = g.reshape(*z.shape[:2], *z.shape[3:]).unsqueeze(2)
                pieces.append((z * g).sum((3, 4, 5, 6)).transpose(1, 2).unsqueeze(-1))
            else:
                pieces.append((z.flatten(3) @ g.mT).transpose(1, 2))
        return torch.cat(pieces, dim=2)

    def _convolve(self, signals: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.stride) - 1]
        return convolve(signals, kernels, bias, self.stride, self.padding, self.dilation, self.weight.shape[0])

    def _kernels(self, matrix: Tensor) -> Tensor:
        """(r, H, d_out, columns) to the kernels of one convolution: (H·r·d_out, channels per group, *kernel)."""
        return matrix.transpose(0, 1).reshape(-1, self._channels_per_head, *self.kernel_size)

    @property
    def _channels_per_head(self) -> int:
        return self.inputs.shape[3] // self.weight.shape[0]

    def vjp(self, cotangents: Tensor, out: Tensor) -> None:
        batch, n = self.maps.shape[:2]
        if batch > 1:
            for b in range(batch):
                one = slice(b, b + 1)
                self.map(lambda tensor, one=one: tensor[one]).vjp(cotangents[one], out[one])  # type: ignore[misc]
            return
        heads, d_out, columns = self.weight.shape
        r = cotangents.shape[1]
        weight_total: Tensor | None = None
        bias_total: Tensor | None = None
        shape = self.maps.shape[5:]
        for points in split_points(n, r * self.maps[0, 0, 0].numel(), cotangents.device):
            maps = self.maps[:, points].flatten(5).unflatten(4, (heads, d_out))
            h = weigh_outputs(cotangents[:, :, points], maps)[0]  # (r, m, S, H, d_out, T)
            if self.bias is not None:
                part = h.sum((1, 2, 5))
                bias_total = part if bias_total is None else bias_total + part
            h = h.permute(1, 2, 3, 0, 4, 5).flatten(2, 4).flatten(0, 1).unflatten(-1, shape)
            part = self._kernel_gradient(self.inputs[0, points].flatten(0, 1), h, r)
            weight_total = part if weight_total is None else weight_total + part
        assert weight_total is not None
        matrix = weight_total.reshape(heads, r, d_out, columns).transpose(0, 1)
        self.weight.add_to(out, matrix.unsqueeze(0))
        if self.bias is not None and bias_total is not None:
            self.bias.add_to(out, bias_total.unsqueeze(0))

    def _kernel_gradient(self, signals: Tensor, h: Tensor, r: int) -> Tensor:
        heads, d_out, _ = self.weight.shape
        dims = len(self.kernel_size)
        empty = signals.new_empty(heads * r * d_out, self._channels_per_head, *self.kernel_size)
        return torch.ops.aten.convolution_backward(
            h, signals, empty, None, self.stride, self.padding, self.dilation, False, [0] * dims, heads,
            [False, True, False],
        )[1]  # fmt: skip

    def with_bias(self, bias: ParameterView | None) -> ConvolutionTerm:
        new = copy.copy(self)
        new.bias = bias
        return new

    def bias_term(self) -> FeatureTerm:
        assert self.bias is not None
        return FeatureTerm([self.bias], self.maps.flatten(5).sum((3, 5)))

    def scaled_rows(self, factors: Tensor) -> ConvolutionTerm:
        new = copy.copy(self)
        new.maps = self.maps * factors.reshape(-1, *[1] * len(self.kernel_size))
        return new

    def scaled_columns(self, factors: Tensor) -> ConvolutionTerm | None:
        """Each element of the input is in several columns: they must have one factor."""
        return self.scaled(factors.flatten()[0]) if (factors == factors.flatten()[0]).all() else None

    def row_products(self, matrix: Tensor) -> Tensor:
        kernels = matrix.reshape(-1, self._channels_per_head, *self.kernel_size)
        pieces = []
        batch = self.maps.shape[0]
        for points in split_points(self.maps.shape[1], batch * self.maps[0, 0].numel(), matrix.device):
            signals = self.inputs[:, points]
            z = self._convolve(signals.flatten(0, 2), kernels, None).unflatten(0, signals.shape[:3])
            pieces.append((z.unsqueeze(2) * self.maps[:, points]).flatten(5).sum((3, 5)))
        return torch.cat(pieces, dim=1)

    def factors_of_product(self, left: Tensor, right: Tensor) -> tuple[MatrixTerm, MatrixTerm]:
        """The right one is a convolution's, and the left one multiplies its result."""
        signals = self.inputs
        z = self._convolve(signals.flatten(0, 2), right.reshape(-1, self._channels_per_head, *self.kernel_size), None)
        z = z.unflatten(0, signals.shape[:3]).flatten(4).transpose(-2, -1).flatten(2, 3).unsqueeze(3)
        first = MatrixTerm(self.weight, None, z, self.gradients)
        second = copy.copy(self)
        second.maps = torch.einsum("bncso...,or->bncsr...", self.maps, left)
        return first, second

    def merge(self, others: Sequence[Term]) -> Term | None:  # type: ignore[override]
        """Other uses with signals of the same size are more signals."""
        terms = [self, *(term for term in others if isinstance(term, ConvolutionTerm))]
        if any(term.inputs.shape != self.inputs.shape for term in terms):
            return None
        new = self.map(lambda t: t)
        new.inputs = torch.cat([term.inputs for term in terms], dim=2)
        new.maps = torch.cat([term.maps for term in terms], dim=3)
        return new


def unfold(signals: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The patches of (N, channels, *size): a view (N, channels, *output size, *kernel size)."""
    for dim, (size, step, spacing) in enumerate(zip(kernel_size, stride, dilation, strict=True), start=2):
        signals = signals.unfold(dim, (size - 1) * spacing + 1, step)[..., ::spacing]
    return signals
