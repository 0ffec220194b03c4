r"""Putting what was recorded to the test.

Two tests, for two things that can be wrong:

* *Which row is whose* (:func:`misplaced`), at every use, at every capture. Gradients at a use's result come from one
  pass for each output, in which all points take part; that is right only if rows belong to points in the order that the
  layout says, and to one point each. One more pass, with a weight v for each point and output, must give
  :math:`h_i = \sum_c v_{ic} g_{ic}` in each row. Where rows are permuted, routed or mixed, h has another point's v, and
  is off by a factor, not by a little, however small g is.
* *What a rule says* (:func:`wrong_products`): Jᵀv from the terms against autograd's, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ...network import NetworkFunction
from ..rules import UnsupportedUse
from ..terms import Term
from .capture import Layout, RecordedUse, Recording, use_terms

# Weights are powers of two of so many sizes: with them, a backward pass is scaled without rounding.
_SIZES = 16
# Of Jᵀv, relative to its own size: rounding, amplified by a network's depth.
_RELATIVE = {torch.float64: 1e-10, torch.float32: 2e-5}
# The same where a part of the network is computed in another dtype.
_ROUNDED = 2e-5
# In units of rounding, of the sizes of all that is summed: what is zero in theory need not be zero.
_SUMMED = 100.0
# Rows of gradients so much smaller than all the gradients at that point together, in units of rounding, are noise where
# there are several outputs: their sum is rounded. With one output there is nothing to round.
_NOISE = 16.0


def combination(n: int, outputs: int, like: Tensor) -> Tensor:
    """Weights of either sign, powers of two, (n, C), any two neighbouring points' of different sizes."""
    generator = torch.Generator(device="cpu").manual_seed(n)
    sizes = torch.cat([torch.randperm(_SIZES, generator=generator, device="cpu") for _ in range(-(-n // _SIZES))])[
        :n, None
    ]
    sizes = sizes + torch.randint(0, 2, (n, outputs), generator=generator, device="cpu") * (outputs > 1)
    signs = 2 * torch.randint(0, 2, (n, outputs), generator=generator, device="cpu") - 1
    return torch.ldexp(signs.double(), sizes - _SIZES // 2).to(like)


def misplaced(recording: Recording, gradients: Sequence[Tensor], layouts: Sequence[Layout]) -> list[RecordedUse]:
    """The uses in whose results a row is not its point's alone. Costs one backward pass."""
    n, outputs = recording.output.shape
    if n == 1 or not (recording.uses and recording.output.requires_grad):  # all rows are the one point's
        return []
    weights = combination(n, outputs, recording.output)
    differences = recording.combined(weights)
    for i, (g, layout) in enumerate(zip(gradients, layouts, strict=True)):
        differences[i] = _difference(differences[i], g, weights, layout)
    suspects = _nonzero(differences)
    if not suspects:
        return []
    scales = [_scale(g, weights, layout) for g, layout in zip(gradients, layouts, strict=True)]
    eps = torch.finfo(recording.output.dtype).eps if outputs > 1 else 0.0
    noise = _NOISE * eps * torch.stack(scales).square().sum(0).sqrt()
    tolerance = _rounding(recording) ** 0.5
    wrong = []
    for i in suspects:
        if not (_row_norms(differences[i], layouts[i], n) <= tolerance * scales[i] + noise).all():
            wrong.append(recording.uses[i])
    return wrong


def _rounding(recording: Recording) -> float:
    single = torch.finfo(torch.float32).eps
    return single if recording.is_rounded else torch.finfo(recording.output.dtype).eps


def _difference(combined: Tensor, gradients: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """h − Σ_c v_c g_c at one use, (*shape)."""
    for c, g in enumerate(gradients):
        factor = _spread(weights[:, c], layout, combined)
        combined = torch.addcmul(combined, factor, g, value=-1) if c == 0 else combined.addcmul_(factor, g, value=-1)
    return combined


def _spread(values: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """One number for each point (n,) along the points of a use's result."""
    assert layout.result.place is not None
    dim, split = layout.result.place
    if split:
        values = values.repeat_interleave(like.shape[dim] // len(values))
    return values.view(-1, *[1] * (like.dim() - dim - 1))


def _nonzero(tensors: Sequence[Tensor]) -> list[int]:
    """Which of them have anything but zeros in them, NaN included; without an intermediate result."""
    filled = [i for i, tensor in enumerate(tensors) if tensor.numel()]
    extremes = [torch.stack(torch.aminmax(tensors[i])) for i in filled]
    found = torch.stack(extremes).ne(0).any(1).tolist() if extremes else []
    return [i for i, nonzero in zip(filled, found, strict=True) if nonzero]


def _row_norms(values: Tensor, layout: Layout, n: int) -> Tensor:
    """Of each point's part, (n,)."""
    assert layout.result.place is not None
    dim, _ = layout.result.place
    others = [d for d in range(values.dim()) if d != dim]
    norms = torch.linalg.vector_norm(values, dim=others) if others else values.abs()
    return torch.linalg.vector_norm(norms.view(n, -1), dim=1)


def _scale(gradients: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """The size of what is summed in each row, (n,)."""
    norms = torch.stack([_row_norms(g, layout, len(weights)) for g in gradients], dim=1)
    return torch.linalg.vector_norm(weights * norms, dim=1)


def wrong_products(
    function: NetworkFunction,
    rows: Tensor,
    recording: Recording,
    gradients: Sequence[Tensor],
    layouts: Sequence[Layout],
    names: Collection[str],
) -> tuple[dict[str, str], set[str]]:
    """Those of `names` for which Jᵀv, for a random v, is not what autograd says, and those for which it says zero.

    Costs a forward and a backward pass through the network as it is, nothing replaced in it. The difference allowed is
    what rounding explains: of the result, and of everything that was summed for it, in quadrature.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = 1 + torch.rand(len(rows), function.num_outputs, generator=generator, dtype=torch.float64, device="cpu")
    v = (v * (2 * torch.randint(0, 2, v.shape, generator=generator, device="cpu") - 1)).to(rows)
    leaves = function.leaves()
    with torch.enable_grad():
        output = function(leaves, rows)
    expected = torch.autograd.grad(output, list(leaves.values()), v, allow_unused=True)
    actual = _pulled(function, v, collect(recording, gradients, layouts, names))
    squares = _pulled(function, v.square(), collect(recording, gradients, layouts, names, squared=True))
    rounding = _rounding(recording)
    relative = _ROUNDED if recording.is_rounded else _RELATIVE.get(rows.dtype, rounding**0.5)
    wrong: dict[str, str] = {}
    silent: set[str] = set()
    for (name, leaf), reference in zip(leaves.items(), expected, strict=True):
        reference = torch.zeros_like(leaf) if reference is None else reference
        error, size = torch.linalg.vector_norm(actual[name] - reference), torch.linalg.vector_norm(reference)
        summed = squares[name].sum().nan_to_num(0.0, 0.0, 0.0).sqrt().nan_to_num(0.0)
        if name in names and not error <= relative * size + _SUMMED * rounding * summed:
            wrong[name] = "its gradients by the recorded uses differ from autograd's"
        elif size == 0:
            silent.add(name)
    return wrong, silent


def collect(
    recording: Recording,
    gradients: Sequence[Tensor],
    layouts: Sequence[Layout],
    names: Collection[str],
    squared: bool = False,
) -> Iterator[Term]:
    """The terms of all uses of some parameters; if `squared`, of squares, where that can be told."""
    n = len(recording.output)
    for use, g, layout in zip(recording.uses, gradients, layouts, strict=True):
        if not any(view.name in names for view in use.parameters):
            continue
        try:
            yield from use_terms(use, g, n, layout, squared)
        except UnsupportedUse:
            if not squared:
                raise


def _pulled(function: NetworkFunction, v: Tensor, terms: Iterator[Term]) -> dict[str, Tensor]:
    """Jᵀ v of v (n, C), by parameter."""
    out = v.new_zeros(1, 1, function.num_parameters)
    for term in terms:
        term.vjp(v[None, None], out)
    return function.split(out[0, 0])
