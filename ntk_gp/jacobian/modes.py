"""Which ways of differentiating serve a network: each is tried against plain autograd."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from ..network import NetworkFunction, nodes_below
from . import plain, transforms

logger = logging.getLogger("ntk_gp")

# What transforms raise where they do not serve.
TRANSFORM_ERRORS = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError)
# Scripted functions are compiled anew when they have been called a few times, and may have other derivatives then.
_REPETITIONS = 3
# Operators of which forward and reverse mode are derived from one formula, so that they agree everywhere.
_AGREEING = frozenset(
    """
    _adaptive_avg_pool2d _convolution _fft_c2c _fft_c2r _fft_r2c _linalg_check_errors _local_scalar_dense
    _log_softmax _native_batch_norm_legit _native_batch_norm_legit_no_training _reshape_alias _safe_softmax
    _scaled_dot_product_attention_math _softmax _to_copy _trilinear _unsafe_index _unsafe_view
    _weight_norm_interface abs add addbmm addcdiv addcmul addmm addmv addr alias all arange argmax argmin argsort
    as_strided atan avg_pool1d avg_pool2d avg_pool3d baddbmm bernoulli bitwise_and bmm bucketize cat ceil celu chunk
    clamp clamp_max clamp_min clone constant_pad_nd contiguous convolution copy cos cosh cumsum detach detach_
    diag_embed diagonal div dot dropout einsum elu empty empty_like eq erf erfc exp exp2 expand expm1 eye fill
    flatten flip floor floor_divide full full_like gather ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh
    index index_add index_copy index_select is_nonzero isfinite isnan le leaky_relu lerp lgamma lift_fresh
    linalg_vector_norm linear log log10 log1p log2 log_sigmoid_forward log_softmax logical_and logical_not logsumexp
    lt masked_fill matmul mean mish mkldnn_convolution mm mse_loss mul mv nan_to_num narrow native_batch_norm
    native_group_norm native_layer_norm ne neg new_empty new_full new_ones new_zeros nonzero ones ones_like outer
    permute pixel_shuffle pixel_unshuffle positive pow reciprocal reflection_pad1d reflection_pad2d reflection_pad3d
    relu remainder repeat replication_pad1d replication_pad2d replication_pad3d reshape roll round rsqrt rsub
    scalar_tensor select select_scatter sgn sigmoid sign silu sin sinh slice slice_scatter softplus softshrink split
    split_with_sizes sqrt square squeeze stack std sub sum t tan tanh threshold tile trace transpose tril triu trunc
    type_as unbind unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze upsample_bilinear2d
    upsample_nearest2d var var_mean vdot view where zero zeros zeros_like
    """.split()  # noqa: SIM905
)


class Modes:
    """What can be done with a network, each way found out once.

    :ivar transforms: Whether the transforms of `torch.func` serve at all, and agree with plain autograd.
    :ivar forward: Whether forward-mode differentiation works, and agrees with reverse mode.
    :ivar twice: Whether reverse-mode differentiation can be differentiated itself, and agrees.
    :ivar formulas_agree: Whether these two are known to agree at all inputs; if not, it is asked at each.
    :ivar vmap: Whether the per-point rows can be computed for many points at once, and are the same.
    :ivar plain_twice: Whether plain autograd can be differentiated again with respect to the vector.
    :ivar transforms_twice: Whether derivatives by transforms can be differentiated with respect to the inputs, and
        agree with those by plain autograd; tried when inputs first require gradients.
    """

    def __init__(self) -> None:
        self.transforms = self.forward = self.twice = self.formulas_agree = self.vmap = True
        self.plain_twice = self.transforms_twice = True
        self._input_gradients_tried = False
        self._lock = threading.Lock()

    @classmethod
    def tried(cls, function: NetworkFunction, x: Tensor) -> Modes:
        """Tries them at a few points (m, d)."""
        modes = cls()
        with function.tracing(), torch.no_grad(), transforms.quiet_batching_rules():
            reference = plain.rows(function, x)
            rows = reference.reshape(-1, function.num_parameters)
            tangents, cotangents = (_two_vectors(size, x) for size in reversed(rows.shape))
            modes.transforms = all(
                _agrees(lambda: transforms.rows(function, x, together=False, chunk=1), reference)
                for _ in range(_REPETITIONS)
            )
            if not modes.transforms:
                logger.debug("The transforms of torch.func do not serve this network: plain autograd does.")
                modes.forward = modes.twice = modes.vmap = False
                modes.plain_twice = _agrees(lambda: plain.push(function, x, tangents), tangents @ rows.mT)
                return modes

            def pushes(forward_mode: bool, together: int) -> bool:
                push = transforms.pushforward
                return _agrees(
                    lambda: transforms.each(push(function, x, forward_mode), tangents, together), tangents @ rows.mT
                )

            forward = pushes(forward_mode=True, together=1)
            with torch.enable_grad():  # and as it is done for inputs that require gradients
                modes.forward = forward and pushes(forward_mode=True, together=1)
            modes.twice = modes.forward or pushes(forward_mode=False, together=1)
            one = transforms.rows_at_one_point(function, loop=False)
            modes.vmap = (
                _agrees(lambda: vmap(one)(x.unsqueeze(-2)), reference)
                and _agrees(
                    lambda: transforms.each(transforms.pullback(function, x), cotangents, together=2), cotangents @ rows
                )
                and (not modes.twice or pushes(modes.forward, together=2))
            )
            modes.formulas_agree = _agree_everywhere(function, x)
            if modes.forward and not modes.formulas_agree:
                modes.twice = pushes(forward_mode=False, together=1)
        return modes

    def try_input_gradients(self, function: NetworkFunction, x: Tensor) -> None:
        """Finds out, the first time, how derivatives with respect to the inputs x (…, d) can be had.

        :raises NotImplementedError: If they cannot.
        """
        if self._input_gradients_tried:
            return
        with self._lock, torch.enable_grad():
            points = x.detach().reshape(-1, x.shape[-1])[[0, -1]]
            expected = _try(lambda: _input_gradient(function, points, plain.rows))
            if self.transforms:
                found = [
                    _try(lambda: _input_gradient(function, points, _transformed_rows)) for _ in range(_REPETITIONS)
                ]
                known = [gradient for gradient in found if isinstance(gradient, Tensor)]
                self.transforms_twice = len(known) == len(found) and (
                    not isinstance(expected, Tensor) or all(_are_close(gradient, expected) for gradient in known)
                )
            if not isinstance(expected, Tensor) and not (self.transforms and self.transforms_twice):
                raise NotImplementedError(
                    f"The network's Jacobian cannot be differentiated with respect to the inputs: {expected} Take "
                    "differences of predictions instead, or inputs that do not require gradients."
                ) from expected
            self._input_gradients_tried = True


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
    pulled = transforms.pullback(function, x)(v)
    terms, expected = products * v * c[:, None], tangents * pulled * c[:, None]
    scale = torch.maximum(torch.linalg.vector_norm(terms), torch.linalg.vector_norm(expected))
    return bool((terms.sum() - expected.sum()).abs() <= 1e3 * torch.finfo(x.dtype).eps * scale)


def _transformed_rows(function: NetworkFunction, x: Tensor) -> Tensor:
    return transforms.rows(function, x, together=False, chunk=1)


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
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


class _Operators(TorchDispatchMode):
    """Which operators are called, and whether embeddings have rows without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.all_agree = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        padded = name == "embedding" and len(args) > 2 and args[2] >= 0
        self.all_agree = self.all_agree and not padded and (name in _AGREEING or name == "embedding")
        return func(*args, **(kwargs or {}))


def _agree_everywhere(function: NetworkFunction, x: Tensor) -> bool:
    """Whether all that the network is made of has derivatives, of either mode and twice, that agree at any inputs."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in function.parameters.items()}
    try:
        with torch.enable_grad(), _Operators() as operators:
            out = function(leaves, x)
    except Exception:  # a network that does not run under a mode
        return False
    return operators.all_agree and not any(map(_has_derivatives_of_its_own, nodes_below(out)))


def _has_derivatives_of_its_own(node: Any) -> bool:
    """Of Python's custom functions, or a script's."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or "jit::" in node.name()


def _two_vectors(size: int, like: Tensor) -> Tensor:
    """Two vectors, (2, size), that are no multiples of each other."""
    ramp = torch.linspace(-1, 1, size, dtype=like.dtype, device=like.device)
    return torch.stack([ramp, (3 * ramp).cos()])


def _try(compute: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return compute()
    except TRANSFORM_ERRORS as error:  # the transform says that it cannot: another way is taken
        return error


def _agrees(compute: Callable[[], Tensor], expected: Tensor) -> bool:
    actual = _try(compute)
    return isinstance(actual, Tensor) and _are_close(actual, expected)


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e3 * torch.finfo(expected.dtype).eps
    scale = float(expected.abs().max()) * math.sqrt(expected.shape[-1])
    return bool((actual - expected).abs().max() <= tolerance * scale)
