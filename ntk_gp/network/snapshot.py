"""Taking a snapshot of a module: its tensors as buffers, its structure without weights, its parameters chosen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .function import normal_tensor
from .sharing import share_successor

ParameterSelection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None

_T = TypeVar("_T", bound=Tensor)


class TensorTree(nn.Module):
    """A node of the tree that mirrors the network; loading replaces its buffers, never overwrites them."""

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        before = dict(self._buffers)
        for name, buffer in before.items():
            if buffer is not None:
                self._buffers[name] = buffer.clone()
        super()._load_from_state_dict(*args, **kwargs)
        self._share(before)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TensorTree:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._share(before)
        return self

    def _share(self, before: Mapping[str, Tensor | None]) -> None:
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                self._buffers[name] = share_successor(old, new)

    def shared_copy(self) -> TensorTree:
        """A tree of its own with the same tensors."""
        new = copy.copy(self)
        children = {name: node.shared_copy() for name, node in self._modules.items() if isinstance(node, TensorTree)}
        new.__dict__.update(_buffers=dict(self._buffers), _modules=children)
        return new


def unwrap(network: nn.Module) -> nn.Module:
    """The eager module inside `torch.compile`, `DataParallel` and the like."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"Expected the trained network as a torch.nn.Module, got {type(network).__name__}.")
    while True:
        if _is_compiled(network):
            network = network.get_submodule("_orig_mod")
        elif isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(network, torch.jit.ScriptModule):
            raise TypeError("A TorchScript module cannot be linearised. Pass the original Python module.")
        else:
            return network


def _is_compiled(module: nn.Module) -> bool:
    """Whether this is `torch.compile` 's wrapper (told by its attribute: importing its class takes a second)."""
    return "_orig_mod" in module._modules


def check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name} of the network is uninitialised. Run the network once before linearising it."
        )
    if parameter.is_complex():
        raise TypeError(
            f"Parameter {name} of the network is complex ({parameter.dtype}); only real ones are supported."
        )


def canonical_names(network: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer, tied ones included, to the first name of the same tensor."""
    first: dict[int, str] = {}
    names = {}
    for tensors in (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)):
        for name, tensor in named_tensors(tensors):
            names[name] = first.setdefault(id(tensor), name)
    return names


def named_tensors(tensors: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """The same names that the eager network has, where `torch.compile` has wrapped a part of it."""
    for name, tensor in tensors:
        yield name.replace("_orig_mod.", ""), tensor


def select(named: Mapping[str, nn.Parameter], selection: ParameterSelection) -> set[str]:
    if selection is None:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
        wanted = "requires_grad=True"
    elif callable(selection):
        chosen = {name for name, parameter in named.items() if selection(name, parameter)}
        wanted = f"the predicate {getattr(selection, '__name__', selection)}"
    else:
        patterns = [selection] if isinstance(selection, str) else list(selection)
        chosen = {name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
        wanted = f"parameters={patterns}"
        unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]
        if chosen and unmatched:
            raise ValueError(f"The patterns {unmatched} match no parameter. The network has: {', '.join(named)}.")
    chosen = {name for name in chosen if named[name].is_floating_point() and named[name].numel()}
    if not chosen:
        raise ValueError(f"No parameter of the network was selected by {wanted}. It has: {', '.join(named)}.")
    return chosen


def buffer_tree(network: nn.Module, names: set[str]) -> TensorTree:
    """A tree of bare modules that mirrors the network and holds a copy of each named tensor as a buffer."""
    root = TensorTree()
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in named_tensors((*network.named_parameters(), *network.named_buffers())):
            if name not in names:
                continue
            *path, leaf = name.split(".")
            module: nn.Module = root
            for part in path:
                if part not in module._modules:
                    module._modules[part] = TensorTree()
                module = module.get_submodule(part)
            # Written directly: register_buffer refuses names that nn.Module uses itself, and a network may have them.
            module._buffers[leaf] = tensor.detach().clone()
    return root


def make_skeleton(network: nn.Module) -> nn.Module:
    """A copy of the network in eval mode, without weights (they are on the meta device) and without backward hooks."""
    memo: dict[int, object] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta", requires_grad=False)
        for value in vars(module).values():  # deepcopy refuses tensors that are results of a computation
            if isinstance(value, Tensor):
                memo[id(value)] = normal_tensor(value.detach()).clone()
    try:
        copied = copy.deepcopy(network, memo)
    except Exception as error:
        raise TypeError(
            f"The network ({type(network).__name__}) cannot be copied: {error} Everything it holds must support "
            "copy.deepcopy."
        ) from error
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None and _is_compiled(child):
                module._modules[name] = child.get_submodule("_orig_mod")
    for module in copied.modules():
        module._compiled_call_impl = None
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return copied.eval()


def _plain_tensors(skeleton: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in skeleton.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.device.type != "meta":
                yield module, name, value


def convert_skeleton(skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The skeleton with the tensors that are neither parameters nor buffers in this dtype and on this device."""
    if not any(True for _ in _plain_tensors(skeleton)):
        return skeleton
    skeleton = copy.deepcopy(skeleton)
    for module, name, value in list(_plain_tensors(skeleton)):
        setattr(module, name, value.to(device, dtype if value.is_floating_point() else None))
    return skeleton
