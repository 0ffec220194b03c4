"""Convolutions and transposed convolutions in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ..terms import ConvolutionTerm, FeatureTerm, MatrixTerm, ParameterView, Term
from ..terms.convolution import unfold
from .registry import Rule, UnsupportedUse, Use, register_rule


def convolution(dims: int) -> Rule:
    """The rule for convolutions over `dims` dimensions."""

    def convolution(
        use: Use,
        input: Tensor,
        weight: ParameterView,
        bias: ParameterView | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Iterable[Term]:
        signals, maps = _signals(use, input, dims)
        if not isinstance(weight, ParameterView):
            return _bias_only(bias, maps)
        spacing, kernel_size = _each(dilation, dims), weight.shape[2:]
        signals, margins = _with_equal_margins(signals, _padding(padding, kernel_size, spacing))
        matrix = _flat(weight.unflatten(0, (groups, -1)), 2)
        term = ConvolutionTerm(
            matrix,
            _grouped(bias, groups),
            signals.unsqueeze(0),
            maps.unsqueeze(0),
            kernel_size,
            _each(stride, dims),
            margins,
            spacing,
        )
        if not term.is_factored:
            return [term]
        # Few positions: their patches are small, and factored Gram matrices want them all the time.
        patches = term.inputs_at(slice(None))[..., : matrix.shape[-1]]
        return [MatrixTerm(matrix, term.bias, patches, term.gradients)]

    return convolution


def transposed_convolution(dims: int) -> Rule:
    """The rule for transposed convolutions over `dims` dimensions.

    They are convolutions with input and output gradient exchanged: each input element multiplies a patch of the output.
    """

    def transposed_convolution(
        use: Use,
        input: Tensor,
        weight: ParameterView,
        bias: ParameterView | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Iterable[Term]:
        signals, maps = _signals(use, input, dims)
        terms = list(_bias_only(bias, maps))
        if isinstance(weight, ParameterView):
            patches = _output_patches(maps, weight.shape[2:], _each(stride, dims), _each(padding, dims),
                                      _each(dilation, dims), signals.shape[3:], groups)  # fmt: skip
            a = signals.flatten(3).unflatten(2, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(1, 2)
            matrix = _flat(weight.unflatten(0, (groups, -1)), 2).permute(0, 2, 1)
            terms.append(MatrixTerm(matrix, None, a.unsqueeze(0), patches.unsqueeze(0)))
        return terms

    return transposed_convolution


def _output_patches(
    maps: Tensor,  # (n, C, S, channels, *size)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_size: Sequence[int],
    groups: int,
) -> Tensor:  # (n, C, T, groups, channels per group · kernel elements)
    """For every element of the input, the part of the output that it reaches."""
    margins: list[int] = []
    for size, k, step, margin, spacing, length in zip(
        maps.shape[4:], kernel_size, stride, padding, dilation, input_size, strict=True
    ):
        end = (length - 1) * step + (k - 1) * spacing + 1  # one more than the last place reached, margin included
        margins = [margin, end - size - margin, *margins]
    dims = len(kernel_size)
    patches = unfold(F.pad(maps.flatten(0, 2), margins), kernel_size, stride, dilation)
    patches = patches.unflatten(1, (groups, -1)).permute(0, *range(3, 3 + dims), 1, 2, *range(3 + dims, 3 + 2 * dims))
    return patches.reshape(*maps.shape[:2], -1, groups, math.prod(patches.shape[2 + dims :]))


def _signals(use: Use, input: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """Inputs (n, S, channels, *size) and gradients (n, C, S, channels, *size): S signals for each point."""
    use.decline_points_not_first()
    if use.ndim != dims + 2:
        raise UnsupportedUse("a convolution without a batch dimension")
    return (input, use.gradients) if use.split else (input.unsqueeze(1), use.gradients.unsqueeze(2))


def _bias_only(bias: ParameterView | None, maps: Tensor) -> Iterable[Term]:
    if not isinstance(bias, ParameterView):
        return []
    return [FeatureTerm([bias], maps.flatten(4).sum((2, 4)).unsqueeze(0))]


def _grouped(bias: ParameterView | None, groups: int) -> ParameterView | None:
    return bias.unflatten(0, (groups, -1)) if isinstance(bias, ParameterView) else None


def _flat(weight: ParameterView, start: int) -> ParameterView:
    try:
        return weight.flatten(start)
    except ValueError as error:
        raise UnsupportedUse(str(error)) from error


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    return tuple(value) * dims if len(value) == 1 else tuple(value)


Margins = list[tuple[int, int]]  # before and after, for each dimension


def _with_equal_margins(signals: Tensor, margins: Margins) -> tuple[Tensor, tuple[int, ...]]:
    """Signals (n, S, channels, *size), with zeros added where there are more on one side, and what is left to add."""
    equal = tuple(min(ends) for ends in margins)
    rest = [end - margin for ends, margin in zip(margins, equal, strict=True) for end in reversed(ends)]
    return F.pad(signals, rest[::-1]) if any(rest) else signals, equal


def _padding(padding: int | str | Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int]) -> Margins:
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [spacing * (k - 1) for k, spacing in zip(kernel_size, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    assert not isinstance(padding, str)
    return [(margin, margin) for margin in _each(padding, len(kernel_size))]


_CONVOLUTIONS: tuple[Callable, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
for _dims, (_function, _transposed) in enumerate(zip(_CONVOLUTIONS, _TRANSPOSED, strict=True), start=1):
    register_rule(_function, convolution(_dims))
    register_rule(_transposed, transposed_convolution(_dims))
