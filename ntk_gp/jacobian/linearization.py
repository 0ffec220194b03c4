"""What operators carry by reference: a network with its engines, and what was computed from them."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import settings
from ..distributed.jacobian import ShardedJacobian
from ..network import FrozenNetwork, NetworkFunction, full_precision, is_same_function
from . import rules
from .autodiff import AutodiffEngine
from .base import Jacobian, JacobianEngine
from .columns import Column
from .contents_cache import ContentsCache
from .input_derivatives import AtInputs
from .kept_grams import KeptGrams
from .memory import empty
from .products import GramProduct, gram_diagonal, kernel_product
from .solvers_in_use import SolversInUse
from .structured import StructuredEngine

# The engine where none is named, read whenever one is made. The test suite sets it, to run as a whole with either.
default_engine = "structured"

_Result = TypeVar("_Result")


def _in_full_precision(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Of a method whose first argument is a Jacobian: the user's autocast does not reach in."""

    @functools.wraps(method)
    def wrapped(self: Linearization, jacobian: Jacobian, *args: Any, **kwargs: Any) -> _Result:
        with full_precision(jacobian.x.device.type):
            return method(self, jacobian, *args, **kwargs)

    return wrapped


def _known(engine: str | None) -> str:
    if engine == "auto":
        warnings.warn(
            "engine='auto' has always been engine='structured': leave it out, or name the engine.",
            DeprecationWarning,
            stacklevel=4,
        )
    engine = default_engine if engine in (None, "auto") else engine
    if engine not in ("structured", "autodiff"):
        raise ValueError(f"engine must be 'structured' or 'autodiff', got {engine!r}.")
    return engine


class Linearization:
    """The linear model that takes a trained network's place: f(x; w₀) + J(x)(w − w₀), with all that is known about it.

    Kernel matrices and solvers are made anew at every call of a model, and each holds on to this one object. It
    hands out J(x), and products and Gram matrices made of it, and remembers them: for the inputs seen last, up to a
    quarter of the memory budget. What was remembered is used only where the inputs are equal element by element, in the
    same dtype, on the same device, and no tensor of the network has changed since.

    It is no `nn.Module`: a model that is converted or moved leaves it alone.

    :param network: The frozen network.
    :param engine: What computes J(x): `"structured"`, matrix products from the recorded uses of each parameter, with
        autodiff for what no rule covers; or `"autodiff"`, `torch.func` and autograd throughout. Inputs that require
        gradients are always served by autodiff.
    :raises ValueError: If there is no such engine.
    """

    columns: tuple[Column, ...] = ()
    """Known features beside J: none."""

    def __init__(self, network: FrozenNetwork, engine: str | None = None):
        engine = _known(engine)
        self.network = network
        self.autodiff = AutodiffEngine(network)
        self.engine: JacobianEngine = self.autodiff
        if engine == "structured":
            self.engine = StructuredEngine(network, self.autodiff)
        self.clear()

    def clear(self) -> None:
        """Drops everything that was kept."""
        self._cache = ContentsCache()
        self._grams = KeptGrams(self.network.num_groups)
        self._solvers = SolversInUse()
        self._at_inputs = AtInputs()

    @property
    def of_network(self) -> Linearization:
        """That of the network alone, without what stands beside it."""
        return self

    def has_values_of(self, network: FrozenNetwork) -> bool:
        """Whether f is that of another snapshot, which edits without a trace have just been looked for in."""
        own = self.of_network.network
        return isinstance(own, FrozenNetwork) and is_same_function(network, own)

    def add_solver(self, solver: Any) -> None:
        """Others may start from this one while it is in use."""
        self._solvers.add(solver)

    @property
    def solvers(self) -> list:
        """The solvers in use."""
        return self._solvers.all()

    def keep(
        self, kind: str, tensors: tuple[Tensor, ...], compute: Callable[..., Any], network_state: int | None = None
    ) -> Any:
        """The result of `compute` for tensors with these contents, from the last time or computed now.

        :param kind: Tells results of different kinds for the same tensors apart.
        :param tensors: What the result depends on, beside the network.
        :param compute: Called with copies of the tensors; its result says in `nbytes` what it holds.
        :param network_state: Of the network that it is computed with, where the caller knows it.
        :raises TypeError: If it does not say.
        """
        return self._cache.get(kind, functools.partial(self._state, network_state), tensors, compute)

    def kept(self, kind: str, tensors: tuple[Tensor, ...]) -> Any:
        """What :meth:`keep` has kept, or None."""
        return self._cache.known(kind, functools.partial(self._state, None), tensors)

    def jacobian(self, x: Tensor, keep: bool = True) -> Jacobian:
        """J(x) at x (B, n, d): differentiable where x requires a gradient, otherwise kept for the next time."""
        function = self.network.at(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return self.autodiff.linearize(x, function)
        x = x.detach()
        if not keep:
            return self.engine.linearize(x, function)
        return self.keep("jacobian", (x,), functools.partial(self._capture, function), function.state)

    def _capture(self, function: NetworkFunction, x: Tensor) -> Jacobian:
        """J(x), by the ranks together where there are several and points for each."""
        group = settings.distributed.group()
        if group is None or group.size == 1 or x.shape[1] < group.size:
            return self.engine.linearize(x, function)
        return ShardedJacobian.at_inputs(
            function, x, group, functools.partial(self.engine.linearize, function=function)
        )

    @_in_full_precision
    def gram(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor, keep: bool = True) -> Tensor:
        """J₁ Σ_w J₂ᵀ, (B or W, N₁, N₂), differentiable with respect to the variances (W, G) and the inputs."""
        if jacobian1.x.requires_grad or jacobian2.x.requires_grad:
            return self._at_inputs.gram(jacobian1, jacobian2, variances, self.jacobian)
        if keep and self._grams.fits(jacobian1, jacobian2) and self._grams.pays(jacobian1, jacobian2):
            gram = self._grams.matrix(jacobian1, jacobian2, self.keep)
            if self.network.num_groups > 1:
                return torch.einsum("wg,gnm->wnm", variances, gram)
            if variances.requires_grad or len(variances) > 1:
                return gram * variances.unsqueeze(-1)
            return torch.mul(gram, variances.unsqueeze(-1), out=empty(gram.shape, like=gram))
        return GramProduct.apply(variances, jacobian1, jacobian2)

    @_in_full_precision
    def unit_grams(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor | None:
        """Those of all groups with variance one, (G, N₁, N₂), or (B, N₁, N₂) where there is one group.

        They are the ones that are kept, not to be written to; None where there is no room for them.
        """
        if jacobian1.x.requires_grad or jacobian2.x.requires_grad or not self._grams.fits(jacobian1, jacobian2):
            return None
        return self._grams.matrix(jacobian1, jacobian2, self.keep)

    @_in_full_precision
    def diagonal(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor) -> Tensor:
        """The diagonal of J₁ Σ_w J₂ᵀ, (B or W, N), differentiable with respect to the variances and the
        inputs."""
        if jacobian1.x.requires_grad or jacobian2.x.requires_grad:
            return self._at_inputs.diagonal(jacobian1, jacobian2, variances, self.jacobian)
        return gram_diagonal(jacobian1, jacobian2, variances)

    @_in_full_precision
    def kernel_matmul(self, jacobian1: Jacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        """(J₁ Σ_w J₂ᵀ) rhs for rhs (B or 1, N₂, r): by the engine, or by the stored Gram matrix once that has paid.

        The matrix is stored when the columns multiplied so far have cost as much as forming it would (so never more
        than twice the cheaper way), and only if it fits in the cache.
        """
        if jacobian1.x.requires_grad or jacobian2.x.requires_grad:
            return kernel_product(jacobian1, jacobian2, rhs, variances)
        if self._grams.fits_own(jacobian1, jacobian2) and self._grams.pays_for_product(
            jacobian1, jacobian2, rhs.shape[-1]
        ):
            if not isinstance(jacobian1, ShardedJacobian):
                return self.gram(jacobian1, jacobian2, variances) @ rhs
            if not (torch.is_grad_enabled() and (rhs.requires_grad or variances.requires_grad)):
                return self._own_rows_matmul(jacobian1, jacobian2, rhs, variances)
        return jacobian1.kernel_matmul(jacobian2, rhs, variances)

    def _own_rows_matmul(
        self, jacobian1: ShardedJacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor
    ) -> Tensor:
        """(J₁ Σ_w J₂ᵀ) rhs by this rank's rows of the Gram matrix, which are kept; without a graph."""
        with torch.no_grad():
            gram = self._grams.own_rows(jacobian1, jacobian2, self.keep)
            if self.network.num_groups > 1:
                product = torch.einsum("wg,gnm,wmr->wnr", variances, gram, rhs.expand(len(variances), -1, -1))
            else:
                product = (gram @ rhs) * variances.unsqueeze(-1)
            return jacobian1.shards.gathered(product, 1)

    def _state(self, network: int | None = None) -> Hashable:
        """What results belong to: the state of the network (the present one by default), the engine and its rules."""
        state = self.network.fingerprint() if network is None else network
        return (state, type(self.engine), rules.version(), settings.distributed.group())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": None, "_grams": None, "_solvers": None, "_at_inputs": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.clear()

    def __deepcopy__(self, memo: dict) -> Linearization:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.network = copy.deepcopy(self.network, memo)
        new.autodiff = copy.deepcopy(self.autodiff, memo)
        new.engine = copy.deepcopy(self.engine, memo)
        # Entries, solvers and Jacobians say which state of the network they belong to.
        new._cache, new._solvers, new._grams = self._cache, self._solvers, self._grams
        new._at_inputs = AtInputs()
        return new
