r"""Putting what was recorded to the test, at every capture.

* *At a few rows* (:func:`wrong_derivatives`), spread over the inputs, Jᵀv from the terms is compared with autograd's
  for the network as it is, parameter by parameter. Where the two differ by more than rounding, single calls are looked
  at: at a kink (a unit of a ReLU layer that is all but zero) two passes may go two ways, both of them right.
* *In every row of every use* (:func:`misplaced`), what flows back is compared. Gradients at a use's result come from
  one pass for each output, in which all points take part; that is right only if rows belong to points in the order that
  the layout says, and to one point each. One more pass, with a weight v for each point and output, must give
  :math:`h_i = \sum_c v_{ic} g_{ic}` in each row. Where rows are permuted, routed or mixed, h has another point's v, and
  is off by a factor, not by a little, however small g is. Where autograd's graph tells that rows stay apart
  (:mod:`.rowwise`), there is nothing to find out.

Where a rule has yet to earn trust, :func:`wrong_products` compares Jᵀv over all the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..._compat import norm_of_each
from ...network import NetworkFunction
from ..terms import ParameterView, Term
from .layout import Layout
from .passes import RecordedPasses
from .record import RecordedUse, Recording
from .rowwise import keeps_rows_apart

# Rows at which derivatives are compared with autograd's, at most.
NUM_ROWS = 8

_MISPLACED = "rows at its use are not the points' own, in their order"
_WRONG = "its gradients by the recorded uses differ from autograd's"
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


def _reasons_of(uses: Iterable[RecordedUse], reason: str) -> dict[str, str]:
    """The same reason for every parameter in these uses."""
    return {name: reason for use in uses for name in use.names}


def combination(n: int, outputs: int, like: Tensor) -> Tensor:
    """Weights of either sign, powers of two, (n, C), any two neighbouring points' of different sizes."""
    generator = torch.Generator(device="cpu").manual_seed(n)
    sizes = torch.cat([torch.randperm(_SIZES, generator=generator, device="cpu") for _ in range(-(-n // _SIZES))])[
        :n, None
    ]
    sizes = sizes + torch.randint(0, 2, (n, outputs), generator=generator, device="cpu") * (outputs > 1)
    signs = 2 * torch.randint(0, 2, (n, outputs), generator=generator, device="cpu") - 1
    return torch.ldexp(signs.double(), sizes - _SIZES // 2).to(like)


def misplaced(passes: RecordedPasses) -> dict[str, str]:
    """The parameters in uses in whose results a row is not its point's alone, with the reason.

    Costs one backward pass, or none where the graph says it or all rows are the one point's.
    """
    recording, layouts = passes.recording, passes.layouts
    n, outputs = recording.output.shape
    if n == 1 or not (recording.uses and recording.output.requires_grad) or keeps_rows_apart(recording, layouts):
        return {}
    weights = combination(n, outputs, recording.output)
    differences = recording.combined(weights)
    for i, (_, g, layout) in enumerate(passes.uses()):
        differences[i] = _difference(differences[i], g, weights, layout)
    suspects = _nonzero(differences)
    if not suspects:
        return {}
    scales = [_scale(g, weights, layout) for _, g, layout in passes.uses()]
    eps = torch.finfo(recording.output.dtype).eps if outputs > 1 else 0.0
    noise = _NOISE * eps * torch.stack(scales).square().sum(0).sqrt()
    tolerance = _rounding(recording) ** 0.5
    wrong = []
    for i in suspects:
        if not (_row_norms(differences[i], layouts[i], n) <= tolerance * scales[i] + noise).all():
            wrong.append(recording.uses[i])
    return _reasons_of(wrong, _MISPLACED)


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
    function: NetworkFunction, rows: Tensor, passes: RecordedPasses, names: Collection[str]
) -> tuple[dict[str, str], set[str]]:
    """Those of `names` for which Jᵀv, for a random v, is not what autograd says, and those for which it says zero.

    Costs a forward and a backward pass through the network as it is, nothing replaced in it.
    """
    v = _random(len(rows), function.num_outputs, rows.dtype, rows.device)
    expected = _autograd(function, v, rows)
    actual = _pulled(function, v, passes.terms(names))

    def summed() -> Tensor:
        return _pulled(function, v.square(), passes.terms(names, squared=True))

    wrong = _differing(function, passes.recording, actual, expected, summed)
    silent = {name for name, gradient in function.split(expected).items() if not gradient.any()}
    return {name: _WRONG for name in wrong if name in names}, silent


def wrong_derivatives(
    function: NetworkFunction, x: Tensor, passes: RecordedPasses, terms: Sequence[Sequence[Term]]
) -> dict[str, str]:
    """The parameters whose Jᵀv is not autograd's, for a v that is zero but for a few rows, with the reason.

    :param x: The inputs, (n, d).
    :param terms: Those of every use, (1, n, …).

    Costs a forward and a backward pass at those rows.
    """
    recording = passes.recording
    n, outputs = recording.output.shape
    count = min(n, NUM_ROWS)
    rows = torch.linspace(0, n - 1, count, device=x.device).round_().long()
    v = _random(count, outputs, x.dtype, x.device)
    actual = _pulled(function, v, (term.map(lambda t: t[:, rows]) for part in terms for term in part))

    def summed() -> Tensor:
        names = {name for use in recording.uses for name in use.names}
        return _pulled(function, v.square(), passes.at(rows).terms(names, squared=True))

    if not _differing(function, recording, actual, _autograd(function, v, x[rows]), summed):
        return {}
    few = passes.at(rows)
    try:
        expected = _autograd_by_use(function, v, few)
    except Exception as error:  # whatever goes wrong in a function that is called on its own, there is another way
        reason = f"its use could not be tried on its own ({type(error).__name__}: {error})"
        return _reasons_of(recording.uses, reason)
    return dict.fromkeys(_differing(function, recording, actual, expected, summed), _WRONG)


@lru_cache
def _random(n: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of either sign, no element near zero: (n, C)."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = 1 + torch.rand(n, outputs, generator=generator, dtype=torch.float64, device="cpu")
    return (v * (2 * torch.randint(0, 2, v.shape, generator=generator, device="cpu") - 1)).to(device, dtype)


def _autograd(function: NetworkFunction, v: Tensor, x: Tensor) -> Tensor:
    """Jᵀ v (P,) of v (n, C), for the network as it is."""
    leaves = function.leaves()
    with torch.enable_grad():
        output = function(leaves, x)
    found = torch.autograd.grad(output, list(leaves.values()), v, allow_unused=True)
    parts = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves.values(), found, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def _autograd_by_use(function: NetworkFunction, v: Tensor, passes: RecordedPasses) -> Tensor:
    """Jᵀ v (P,) of v (n, C), each function called once more, given the gradients at its result."""
    parameters = {}
    for (name, tensor), start in zip(function.parameters.items(), accumulate(function.sizes, initial=0), strict=False):
        parameters[name] = (tensor.detach().reshape(-1), start)
    results, leaves, cotangents = [], [], []
    with torch.enable_grad():
        for use, g, layout in passes.uses():
            arguments = dict(use.arguments)
            for name, view in use.arguments.items():
                if isinstance(view, ParameterView):
                    node = use.computed.get(view.name)
                    flat, start = parameters[view.name] if node is None else (node.value.detach().reshape(-1), 0)
                    arguments[name] = view.shift(-start).read(flat).requires_grad_()
                    leaves.append((view, node, arguments[name]))
            results.append(use.rule.call(use.function, arguments))
            cotangents.append(sum(_spread(v[:, c], layout, row) * row for c, row in enumerate(g)))
    found = torch.autograd.grad(results, [leaf for *_, leaf in leaves], cotangents, allow_unused=True)
    out = v.new_zeros(function.num_parameters)
    for (view, node, _), gradient in zip(leaves, found, strict=True):
        if gradient is None:
            continue
        if node is None:
            view.add_to(out, gradient)
        else:
            pulled = v.new_zeros(node.size)
            view.add_to(pulled, gradient)
            node.graph(*node.leaves).pull(pulled[None], out[None])
    return out


def _differing(
    function: NetworkFunction, recording: Recording, actual: Tensor, expected: Tensor, summed: Callable[[], Tensor]
) -> list[str]:
    """The parameters in which two Jᵀv (P,) differ by more than rounding explains: of the result, and of everything that
    was summed for it, in quadrature.

    :param summed: Gives the sums of the squares, (P,).
    """
    names, sizes = list(function.parameters), function.sizes
    rounding = _rounding(recording)
    relative = _ROUNDED if recording.is_rounded else _RELATIVE.get(expected.dtype, rounding**0.5)
    errors = torch.stack(norm_of_each((actual - expected).split(sizes)))
    allowed = relative * torch.stack(norm_of_each(expected.split(sizes)))
    if not (errors <= allowed).all():
        squares = torch.stack([part.sum() for part in summed().split(sizes)])
        allowed += _SUMMED * rounding * squares.nan_to_num(0.0, 0.0, 0.0).sqrt().nan_to_num(0.0)
    return [name for name, is_fine in zip(names, (errors <= allowed).tolist(), strict=True) if not is_fine]


def _pulled(function: NetworkFunction, v: Tensor, terms: Iterable[Term]) -> Tensor:
    """Jᵀ v (P,) of v (n, C)."""
    out = v.new_zeros(1, 1, function.num_parameters)
    for term in terms:
        term.vjp(v[None, None], out)
    return out[0, 0]
