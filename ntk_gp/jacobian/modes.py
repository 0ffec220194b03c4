"""Which ways of differentiating serve a network: each is tried against plain autograd."""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._compat import innermost_transform, saved_padding_idx
from ..network import NetworkFunction, nodes_below
from . import plain, transforms

logger = logging.getLogger("ntk_gp")

# What transforms raise where they do not serve.
TRANSFORM_ERRORS = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError)
# Scripted functions are compiled anew when they have been called a few times, and may have other derivatives then.
_CALLS = 3
# Rows that are taken one by one before what vmap needs is imported.
_MANY = 4096
# Nodes of autograd's graph for operators whose derivatives, in forward mode and twice, agree at any inputs.
_AGREEING = frozenset(
    """
    Abs AccumulateGrad AdaptiveAvgPool2D Add Addbmm Addcdiv Addcmul Addmm Addmv Addr Alias AsStrided Atan AvgPool2D
    AvgPool3D Baddbmm Bmm Cat Celu Clamp ClampMax ClampMin Clone ConstantPadNd Convolution Copy CopySlices Cos Cosh
    Cumsum Diagonal DiagonalScatter Div Dot Elu Erf Erfc Exp Exp2 Expand Expm1 FftC2C FftC2R FftR2C Fill Flip Gather
    Gelu Glu Hardshrink Hardsigmoid Hardswish Hardtanh Index IndexAdd IndexCopy IndexPut IndexSelect LeakyRelu Lerp
    LinalgInvEx LinalgMatrixExp Linear Log Log10 Log1P Log2 LogSigmoid LogSoftmax Logsumexp MaskedFill MaskedScatter
    MaskedSelect Mean Mish Mm MseLoss Mul Mv NativeBatchNorm NativeGroupNorm NativeLayerNorm Neg Permute
    PixelShuffle PixelUnshuffle Pow Reciprocal ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat
    ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias Roll Rsqrt Rsub SafeSoftmax Scatter ScatterAdd
    Select SelectScatter Sgn Sigmoid Sign Silu Sin Sinh Slice SliceScatter Softmax Softplus Softshrink Split
    SplitWithSizes Sqrt Squeeze Stack Sub Sum T Tan Tanh Threshold ToCopy Trace Transpose Tril Trilinear Triu Unbind
    Unfold UnsafeIndex UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D
    UpsampleNearest1D UpsampleNearest2D UpsampleTrilinear3D Vdot View WeightNormInterface Where
    """.split()  # noqa: SIM905
)
_ONCE = "torch::autograd::Error"  # leads nowhere: to `torch.autograd.grad`, what is before it does not depend on x
_NO_PADDING = 1 << 62  # what an embedding without padding has for its place is larger


class _Trial:
    """A network at a few points (m, d), and the rows of its Jacobian there by plain autograd."""

    def __init__(self, function: NetworkFunction, x: Tensor):
        self.function = function
        self.x = x
        with function.tracing(), torch.no_grad():
            self.reference = plain.rows(function, x)
        self.rows = self.reference.reshape(-1, function.num_parameters)
        self.tangents, self.cotangents = (_two_vectors(size, x) for size in reversed(self.rows.shape))

    def pushes_forward(self, recorded: bool = False, together: int = 1) -> bool:
        def push() -> Tensor:
            with torch.set_grad_enabled(recorded):
                return transforms.each(transforms.pushforward(self.function, self.x), self.tangents, together)

        return self._agrees(push, self.tangents @ self.rows.mT)

    def pushes_twice(self) -> bool:
        return self._agrees(lambda: plain.push(self.function, self.x, self.tangents), self.tangents @ self.rows.mT)

    def serves_vmap(self, forward: bool) -> bool:
        """Whether rows and vectors can be computed several at once, and are the same."""

        def rows() -> Tensor:
            return transforms.rows(self.function, self.x, together=True, chunk=len(self.x))

        def pull() -> Tensor:
            return transforms.each(transforms.pullback(self.function, self.x), self.cotangents, together=2)

        return (
            all(self._agrees(rows, self.reference) for _ in range(_CALLS))
            and self._agrees(pull, self.cotangents @ self.rows)
            and (not forward or self.pushes_forward(together=2))
        )

    def formulas_agree(self) -> bool:
        with self.function.tracing(), torch.no_grad():
            return _agree_everywhere(self.function, self.x)

    def _agrees(self, compute: Callable[[], Tensor], expected: Tensor) -> bool:
        with self.function.tracing(), torch.no_grad(), transforms.quiet_batching_rules():
            return _is_close(_try(compute), expected)


class Modes:
    """What can be done with a network, tried at a few points when it is first asked for.

    :param function: The network function.
    :param x: The points, (m, d).

    :ivar forward: Whether forward-mode differentiation works, and agrees with reverse mode.
    :ivar twice: Whether reverse-mode differentiation can be differentiated itself, and agrees.
    :ivar formulas_agree: Whether these two are known to agree at all inputs; if not, it is asked at each.
    """

    def __init__(self, function: NetworkFunction | None = None, x: Tensor | None = None) -> None:
        self._points = None if function is None or x is None else (function, x)
        self._products_tried = self._points is None
        self._forward = self._twice = self._formulas_agree = True
        self._vmap: bool | None = None
        self._one_by_one = 0
        self._differentiated: set[bool] = set()
        self._lock = threading.RLock()

    def try_products(self) -> None:
        """Finds out what serves J u, unless that is known, or this is inside a transform, where it cannot be told."""
        with self._lock:
            if self._products_tried or is_transformed() or self._points is None:
                return
            trial = _Trial(*self._points)  # made anew when it is wanted: rows take memory
            # Also as it is done for inputs that require gradients.
            self._forward = trial.pushes_forward() and trial.pushes_forward(recorded=True)
            self._formulas_agree = trial.formulas_agree()
            self._twice = (self._forward and self._formulas_agree) or trial.pushes_twice()
            self._products_tried = True

    @property
    def forward(self) -> bool:
        self.try_products()
        return self._forward

    @property
    def twice(self) -> bool:
        self.try_products()
        return self._twice

    @property
    def formulas_agree(self) -> bool:
        self.try_products()
        return self._formulas_agree

    def give_up(self, way: str) -> None:
        """A way, "forward" or "twice", that has been wrong, or has raised, is not taken again."""
        setattr(self, f"_{way}", False)

    def together(self, count: int) -> bool:
        """Whether vmap serves so many rows, or vectors, and is worth it.

        Transforms import for seconds the first time that they are used: few are rather taken one by one, until these
        have been many.
        """
        if self._vmap is None:
            self._one_by_one += count
            if self._one_by_one > _MANY or "torch._dynamo" in sys.modules:
                with self._lock:
                    if self._vmap is None and self._points is not None:
                        self._vmap = _Trial(*self._points).serves_vmap(self.forward)
        return bool(self._vmap)

    def try_input_gradients(self, function: NetworkFunction, x: Tensor, of_products: bool) -> None:
        """Finds out, the first time, how derivatives with respect to the inputs x (…, d) can be had.

        :param of_products: Of J u, and not of rows or of Jᵀ v.
        :raises NotImplementedError: If they cannot.
        """
        function.check_input_gradients(x)
        if of_products in self._differentiated or is_transformed():
            return
        with self._lock, torch.enable_grad():
            points = x.detach().reshape(-1, x.shape[-1])[[0, -1]]
            expected = _try(lambda: _input_gradient(function, points, plain.rows))
            if not isinstance(expected, Tensor):
                raise NotImplementedError(
                    f"The network's Jacobian cannot be differentiated with respect to the inputs: {expected} Take "
                    "differences of predictions instead, or inputs that do not require gradients."
                ) from expected
            if of_products and (self.forward or self.twice):
                products = _try(lambda: _input_gradient(function, points, _pushed_plainly))
                if self._forward:
                    self._forward = self._repeats(products, lambda: _input_gradient(function, points, _pushed))
                if self._twice and not (self._forward and self._formulas_agree):  # otherwise it is not asked for
                    self._twice = self._repeats(products, lambda: _input_gradient(function, points, _pushed_twice))
            if self.together(len(x)):
                self._vmap = self._repeats(expected, lambda: _input_gradient(function, points, _rows_together))
            self._differentiated.add(of_products)

    @staticmethod
    def _repeats(expected: Tensor | Exception, compute: Callable[[], Tensor]) -> bool:
        """Whether it is the same at each of a few calls: once they are compiled, scripted functions have other second
        derivatives under transforms."""
        found = [_try(compute) for _ in range(_CALLS)]
        return isinstance(expected, Tensor) and all(_is_close(value, expected) for value in found)


def is_transformed() -> bool:
    """Whether the caller is inside a transform of `torch.func`, where plain autograd has no say."""
    return innermost_transform() is not None


def agree_at_random(function: NetworkFunction, x: Tensor, tangents: Tensor, products: Tensor) -> bool:
    """Whether J u, as found in forward mode, is finite and the transpose of Jᵀ v for a random v; costs Jᵀ v.

    :param tangents: u, (r, P).
    :param products: J u, (r, m·C).
    """
    generator = torch.Generator(device="cpu").manual_seed(len(x))
    v, c = (
        torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(x)  # signs cancel at equal rows
        for size in (products.shape[-1], len(products))
    )
    pulled = plain.pull(function, x.detach(), v.unsqueeze(0))[0]
    terms, expected = products * v * c[:, None], tangents * pulled * c[:, None]
    scale = torch.maximum(torch.linalg.vector_norm(terms), torch.linalg.vector_norm(expected))
    return bool((terms.sum() - expected.sum()).abs() <= 1e3 * torch.finfo(x.dtype).eps * scale)


def _rows_together(function: NetworkFunction, x: Tensor) -> Tensor:
    return transforms.rows(function, x, together=True, chunk=len(x))


def _pushed(function: NetworkFunction, x: Tensor) -> Tensor:
    return transforms.each(transforms.pushforward(function, x), _two_vectors(function.num_parameters, x), together=1)


def _pushed_twice(function: NetworkFunction, x: Tensor) -> Tensor:
    return plain.push(function, x, _two_vectors(function.num_parameters, x))


def _pushed_plainly(function: NetworkFunction, x: Tensor) -> Tensor:
    rows = plain.rows(function, x).reshape(-1, function.num_parameters)
    return _two_vectors(function.num_parameters, x) @ rows.mT


def _input_gradient(
    function: NetworkFunction, points: Tensor, rows: Callable[[NetworkFunction, Tensor], Tensor]
) -> Tensor:
    """Of a weighted sum of the squared elements of J."""
    x = points.clone().requires_grad_()
    with function.tracing(input_gradients=True):
        squares = rows(function, x).square()
    weights = torch.linspace(1.0, 2.0, squares.shape[-1], dtype=x.dtype, device=x.device)
    total = (squares * weights).sum()
    if not total.requires_grad:
        return torch.zeros_like(x)
    if any(node.name() == _ONCE for node in nodes_below(total)):
        raise NotImplementedError("A part of it is marked with once_differentiable.")
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _agree_everywhere(function: NetworkFunction, x: Tensor) -> bool:
    """Whether all that the network is made of has derivatives, in forward mode and twice, that agree at any inputs."""
    leaves = function.leaves()
    with torch.enable_grad():
        return all(map(_has_agreeing_derivatives, nodes_below(function(leaves, x))))


def _has_agreeing_derivatives(node: Any) -> bool:
    """Not of Python's custom functions, or a script's."""
    name = re.sub(r"Backward\d*$", "", node.name().removeprefix("torch::autograd::"))
    if name == "Embedding":  # forward mode gives the padding a derivative
        return saved_padding_idx(node) >= _NO_PADDING
    return name in _AGREEING and not isinstance(node, torch.autograd.function.BackwardCFunction)


def _two_vectors(size: int, like: Tensor) -> Tensor:
    """Two vectors, (2, size), that are no multiples of each other."""
    ramp = torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
    return torch.stack([ramp, (3 * ramp).cos()])


def _try(compute: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return compute()
    except TRANSFORM_ERRORS as error:  # the transform says that it cannot: another way is taken
        return error


def _is_close(actual: Tensor | Exception, expected: Tensor) -> bool:
    return isinstance(actual, Tensor) and _are_close(actual, expected)


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    scale = float(expected.abs().max()) * math.sqrt(expected.shape[-1])
    return bool((actual - expected).abs().max() <= tolerance * scale)
