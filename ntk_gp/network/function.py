"""The network as a pure function of its parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import settings
from . import switches
from .elementary import ElementaryOperations
from .graph import leaves_below
from .skeleton import Skeletons

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
    It may be called from several threads, and no call has an effect on another: each has a module of its own, as it was
    made, and an input that nobody else has.

    :param network: The frozen network this is taken from.
    :param skeletons: The module with every tensor of its own on the meta device: one that the call fails to replace
        raises, and is never silently stale.
    :param tensors: Every tensor of the snapshot by its canonical name.
    :param inner_dtype: The precision that the network itself computes in, where it is not that of its tensors here.
    :param state: The snapshot's fingerprint when it was taken, for what is computed with it and kept.
    """

    def __init__(
        self,
        network: FrozenNetwork,
        skeletons: Skeletons,
        tensors: dict[str, Tensor],
        inner_dtype: torch.dtype | None = None,
        state: int | None = None,
    ):
        self.skeletons = skeletons
        self.inner_dtype = inner_dtype
        self.state = state
        self.parameters: dict[str, Tensor] = {name: tensors[name] for name in network.parameter_names}
        self.constants = {name: tensor for name, tensor in tensors.items() if name not in self.parameters}
        self.num_groups = network.num_groups
        self.group_indices = network.group_indices
        self.input_shape = network.input_shape
        self.output = network.output
        self.bytes_per_point = 0
        self._recurrent = network._is_recurrent
        self.unreached: frozenset[str] = frozenset()  # parameters without influence on the output, where it was tried
        self._left_out = network._left_out
        self.runs_again = False  # whether backward passes run parts of the module again, as checkpoints do
        self._sizes_checked: set[int] = set()
        self._written: set[str] = set(network._renormalised)  # tensors that calls write to: each call gets its own

    def __call__(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f(w, x): (n, d) to (n, C). Call it inside :meth:`tracing`."""
        out = self._call(parameters, x).reshape(x.shape[0], -1).to(x.dtype)
        return out[:, self.output].unsqueeze(-1) if isinstance(self.output, int) else out

    def _call(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        tensors = {**self.constants, **parameters}
        for name in tuple(self._written):
            tensors[name] = tensors[name].clone()
        versions = _versions(tensors)
        out = self._call_with(tensors, x)
        if _versions(tensors) != versions:
            self._check_writes(tensors, versions)
        return out

    def _call_with(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the network returns, whatever that is, for tensors by their canonical names."""
        x = x.clone()  # the network may write to it
        if self.inner_dtype is not None:
            x = x.to(self.inner_dtype)
            tensors = {name: convert(tensor, self.inner_dtype) for name, tensor in tensors.items()}
        if self.input_shape is not None:
            x = x.reshape(x.shape[0], *self.input_shape)
        if self.runs_again:
            return self.skeletons.given(tensors)(x)
        with self.skeletons.lent(tensors) as module:
            return module(x)

    def _check_writes(self, tensors: Mapping[str, Tensor], versions: list[int]) -> None:
        """Raises where a call wrote to tensors that later calls share, as none did when the network was tried."""
        pairs = zip(tensors, _versions(tensors), versions, strict=True)
        changed = [name for name, now, before in pairs if now != before and name not in self._written]
        if changed:
            raise RuntimeError(
                f"The network wrote to its tensors {', '.join(changed)} at these inputs, and not at those it was tried "
                "with first, so that no later answer could be trusted. Let its forward write to copies of them, and "
                "make kernel and mean anew."
            )

    def leaves(self) -> dict[str, Tensor]:
        """The parameters as tensors to differentiate with respect to, which share their memory."""
        return {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}

    @cached_property
    def num_parameters(self) -> int:
        """P."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of every selected parameter."""
        return tuple(tensor.numel() for tensor in self.parameters.values())

    @cached_property
    def num_outputs(self) -> int:
        """C, the number of outputs that take part; known once :meth:`probe` has run."""
        raise RuntimeError("The network has not been evaluated yet: call FrozenNetwork.check(x) first.")

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def points_per_pass(self) -> int:
        """How many points may go through the network at once, with derivatives, within the memory budget."""
        return max(1, settings.memory_budget.bytes(self.device) // (_PASS_OVERHEAD * max(1, self.bytes_per_point)))

    def restrict(self, names: Iterable[str]) -> NetworkFunction:
        """The same function, with only these of the selected parameters as its parameters, in the order they have."""
        names = set(names)
        restricted = copy.copy(self)
        groups = dict(zip(self.parameters, self.group_indices, strict=True))
        restricted.parameters = {name: tensor for name, tensor in self.parameters.items() if name in names}
        restricted.constants = {**self.constants, **self.parameters}
        restricted.group_indices = tuple(groups[name] for name in restricted.parameters)
        for name in ("sizes", "num_parameters"):
            restricted.__dict__.pop(name, None)
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

    def expand_variances(self, variances: Tensor) -> Tensor:
        """One variance per group, (..., G), to one per parameter, (..., P) (a view where there is one group)."""
        if self.num_groups == 1:
            return variances.expand(*variances.shape[:-1], self.num_parameters)
        sizes = torch.tensor(self.sizes, device=variances.device)
        groups = torch.tensor(self.group_indices, device=variances.device).repeat_interleave(sizes)
        return variances[..., groups]

    @contextmanager
    def tracing(self, input_gradients: bool = False) -> Iterator[None]:
        """Whatever the user's mode, backends that can be differentiated twice, in full precision, outside autocast.

        Some of what decides that is one switch for the whole process (see :mod:`.switches`).

        :param input_gradients: The Jacobian will be differentiated with respect to the inputs.
        """
        on_gpu = self.device.type == "cuda"
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(full_precision(self.device))
            stack.enter_context(switches.PLAIN_ATTENTION)
            if self._recurrent:
                stack.enter_context(switches.WITHOUT_CUDNN if on_gpu else switches.WITHOUT_ONEDNN)
            if on_gpu:
                stack.enter_context(switches.CUDNN[settings.allow_tf32.on()])
            if input_gradients:
                stack.enter_context(ElementaryOperations())
            yield

    def probe(self, rows: Tensor) -> None:
        """Evaluates the network at a few rows and raises where the result cannot be linearised."""
        parameters = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.parameters.items()}
        tensors = {name: tensor.clone() for name, tensor in self.constants.items()} | parameters
        versions = _versions(tensors)
        with self.tracing(), torch.enable_grad():
            out, saved_bytes = self._measured_call(tensors, parameters.values(), rows)
        self.unreached = self._unreached_twice(parameters, out, rows)
        # A counter in a buffer, embeddings that are renormalised as they are used: each call gets its own.
        pairs = zip(tensors, _versions(tensors), versions, strict=True)
        self._written |= {name for name, now, before in pairs if now != before}
        self.bytes_per_point = max(saved_bytes // rows.shape[0], rows.shape[1] * rows.element_size())
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
        if _is_less_precise(out.dtype, self.inner_dtype or rows.dtype):
            raise TypeError(
                f"The network returned {out.dtype} for inputs of {rows.dtype}. Its tensors were converted to the "
                "inputs' dtype, so its forward must have a dtype of its own: remove that cast."
            )
        if not torch.isfinite(out).all():
            raise ValueError(
                "The network's output is NaN or infinite at finite inputs. Check its weights, and the scale of the "
                "inputs."
            )
        self.num_outputs = size if self.output == ALL_OUTPUTS else 1

    def _measured_call(
        self, tensors: Mapping[str, Tensor], parameters: Iterable[Tensor], rows: Tensor
    ) -> tuple[Tensor, int]:
        """The network's output at a few rows, and the bytes that autograd keeps of the pass."""
        saved = _SavedBytes(parameters)
        try:
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                return self._checked_call(tensors, rows), saved.total
        except ValueError as error:
            if "saved tensor hooks" not in str(error):
                raise
        with _ResultBytes() as results:  # a network that uses torch.func itself, which has no such hooks
            return self._checked_call(tensors, rows), results.total

    def _missing_attributes(self) -> str:
        if not self._left_out:
            return ""
        return (
            f" Its attributes {', '.join(self._left_out)} were computed from its parameters at an earlier call and "
            "left out; it may have missed them."
        )

    def _unreached_twice(self, parameters: Mapping[str, Tensor], out: Tensor, rows: Tensor) -> frozenset[str]:
        """The parameters that an output does not depend on; raises where a second call depends on others than a first.

        A weight that is computed once and kept where no copy of the module reaches would make it a constant.
        """
        again = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.parameters.items()}
        constants = {name: tensor.clone() for name, tensor in self.constants.items()}
        with self.tracing(), torch.enable_grad():
            x = rows.detach().clone().requires_grad_()
            out_again = self._call_with({**constants, **again}, x)
            leaves = leaves_below(out_again)
        self.runs_again = self.runs_again or not _can_be_differentiated(out_again, {**again, "inputs": x})
        first, second = _unreached(parameters, leaves_below(out)), _unreached(again, leaves)
        if first != second or any(id(tensor) in leaves for tensor in parameters.values()):
            raise ValueError(
                "The network keeps something that it computed from its parameters for later calls, in a global "
                "variable or the like, so that a second output depends on others than the first "
                f"({', '.join(sorted(first ^ second))}). Compute it anew in each call of forward."
            )
        return first

    def check_input_gradients(self, x: Tensor) -> None:
        """Raises where derivatives with respect to x are asked for, and a network runs parts of itself again for them.

        That would be later, outside :meth:`tracing`, with other operations than in the first run, and wrong.
        """
        if self.runs_again and torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                "A network with checkpoints, which runs parts of itself again in backward passes, has no gradients "
                "with respect to inputs here. Switch checkpointing off, or take differences of predictions."
            )

    def has_checked(self, rows: int) -> bool:
        """Whether a batch of so many rows is known to be treated row by row."""
        return rows <= 2 or rows in self._sizes_checked

    def check_values(self, x: Tensor, values: Tensor, rows: int) -> None:
        """Raises where two rows have other values by themselves than among all of x (n, d), `values` (n, C).

        What was tried with few rows need not hold for many; asked once for each number of rows.

        :param rows: The size of the batch, of which x is as much as goes through the network at once.
        """
        if self.has_checked(rows):
            return
        places = [len(x) // 3, len(x) - 1]
        values = values.detach()
        with torch.no_grad():
            alone = self(self.parameters, x.detach()[places])
        tolerance = torch.finfo(self.inner_dtype or x.dtype).eps ** 0.5 * float(values.abs().max())
        if not torch.allclose(values[places], alone, rtol=0.0, atol=tolerance):
            raise ValueError(MIXES_ROWS)
        self._sizes_checked.add(rows)

    def _checked_call(self, tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        try:
            out = self._call_with(tensors, rows)
        except Exception as error:
            shape = tuple(rows.shape[1:]) if self.input_shape is None else self.input_shape
            raise ValueError(
                f"The network cannot be evaluated at inputs of shape (n, {', '.join(map(str, shape))}), dtype "
                f"{rows.dtype}: {error} Give it the features it was trained with, or input_shape= to reshape each flat "
                f"row.{self._missing_attributes()}"
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
        self.seen = {_memory(tensor)[0] for tensor in parameters}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        address, nbytes = _memory(tensor)
        if address not in self.seen:
            self.seen.add(address)
            self.total += nbytes
        return tensor.detach()  # a result that held itself, by its graph, would never be freed

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


class _ResultBytes(TorchFunctionMode):
    """Adds up the results of all the functions that are called: more than what autograd keeps."""

    total = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.total += _memory(result)[1] if isinstance(result, Tensor) else 0
        return result


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's memory is, and how many bytes."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse, or inside a transform: there is no storage to look at
        return id(tensor), tensor.numel() * tensor.element_size()


def convert(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """A real floating-point tensor in this dtype, a complex one in the complex dtype that goes with it, or itself."""
    if tensor.is_complex():
        return tensor.to(device=device, dtype=torch.promote_types(dtype, torch.complex32))
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _can_be_differentiated(out: Tensor, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a backward pass works once the module that has run is no longer there."""
    try:
        torch.autograd.grad(out.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
    except Exception:
        return False
    return True


def _unreached(parameters: Mapping[str, Tensor], leaves: set[int]) -> frozenset[str]:
    return frozenset(name for name, tensor in parameters.items() if id(tensor) not in leaves)


def _versions(tensors: Mapping[str, Tensor]) -> list[int]:
    with torch._C.DisableTorchFunction():  # a mode would look at each of these
        return [tensor._version for tensor in tensors.values()]


def _is_less_precise(dtype: torch.dtype, than: torch.dtype) -> bool:
    return torch.promote_types(dtype, than) != dtype


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
