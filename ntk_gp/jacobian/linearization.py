"""What operators carry by reference: the engine that serves each request, and what has been computed already."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from .. import settings
from ..network import FrozenNetwork, full_precision, normal_tensor
from . import rules
from .autodiff import AutodiffEngine
from .base import Jacobian, JacobianEngine
from .memory import empty
from .products import JacobianProduct, TransposedJacobianProduct
from .structured import StructuredEngine

# A Gram matrix of so many entries, at so few flops for each, is not copied for the sake of a second time that may never
# come.
_LARGE = 1 << 24
_COPY = 1000.0

# The engine where none is named, read whenever one is made. The test suite sets it, to run as a whole with either.
default_engine = "structured"


def _in_full_precision(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a method whose first argument is a Jacobian: the user's autocast does not reach in."""

    @functools.wraps(method)
    def wrapped(self: Linearization, jacobian: Jacobian, *args: Any, **kwargs: Any) -> Tensor:
        with full_precision(jacobian.x.device):
            return method(self, jacobian, *args, **kwargs)

    return wrapped


class Linearization:
    """A frozen network with its engines and its caches. Not an `nn.Module`, and nothing that `.to()` could convert.

    Jacobians and Gram matrices are kept for the inputs seen last, up to a quarter of the memory budget. A kept result
    is used only where the inputs are equal element by element, in the same dtype, on the same device, and no tensor of
    the network has changed since.

    :param network: The frozen network.
    :param engine: `"structured"`, for matrix products from the recorded uses of each parameter, with autodiff for what
        no rule covers; `"autodiff"`, for `torch.func` throughout; or `"auto"`, which is the first. Inputs that require
        gradients are always served by autodiff.
    """

    def __init__(self, network: FrozenNetwork, engine: str | None = None):
        engine = default_engine if engine in (None, "auto") else engine
        if engine not in ("structured", "autodiff"):
            raise ValueError(f"engine must be 'auto', 'structured' or 'autodiff', got {engine!r}.")
        self.network = network
        self.autodiff = AutodiffEngine(network)
        self.engine: JacobianEngine = self.autodiff
        if engine != "autodiff":
            self.engine = StructuredEngine(network, self.autodiff)
        self.clear()

    def clear(self) -> None:
        """Drops everything that was kept."""
        self._cache = _Cache()
        self._solvers: WeakSet = WeakSet()  # that are in use somewhere, to start others from
        self._pairs: WeakKeyDictionary[Jacobian, WeakKeyDictionary[Jacobian, _Pair]] = WeakKeyDictionary()
        self._lock = threading.Lock()  # of these two

    def add_solver(self, solver: Any) -> None:
        """Others may start from this one while it is in use."""
        with self._lock:
            self._solvers.add(solver)

    @property
    def solvers(self) -> list:
        """The solvers in use."""
        with self._lock:
            return list(self._solvers)

    def keep(self, kind: str, tensors: tuple[Tensor, ...], compute: Callable[..., Any]) -> Any:
        """The result of `compute` for tensors with these contents, from the last time or computed now.

        :param kind: Tells results of different kinds for the same tensors apart.
        :param tensors: What the result depends on, beside the network.
        :param compute: Called with copies of the tensors; its result says in `nbytes` what it holds.
        """
        return self._cache.get(kind, self._state, tensors, compute)

    def jacobian(self, x: Tensor, keep: bool = True) -> Jacobian:
        """J(x) at x (B, n, d): differentiable where x requires a gradient, otherwise kept for the next time."""
        if torch.is_grad_enabled() and x.requires_grad:
            return self.autodiff.linearize(x)
        x = normal_tensor(x.detach())
        if not keep:
            return self.engine.linearize(x)
        return self._cache.get("jacobian", self._state, (x,), self.engine.linearize)

    @_in_full_precision
    def gram(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor, keep: bool = True) -> Tensor:
        """J₁ Σ_w J₂ᵀ, (B or W, N₁, N₂), differentiable with respect to the variances (W, G) and the inputs."""
        if jacobian1.x.requires_grad:
            return jacobian1.gram(jacobian2, variances)
        if jacobian2.x.requires_grad:
            return jacobian2.gram(jacobian1, variances).mT
        if keep and self.keeps_gram(jacobian1, jacobian2) and self._pays_to_keep(jacobian1, jacobian2):
            gram = self._kept_gram(jacobian1, jacobian2)
            if self.network.num_groups > 1:
                return torch.einsum("wg,gnm->wnm", variances, gram)
            if variances.requires_grad or len(variances) > 1:
                return gram * variances.unsqueeze(-1)
            return torch.mul(gram, variances.unsqueeze(-1), out=empty(gram.shape, like=gram))
        return _Gram.apply(variances, jacobian1, jacobian2)

    @_in_full_precision
    def diagonal(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor) -> Tensor:
        """The diagonal of J₁ Σ_w J₂ᵀ, (B or W, N), differentiable with respect to the variances."""
        total: Tensor | None = None
        for group in range(variances.shape[1]):
            one = _one_hot(variances, group)
            if jacobian1 is jacobian2:
                part = variances[:, group, None] * jacobian1.diagonal(one)
            else:
                part = variances[:, group, None] * jacobian1.cross_diagonal(jacobian2, one)
            total = part if total is None else total + part
        assert total is not None
        return total

    @_in_full_precision
    def kernel_matmul(self, jacobian1: Jacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        """(J₁ Σ_w J₂ᵀ) rhs for rhs (B or 1, N₂, r): by the engine, or by the stored Gram matrix once that has paid.

        The matrix is stored when the columns multiplied so far have cost as much as forming it would (so never more
        than twice the cheaper way), and only if it fits in the cache.
        """
        if jacobian1.x.requires_grad or jacobian2.x.requires_grad:
            return self._differentiable_matmul(jacobian1, jacobian2, rhs, variances)
        if not self.keeps_gram(jacobian1, jacobian2):
            return jacobian1.kernel_matmul(jacobian2, rhs, variances)
        pair = self._pair(jacobian1, jacobian2)
        pair.flops += rhs.shape[-1] * jacobian1.product_cost(jacobian2)
        if pair.flops < jacobian1.gram_cost(jacobian2):
            return jacobian1.kernel_matmul(jacobian2, rhs, variances)
        pair.is_formed_again = True
        return self.gram(jacobian1, jacobian2, variances) @ rhs

    @staticmethod
    def _differentiable_matmul(jacobian1: Jacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        if jacobian2.x.requires_grad:
            sums = jacobian2.vjp(rhs.mT)
        else:
            sums = TransposedJacobianProduct.apply(rhs.mT, jacobian2)
        tangents = sums * jacobian1.function.expand_variances(variances).unsqueeze(-2)
        if jacobian1.x.requires_grad:
            return jacobian1.jvp(tangents).mT
        return JacobianProduct.apply(tangents, jacobian1).mT

    def _pair(self, jacobian1: Jacobian, jacobian2: Jacobian) -> _Pair:
        """What is known of these two; found without looking at the inputs, as the iterations of a solve need it."""
        with self._lock:
            partners = self._pairs.setdefault(jacobian1, WeakKeyDictionary())
            return partners.setdefault(jacobian2, _Pair())

    def keeps_gram(self, jacobian1: Jacobian, jacobian2: Jacobian) -> bool:
        """Whether the Gram matrix of these inputs (one for each group of parameters) may be stored."""
        groups = self.network.num_groups
        batch = max(jacobian1.x.shape[0], jacobian2.x.shape[0])
        size = groups * batch * jacobian1.num_rows * jacobian2.num_rows * jacobian1.x.element_size()
        return (groups == 1 or batch == 1) and size <= _Cache.capacity(jacobian1.x.device)

    def _pays_to_keep(self, jacobian1: Jacobian, jacobian2: Jacobian) -> bool:
        """Whether it is cheaper to store the Gram matrix and to copy it than to form it here.

        A large one of a small network costs little more than its memory: it is stored when it is asked for again.
        """
        pair = self._pair(jacobian1, jacobian2)
        entries = jacobian1.num_rows * jacobian2.num_rows
        again, pair.is_formed_again = pair.is_formed_again, True
        return again or entries < _LARGE or jacobian1.gram_cost(jacobian2) > _COPY * entries

    def _kept_gram(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        def compute(*_: Tensor) -> Tensor:
            eye = torch.eye(self.network.num_groups, dtype=jacobian1.x.dtype, device=jacobian1.x.device)
            with torch.no_grad():
                return jacobian1.gram(jacobian2, eye)

        pair = self._pair(jacobian1, jacobian2)
        gram = None if pair.gram is None else pair.gram()
        if gram is None:
            gram = self._cache.get("gram", self._state, (jacobian1.x, jacobian2.x), compute)
            pair.gram = weakref.ref(gram)
        return gram

    def _state(self) -> Hashable:
        return (self.network.fingerprint(), type(self.engine), rules.version())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None, "_pairs": None, "_solvers": None, "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.clear()

    def __deepcopy__(self, memo: dict) -> Linearization:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.clear()
        new.network = copy.deepcopy(self.network, memo)
        new.autodiff = copy.deepcopy(self.autodiff, memo)
        new.engine = copy.deepcopy(self.engine, memo)
        # Entries and solvers say which state of the network they belong to.
        new._cache, new._solvers, new._lock = self._cache, self._solvers, self._lock
        return new


def _one_hot(variances: Tensor, group: int) -> Tensor:
    """(1, G): variance one for this group and zero for the others."""
    one = torch.zeros_like(variances[:1], requires_grad=False)
    one[0, group] = 1.0
    return one


class _Pair:
    """What products of two Jacobians have cost so far, in flops, and their Gram matrix while the cache holds it."""

    flops = 0.0
    gram: weakref.ref[Tensor] | None = None
    is_formed_again = False  # when it is asked for next


class _Cache:
    """Results keyed by the *contents* of tensors, the least recently used dropped first.

    Keys are compared with copies, so a tensor changed in place, or new memory at an old address, never meets a stale
    result. Safe to use from several threads: what one of them computes, the others wait for.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []  # the least recently used first
        self._lock = threading.Lock()  # never held while something is computed

    @staticmethod
    def capacity(device: torch.device) -> int:
        """Bytes that may be kept."""
        return settings.memory_budget.bytes(device) // 4

    def get(
        self, kind: str, state: Callable[[], Hashable], tensors: tuple[Tensor, ...], compute: Callable[..., Any]
    ) -> Any:
        """The kept result for these tensors, or `compute` of copies of them."""
        label = (kind, state())
        while True:
            with self._lock:
                entry = next((known for known in reversed(self._entries) if known.is_for(label, tensors)), None)
                mine = entry is None
                if entry is None:
                    entry = _Entry(label, tensors)
                else:
                    self._entries.remove(entry)
                self._entries.append(entry)
            if mine:
                return self._fill(entry, compute)
            entry.done.wait()
            if not entry.failed:
                return entry.value

    def _fill(self, entry: _Entry, compute: Callable[..., Any]) -> Any:
        try:
            value = entry.value = compute(*entry.keys)
        except BaseException:
            entry.failed = True  # whoever waits tries for itself
            with self._lock:
                self._entries.remove(entry)
            raise
        finally:
            entry.done.set()
        self._make_room(entry)
        return value

    def _make_room(self, newest: _Entry) -> None:
        capacity = self.capacity(newest.keys[0].device)
        with self._lock:
            if newest in self._entries:  # what it was made from is less recent than itself
                self._entries.remove(newest)
                if newest.nbytes <= capacity:
                    self._entries.append(newest)
            while sum(entry.nbytes for entry in self._entries) > capacity:
                self._entries.remove(next(entry for entry in self._entries if entry.done.is_set()))


class _Entry:
    """A result, or the promise of one, for tensors with these contents."""

    value: Any = None
    failed = False

    def __init__(self, label: Hashable, tensors: tuple[Tensor, ...]):
        self.label = label
        self.keys = tuple(tensor.clone() for tensor in tensors)
        self.done = threading.Event()

    def is_for(self, label: Hashable, tensors: tuple[Tensor, ...]) -> bool:
        return self.label == label and all(map(_same, self.keys, tensors))

    @property
    def nbytes(self) -> int:
        """Once it is done."""
        if not self.done.is_set():
            return 0
        return sum(key.nbytes for key in self.keys) + getattr(self.value, "nbytes", 0)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and torch.equal(a, b)


class _Gram(torch.autograd.Function):
    """A Gram matrix that is not kept: backward forms each group's own, the derivative, again."""

    @staticmethod
    def forward(ctx, variances: Tensor, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        ctx.jacobians = (jacobian1, jacobian2)
        ctx.save_for_backward(variances)
        return jacobian1.gram(jacobian2, variances)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (variances,) = ctx.saved_tensors
        jacobian1, jacobian2 = ctx.jacobians
        out = torch.zeros_like(variances)
        for group in range(variances.shape[1]):
            gram = jacobian1.gram(jacobian2, _one_hot(variances, group))
            out[:, group] = (grad * gram).sum((-2, -1)).sum_to_size(variances.shape[0])
        return out, None, None
