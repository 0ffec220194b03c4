"""The network as a pure function of its parameters."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import settings
from .elementary import ElementaryOperations

if TYPE_CHECKING:
    from .frozen import FrozenNetwork

ALL_OUTPUTS = "all"

# What a pass through the network takes, in units of what autograd keeps of it, so that it has half of the budget.
_PASS_OVERHEAD = 16

MIXES_ROWS = (
    "A row's output changes with the other rows of the batch, so the network is not a function of one input. Expected "
    "a network that treats rows independently in eval mode: give batch normalisation running statistics "
    "(track_running_stats=True), or freeze whatever mixes rows."
)


class NetworkFunction:
    """The network as a pure function :math:`f(w, x)`, its tensors in one dtype and on one device.

    Parameter vectors are flat: the selected parameters in the order of `parameters`, each flattened, P numbers in all.

    :param network: The frozen network this is taken from.
    :param skeleton: The module with every tensor of its own on the meta device: one that the call fails to replace
        raises, and is never silently stale.
    :param tensors: Every tensor of the snapshot by its canonical name.
    """

    def __init__(self, network: FrozenNetwork, skeleton: nn.Module, tensors: dict[str, Tensor]):
        self.skeleton = skeleton
        self.parameters: dict[str, Tensor] = {name: tensors[name] for name in network.parameter_names}
        self.constants = {name: tensor for name, tensor in tensors.items() if name not in self.parameters}
        self.num_groups = network.num_groups
        self.group_indices = network.group_indices
        self.input_shape = network.input_shape
        self.output = network.output
        self.num_network_outputs: int | None = None
        self.bytes_per_point = 0
        self._aliases = network._aliases
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in skeleton.modules())

    def __call__(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f(w, x): (n, d) to (n, C). Call it inside :meth:`tracing`."""
        out = self._call(parameters, x).reshape(x.shape[0], -1)
        return out[:, self.output].unsqueeze(-1) if isinstance(self.output, int) else out

    def _call(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        tensors = {
            name: parameters[owner] if owner in parameters else self.constants[owner]
            for name, owner in self._aliases.items()
        }
        if self.input_shape is not None:
            x = x.reshape(x.shape[0], *self.input_shape)
        return functional_call(self.skeleton, tensors, (x,), tie_weights=False)

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of every selected parameter."""
        return tuple(tensor.numel() for tensor in self.parameters.values())

    @property
    def num_outputs(self) -> int:
        """C, the number of outputs that take part; known once :meth:`probe` has run."""
        if self.num_network_outputs is None:
            raise RuntimeError("The network has not been evaluated yet: call FrozenNetwork.check(x) first.")
        return self.num_network_outputs if self.output == ALL_OUTPUTS else 1

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def points_per_pass(self) -> int:
        """How many points may go through the network at once, with derivatives, within the memory budget."""
        return max(1, settings.memory_budget.bytes(self.device) // (_PASS_OVERHEAD * max(1, self.bytes_per_point)))

    def restrict(self, names: Iterable[str]) -> NetworkFunction:
        """The same function, with only these of the selected parameters as its parameters."""
        restricted = copy.copy(self)
        groups = dict(zip(self.parameters, self.group_indices, strict=True))
        restricted.parameters = {name: self.parameters[name] for name in names}
        restricted.constants = {**self.constants, **self.parameters}
        restricted.group_indices = tuple(groups[name] for name in restricted.parameters)
        restricted.__dict__.pop("sizes", None)
        return restricted

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """(..., P) to one (..., *shape) view per parameter."""
        pieces = flat.split(self.sizes, dim=-1)
        return {
            name: piece.reshape((*flat.shape[:-1], *tensor.shape))
            for (name, tensor), piece in zip(self.parameters.items(), pieces, strict=True)
        }

    def flatten(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`: one (..., *shape) tensor per parameter to (..., P)."""
        return torch.cat(
            [
                pieces[name].reshape(*pieces[name].shape[: pieces[name].dim() - tensor.dim()], tensor.numel())
                for name, tensor in self.parameters.items()
            ],
            dim=-1,
        )

    def expand_weights(self, weights: Tensor) -> Tensor:
        """One variance per group, (..., G), to one per parameter, (..., P) (a view where there is one group)."""
        if self.num_groups == 1:
            return weights.expand(*weights.shape[:-1], self.num_parameters)
        sizes = torch.tensor(self.sizes, device=weights.device)
        groups = torch.tensor(self.group_indices, device=weights.device).repeat_interleave(sizes)
        return weights[..., groups]

    @contextmanager
    def tracing(self, input_gradients: bool = False) -> Iterator[None]:
        """Whatever the user's mode, backends that can be differentiated twice, in full precision, outside autocast.

        Fused attention has no forward-mode derivative and no second one; mkldnn's and cuDNN's recurrent kernels lack
        them too, so those are switched off for networks that have such layers.

        :param input_gradients: The Jacobian will be differentiated with respect to the inputs.
        """
        fastpath = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(full_precision(self.device))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # nobody asked for it
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            if self.device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=not self._recurrent, allow_tf32=settings.allow_tf32.on(), deterministic=True
                    )
                )
            if input_gradients:
                stack.enter_context(ElementaryOperations())
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fastpath)

    def probe(self, rows: Tensor) -> None:
        """Evaluates the network at a few rows and raises where the result cannot be linearised."""
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}
        saved = _SavedBytes(parameters.values())
        with self.tracing(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            out = self._checked_call(parameters, rows)
        self.bytes_per_point = max(saved.total // rows.shape[0], rows.shape[1] * rows.element_size())
        size = out.reshape(rows.shape[0], -1).shape[1]
        if isinstance(self.output, int) and not -size <= self.output < size:
            raise ValueError(f"output={self.output} is out of range: the network has {size} outputs, 0 to {size - 1}.")
        if self.output is None and size != 1:
            raise ValueError(
                f"The network has {size} outputs for each input (shape {tuple(out.shape)} for {rows.shape[0]} inputs), "
                f"but one was expected. Choose it with output=k, or take all of them with output='{ALL_OUTPUTS}' "
                "(and a multitask model)."
            )
        if not out.requires_grad:
            raise ValueError(
                f"The network's output (dtype {out.dtype}) does not depend differentiably on any of the selected "
                f"parameters ({', '.join(list(self.parameters)[:3])}, …). Return a floating-point tensor that is "
                "computed from them, without detach(), argmax or no_grad."
            )
        if out.dtype != rows.dtype:
            raise TypeError(
                f"The network returned {out.dtype} for inputs of {rows.dtype}. Its tensors were converted to the "
                "inputs' dtype, so its forward must have a dtype of its own: remove that cast."
            )
        if not torch.isfinite(out).all():
            raise ValueError(
                "The network's output is NaN or infinite at finite inputs. Check its weights, and the scale of the "
                "inputs."
            )
        self.num_network_outputs = size

    def _checked_call(self, parameters: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        try:
            out = self._call(parameters, rows)
        except Exception as error:
            shape = tuple(rows.shape[1:]) if self.input_shape is None else self.input_shape
            raise ValueError(
                f"The network cannot be evaluated at inputs of shape (n, {', '.join(map(str, shape))}), dtype "
                f"{rows.dtype}: {error} Give it the features it was trained with, or input_shape= to reshape each flat "
                "row."
            ) from error
        if not isinstance(out, Tensor):
            raise TypeError(
                f"The network returned a {type(out).__name__}, but a tensor was expected. Wrap it in a module whose "
                "forward returns the one tensor to linearise."
            )
        if (
            out.numel() == 0
            or (out.dim() > 0 and out.shape[0] != rows.shape[0])
            or (out.dim() == 0 and rows.shape[0] > 1)
        ):
            raise ValueError(
                f"The network returned shape {tuple(out.shape)} for {rows.shape[0]} inputs; expected "
                f"({rows.shape[0]},) or ({rows.shape[0]}, C), one row for each input."
            )
        return out


class _SavedBytes:
    """Adds up what autograd keeps of a forward pass, parameters apart: the memory that one chunk of inputs needs."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def is_finite(x: Tensor) -> bool:
    """Whether the sum is finite, and so every element; faster than a look at each. An overflow is no proof of more."""
    return math.isfinite(x.detach().sum())


def check_tensor(x: Any) -> None:
    """Raises for inputs that are no tensor, and under `torch.jit.trace`."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Expected inputs as a torch.Tensor, got {type(x).__name__}. Convert them: torch.from_numpy(x) for a numpy "
            "array, torch.tensor(x) for a list."
        )
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot record the network's derivatives. Export the posterior mean instead: "
            "torch.export.export(ntk_gp.adapted_network(model), (x,))."
        )


def check_finite(x: Tensor) -> None:
    """Raises where the inputs are NaN or infinite."""
    if is_finite(x):
        return
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).any(-1).nonzero()[:3].tolist()
        raise ValueError(
            f"Inputs of shape {tuple(x.shape)} have NaN or infinite features, first in rows {bad}. Remove or impute "
            "them."
        )


def full_precision(device: torch.device) -> torch.autocast:
    """A context outside the user's autocast, which would round the factors of products to half precision."""
    return torch.autocast(device.type, enabled=False)


def normal_tensor(x: Tensor) -> Tensor:
    """`x`, as a tensor that autograd can record even if it was made under `torch.inference_mode`."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()
