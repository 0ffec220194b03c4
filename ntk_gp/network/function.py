"""The network as a pure function of its parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory, settings
from .._compat import version_of
from ..replacements.elementary import ElementaryOperations
from . import switches
from .returned import tensor_of
from .skeleton import Skeletons
from .specification import Specification
from .tensors import convert_each, full_precision

NO_MODE = nullcontext()

Watch = Callable[[nn.Module], AbstractContextManager[object]]


def _unwatched(_: nn.Module) -> AbstractContextManager[object]:
    return NO_MODE


@dataclass(frozen=True)
class Findings:
    """What was found out about a function where it was tried (:mod:`.probe`).

    :param num_outputs: C.
    :param network_outputs: How many the network has, of which C take part.
    :param bytes_per_point: What autograd keeps of a pass for each point.
    :param unreached: The parameters without influence on the output.
    :param written: The tensors that calls write to: each call gets its own.
    :param runs_again: Whether backward passes run parts of the module again, as checkpoints do.
    """

    num_outputs: int
    network_outputs: int
    bytes_per_point: int
    unreached: frozenset[str]
    written: frozenset[str]
    runs_again: bool


class NetworkFunction:
    """The network as a pure function :math:`f(w, x)`, its tensors in one dtype and on one device.

    Parameter vectors are flat: the selected parameters in the order of `parameters`, each flattened, P numbers in all.
    It may be called from several threads, and no call has an effect on another: each has a module of its own, as it was
    made, and an input that nobody else has.

    :param specification: The parameters, inputs and outputs that were chosen.
    :param skeletons: The module with every tensor of its own on the meta device: one that the call fails to replace
        raises, and is never silently stale.
    :param tensors: Every tensor of the snapshot by its canonical name.
    :param inner_dtype: The precision that the network itself computes in, where it is not that of its tensors here.
    :param state: The snapshot's fingerprint when it was taken, for what is computed with it and kept.
    """

    def __init__(
        self,
        specification: Specification,
        skeletons: Skeletons,
        tensors: dict[str, Tensor],
        inner_dtype: torch.dtype | None = None,
        state: int | None = None,
    ):
        self.skeletons = skeletons
        self.inner_dtype = inner_dtype
        self.state = state
        self.parameters: dict[str, Tensor] = {name: tensors[name] for name in specification.parameter_names}
        self.constants = {name: tensor for name, tensor in tensors.items() if name not in self.parameters}
        self.specification = specification
        self.group_indices = specification.group_indices
        self.num_groups = len(specification.group_names)
        self.outputs = specification.outputs
        # What trying it finds out, see Findings.
        self.network_outputs = 0
        self.bytes_per_point = 0
        self.unreached: frozenset[str] = frozenset()
        self.runs_again = False
        self._sizes_checked: set[int] = set()
        self._written: set[str] = set(specification.written)

    def learn(self, findings: Findings) -> None:
        """Takes down what was found where this function, or one that is the same, was tried."""
        self.num_outputs, self.network_outputs = findings.num_outputs, findings.network_outputs
        self.bytes_per_point = findings.bytes_per_point
        self.unreached = findings.unreached
        self._written |= findings.written
        self.runs_again = self.runs_again or findings.runs_again

    def __call__(
        self, parameters: Mapping[str, Tensor], x: Tensor, mode: AbstractContextManager[object] = NO_MODE
    ) -> Tensor:
        """f(w, x): (n, d) to (n, C). Call it inside :meth:`tracing`.

        :param mode: A context for what the network itself calls, and for nothing else.
        """
        out = self.watched(parameters, x, lambda _: mode).reshape(x.shape[0], -1).to(x.dtype)
        return self.outputs.pick(out)

    def watched(self, parameters: Mapping[str, Tensor], x: Tensor, watch: Watch) -> Any:
        """What the network returns, of which the steps to the output are taken, at x (n, d).

        :param watch: Gives a context for the module that runs, a copy that is this call's alone.
        """
        tensors = {**self.constants, **parameters}
        for name in tuple(self._written):
            tensors[name] = tensors[name].clone()
        before = versions(tensors)
        out = self.call_with(tensors, x, watch)
        if versions(tensors) != before:
            self._check_writes(tensors, before)
        return out

    def call_with(self, tensors: Mapping[str, Tensor], x: Tensor, watch: Watch = _unwatched) -> Any:
        """The same for tensors by their canonical names."""
        specification = self.specification
        if self.inner_dtype is not None:
            tensors = convert_each(tensors, self.inner_dtype)
        args, kwargs = specification.inputs.arguments(x.clone(), self.inner_dtype)  # the network may write to it
        if self.runs_again and torch.is_grad_enabled():  # without a graph nothing runs again
            module = self.skeletons.given(tensors)
            with watch(module):
                return tensor_of(module(*args, **kwargs), specification.steps)
        with self.skeletons.lent(tensors) as module, watch(module):
            return tensor_of(module(*args, **kwargs), specification.steps)

    def _check_writes(self, tensors: Mapping[str, Tensor], before: list[int]) -> None:
        """Raises where a call wrote to tensors that later calls share, as none did when the network was tried."""
        counts = zip(tensors, versions(tensors), before, strict=True)
        changed = [name for name, now, then in counts if now != then and name not in self._written]
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
        """C, the number of outputs that take part; known once it was tried."""
        raise RuntimeError("The network has not been evaluated yet: call FrozenNetwork.check(x) first.")

    @property
    def is_tried(self) -> bool:
        """Whether it has learned what it is like."""
        return "num_outputs" in self.__dict__

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def points_per_pass(self) -> int:
        """How many points may go through the network at once, with derivatives, within the memory budget."""
        return max(1, memory.PASS.bytes(self.device) // max(1, self.bytes_per_point))

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

    def sum_by_group(self, values: Tensor) -> Tensor:
        """One number per parameter, (..., P), to their sum in each group, (..., G)."""
        sums = values.new_zeros(*values.shape[:-1], self.num_groups)
        for piece, group in zip(values.split(self.sizes, dim=-1), self.group_indices, strict=True):
            sums[..., group] += piece.sum(-1)
        return sums

    @contextmanager
    def tracing(self, input_gradients: bool = False) -> Iterator[None]:
        """Whatever the user's mode, backends that can be differentiated twice, in full precision, outside autocast.

        Some of what decides that is one switch for the whole process (see :mod:`.switches`).

        :param input_gradients: The Jacobian will be differentiated with respect to the inputs.
        """
        on_gpu = self.device.type == "cuda"
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(full_precision(self.device.type))
            stack.enter_context(switches.PLAIN_ATTENTION)
            if self.specification.is_recurrent:
                stack.enter_context(switches.WITHOUT_CUDNN if on_gpu else switches.WITHOUT_ONEDNN)
            if on_gpu:
                stack.enter_context(switches.CUDNN[settings.allow_tf32.on()])
            if input_gradients:
                stack.enter_context(ElementaryOperations())
            yield

    def check_input_gradients(self, x: Tensor) -> None:
        """Raises where derivatives with respect to x are asked for, and there are none, or not here.

        A network that runs parts of itself again for them would do so later, outside :meth:`tracing`, with other
        operations than in the first run, and wrongly.
        """
        if torch.is_grad_enabled() and x.requires_grad and self.specification.inputs.are_whole:
            raise ValueError(
                "The inputs are whole numbers (input_dtype), so nothing has a derivative with respect to them. Detach "
                "them, or keep inducing points fixed (learn_inducing_locations=False)."
            )
        if self.runs_again and torch.is_grad_enabled() and x.requires_grad:
            raise NotImplementedError(
                "A network with checkpoints, which runs parts of itself again in backward passes, has no gradients "
                "with respect to inputs here. Switch checkpointing off, or take differences of predictions."
            )

    def has_checked(self, rows: int) -> bool:
        """Whether a batch of so many rows is known to be treated row by row."""
        return rows <= 2 or rows in self._sizes_checked

    def add_checked(self, rows: int) -> None:
        """Takes down that it is."""
        self._sizes_checked.add(rows)


def versions(tensors: Mapping[str, Tensor]) -> list[int]:
    """How often each tensor has been written to."""
    with torch.DisableTorchFunction():  # a mode would look at each of these
        return [version_of(tensor) for tensor in tensors.values()]
