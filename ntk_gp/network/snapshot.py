"""Taking a snapshot of a module: its tensors as buffers, its structure without weights, its parameters chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._compat import BUFFERS, CHILDREN, COMPILED, PARAMETERS, buffers_in, children_in, leave_only_forward
from .graph import leaves_below
from .parameter_sets import ParameterSets
from .sharing import share_successor
from .skeleton import copy_module, held_by, held_tensors
from .tensors import convert, normal_tensor

ParameterSelection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None

_T = TypeVar("_T", bound=Tensor)


class TensorTree(nn.Module):
    """A node of the tree that mirrors the network; loading replaces its buffers, never overwrites them."""

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        before = dict(buffers_in(self))
        for name, buffer in before.items():
            if buffer is not None:
                buffers_in(self)[name] = buffer.clone()
        super()._load_from_state_dict(*args, **kwargs)
        self._share(before)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorTree:
        before = dict(buffers_in(self))
        super()._apply(fn, recurse)
        self._share(before)
        return self

    def _share(self, before: Mapping[str, Tensor | None]) -> None:
        for name, old in before.items():
            new = buffers_in(self)[name]
            if old is not None and new is not None:
                buffers_in(self)[name] = share_successor(old, new)

    def shared_copy(self) -> TensorTree:
        """A tree of its own with the same tensors."""
        new = copy.copy(self)
        children = {
            name: node.shared_copy() for name, node in children_in(self).items() if isinstance(node, TensorTree)
        }
        new.__dict__.update({BUFFERS: dict(buffers_in(self)), CHILDREN: children})
        return new


def unwrap(network: nn.Module) -> nn.Module:
    """The eager module inside `torch.compile`, `DataParallel` and the like."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"Expected the trained network as a torch.nn.Module, got {type(network).__name__}.")
    while True:
        if _is_compiled(network):
            network = network.get_submodule(COMPILED)
        elif isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(network, torch.jit.ScriptModule):
            raise TypeError("A TorchScript module cannot be linearised. Pass the original Python module.")
        else:
            return network


def _is_compiled(module: nn.Module) -> bool:
    """Whether this is `torch.compile` 's wrapper (told by its attribute: importing its class takes a second)."""
    return COMPILED in children_in(module)


def check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name} of the network is uninitialised. Run the network once before linearising it."
        )


def canonical_names(network: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer, tied ones included, to the first name of the same tensor."""
    first: dict[int, str] = {}
    names = {}
    for tensors in (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)):
        for name, tensor in named_tensors(tensors):
            names[name] = first.setdefault(id(tensor), name)
    return names


def named_tensors(tensors: Iterable[tuple[str, _T]]) -> Iterable[tuple[str, _T]]:
    """The same names that the eager network has, where `torch.compile` has wrapped a part of it."""
    return ((name.replace(f"{COMPILED}.", ""), tensor) for name, tensor in tensors)


def select(named: Mapping[str, nn.Parameter], selection: ParameterSelection, sets: ParameterSets) -> set[str]:
    """The names of the parameters that are chosen, of those there are.

    :param sets: What patterns stand for.
    """
    if selection is None:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
        wanted = "requires_grad=True"
    elif callable(selection):
        chosen = {name for name, parameter in named.items() if selection(name, parameter)}
        wanted = f"the predicate {getattr(selection, '__name__', selection)}"
    else:
        patterns = patterns_of(selection)
        matching = {pattern: sets.matching(pattern) for pattern in patterns}
        chosen = {name for names in matching.values() for name in names}
        wanted = f"parameters={patterns}"
        unmatched = [pattern for pattern, names in matching.items() if not names]
        if unmatched and (chosen or sets.are_named(unmatched)):
            raise ValueError(
                f"The patterns {unmatched} match no parameter.{sets.missing(unmatched)} The network has: "
                f"{', '.join(named)}."
            )
    for name, parameter in named.items():
        if name in chosen and parameter.is_complex() and parameter.requires_grad:
            raise TypeError(
                f"Parameter {name} of the network is complex ({parameter.dtype}); only real ones can be linearised "
                "in. Leave it out, by parameters= or requires_grad_(False)."
            )
    chosen = {name for name in chosen if named[name].is_floating_point() and named[name].numel()}
    if not chosen:
        frozen = selection is None and not any(parameter.requires_grad for parameter in named.values())
        way_out = ' All of them are frozen: pass parameters="*" to linearise in all of them.' if frozen else ""
        raise ValueError(f"No parameter of the network was selected by {wanted}. It has: {', '.join(named)}.{way_out}")
    return chosen


def patterns_of(selection: ParameterSelection) -> list[str]:
    """The patterns that a selection consists of; none where it does not."""
    if selection is None or callable(selection):
        return []
    return [selection] if isinstance(selection, str) else list(selection)


def check_same_parameters(named: Mapping[str, nn.Parameter], canonical: Mapping[str, str]) -> None:
    """Raises where `eval()` has left a network other parameters than it had."""
    gone = [name for name in named if name not in canonical]
    if gone:
        raise ValueError(
            f"The network's eval() replaces its parameters {', '.join(gone)}. Call network.eval() first, and choose "
            "among the parameters that it has then."
        )


def buffer_tree(network: nn.Module, names: set[str]) -> TensorTree:
    """A tree of bare modules that mirrors the network and holds each named tensor as a buffer."""
    root = TensorTree()
    for name, tensor in named_tensors((*network.named_parameters(), *network.named_buffers())):
        if name not in names:
            continue
        *path, leaf = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in children_in(module):
                children_in(module)[part] = TensorTree()
            module = module.get_submodule(part)
        # Written directly: register_buffer refuses names that nn.Module uses itself, and a network may have them.
        buffers_in(module)[leaf] = tensor.detach()
    return root


def copy_in_eval_mode(network: nn.Module) -> nn.Module:
    """A copy of the network with tensors of its own, as `eval()` leaves it, and without backward hooks.

    `eval()` may do more than set flags: adapters are merged into weights there.
    """
    with torch.inference_mode(False), torch.no_grad():
        copied = copy_module(network, _own_copy(network))
        for module in list(copied.modules()):
            for name, child in children_in(module).items():
                if child is not None and _is_compiled(child):
                    children_in(module)[name] = child.get_submodule(COMPILED)
        for module in copied.modules():
            leave_only_forward(module)
        return copied.eval()


def _own_copy(network: nn.Module) -> Callable[[Tensor], Tensor | None]:
    """How each tensor of a network is copied: with the memory layout and `requires_grad` that it has.

    What is neither parameter nor buffer, and was computed from the parameters (an activation, or a weight that was kept
    for later calls), is left out: it would stay what it was where the parameters move.
    """
    parameters = {id(parameter) for parameter in network.parameters()}
    registered = parameters | {id(buffer) for buffer in network.buffers()}

    def own(tensor: Tensor) -> Tensor | None:
        if id(tensor) not in registered and leaves_below(tensor) & parameters:
            return None
        own = normal_tensor(tensor.detach()).clone()
        return nn.Parameter(own, tensor.requires_grad) if id(tensor) in parameters else own

    return own


def unregistered_tensors(network: nn.Module) -> tuple[list[str], list[str]]:
    """The attributes, `module.name`, that hold floating-point tensors and are neither parameters nor buffers: those
    that a copy keeps, and those that it leaves out, being computed from the parameters."""
    registered = {id(tensor) for tensors in (network.parameters(), network.buffers()) for tensor in tensors}
    parameters = {id(parameter) for parameter in network.parameters()}
    names: tuple[list[str], list[str]] = ([], [])
    for prefix, module in network.named_modules():
        for name, value in vars(module).items():
            if name in (PARAMETERS, BUFFERS, CHILDREN):
                continue
            held = [t for t in held_by(value) if isinstance(t, Tensor) and id(t) not in registered]
            if any(tensor.is_floating_point() for tensor in held):
                computed = any(leaves_below(tensor) & parameters for tensor in held)
                names[computed].append(f"{prefix}.{name}".lstrip("."))
    return names


def make_skeleton(network: nn.Module) -> nn.Module:
    """The module itself, its parameters and buffers on the meta device."""
    registered = {id(tensor) for tensors in (network.parameters(), network.buffers()) for tensor in tensors}

    def without_weights(tensor: Tensor) -> Tensor:
        if id(tensor) not in registered:
            return tensor
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty

    return copy_module(network, without_weights)


def convert_skeleton(skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The skeleton with the tensors that are neither parameters nor buffers in this dtype and on this device."""
    if all(tensor.is_meta for tensor in held_tensors(skeleton)):
        return skeleton
    return copy_module(skeleton, lambda tensor: tensor if tensor.is_meta else convert(tensor, dtype, device))
