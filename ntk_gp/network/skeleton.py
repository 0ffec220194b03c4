"""The network's module without its weights: one copy for each call that runs at a time, and as it was made at each."""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import eq, is_
from typing import Any

from torch import Tensor, nn

from .._compat import BUFFERS, CHILDREN, PARAMETERS, buffers_in, parameters_in

# What torch keeps in every module for hooks and the like: nothing that a forward pass writes to.
_BOOKKEEPING = vars(nn.Module()).keys() - {PARAMETERS, BUFFERS, CHILDREN}
_ATOMIC = (Tensor, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


def copy_module(module: nn.Module, convert: Callable[[Tensor], Tensor | None]) -> nn.Module:
    """A deep copy of a module in which every tensor that it holds, wherever that is, is replaced by another.

    Tensors that were one are one again. `copy.deepcopy` alone refuses those that are results of a computation.

    :param convert: Gives the other tensor, or None to leave this one out: attributes are None then, and lists and
        dictionaries do not have it.
    :raises TypeError: If the module holds something that cannot be copied.
    """
    converted = {id(tensor): convert(tensor) for tensor in held_tensors(module)}
    memo: dict[int, object] = {key: _LEFT_OUT if tensor is None else tensor for key, tensor in converted.items()}
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise TypeError(
            f"The network ({type(module).__name__}) cannot be copied: {error} Everything it holds must support "
            "copy.deepcopy."
        ) from error
    if any(tensor is None for tensor in converted.values()):
        for value in list(held_by(copied)):
            _leave_out(value)
    return copied


class _LeftOut:
    def __deepcopy__(self, memo: dict) -> _LeftOut:
        return self


_LEFT_OUT = _LeftOut()


def _leave_out(value: Any) -> None:
    if isinstance(value, dict):
        for key in [key for key, item in value.items() if _is_left_out(item)]:
            del value[key]
    elif isinstance(value, (list, deque)):
        _refill(value, [item for item in value if not _is_left_out(item)])
    if hasattr(value, "__dict__") and not isinstance(value, _ATOMIC):
        for name in [name for name, item in vars(value).items() if _is_left_out(item)]:
            vars(value)[name] = None


def _is_left_out(item: Any) -> bool:
    """Also a tuple with one left out, such as the states of a recurrent network."""
    return item is _LEFT_OUT or (isinstance(item, tuple) and any(map(_is_left_out, item)))


def held_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors in attributes, lists, dictionaries and objects of the module's; each once."""
    return (value for value in held_by(module) if isinstance(value, Tensor))


def held_by(holder: Any) -> Iterator[Any]:
    """Something, and whatever it holds, directly or not."""
    seen: set[int] = set()
    pending: list[Any] = [holder]
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            yield value
            pending.extend(_children(value))


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, _ATOMIC):
        return
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    if hasattr(value, "__dict__"):
        yield from (child for name, child in vars(value).items() if not _is_bookkeeping(value, name))


def _is_bookkeeping(value: Any, name: str) -> bool:
    return isinstance(value, nn.Module) and name in _BOOKKEEPING


class Skeletons:
    """Copies of a module, lent to one call at a time.

    A call puts parameters into the module that it runs, and may write to it: an activation that is looked at later, a
    counter, a weight computed once and kept. No other thread may see the first, and no later call the second, which
    would be cut off from the parameters or hold a graph: each call finds the module as it was made.

    :param original: The module, its parameters and buffers on the meta device; never called itself.
    :param aliases: Every name of every parameter and buffer, and the canonical name of that tensor.
    """

    def __init__(self, original: nn.Module, aliases: Mapping[str, str]):
        self._original = original
        self._aliases = aliases
        self._free: list[_Skeleton] = []

    def layer_names(self) -> list[str]:
        """The names of the modules within the module."""
        return [name for name, _ in self._original.named_modules() if name]

    def given(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy with these tensors for good: for graphs that run the module again when they are differentiated."""
        skeleton = _Skeleton(copy.deepcopy(self._original), self._aliases)
        for place, name, owner in skeleton.places:
            place[name] = tensors[owner]
        return skeleton.module

    @contextmanager
    def lent(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A copy that nobody else has meanwhile, with these tensors, by their canonical names, in their places."""
        try:
            skeleton = self._free.pop()
        except IndexError:  # more calls at a time than ever before
            skeleton = _Skeleton(copy.deepcopy(self._original), self._aliases)
        try:
            for place, name, owner in skeleton.places:
                place[name] = tensors[owner]
            yield skeleton.module
        finally:
            skeleton.restore()
            self._free.append(skeleton)


class _Skeleton:
    """A module, and what it and its containers held when it was made.

    :ivar places: The dictionaries in which the module looks its tensors up, with their keys there and canonical names.
    """

    def __init__(self, module: nn.Module, aliases: Mapping[str, str]):
        self.module = module
        self.places = [_place(module, name, owner) for name, owner in aliases.items()]
        self._kept = [(container, copy.copy(container)) for container in _mutable_containers(module)]

    def restore(self) -> None:
        for container, kept in self._kept:
            if not _is_as(container, kept):
                _refill(container, kept)


def _place(module: nn.Module, name: str, owner: str) -> tuple[dict[str, Any], str, str]:
    path, _, leaf = name.rpartition(".")
    holder = module.get_submodule(path)
    return (parameters_in(holder) if leaf in parameters_in(holder) else buffers_in(holder)), leaf, owner


def _mutable_containers(module: nn.Module) -> Iterator[Any]:
    for value in held_by(module):
        if isinstance(value, (dict, list, set, deque)):
            yield value
        if hasattr(value, "__dict__") and not isinstance(value, _ATOMIC):
            yield vars(value)


def _is_as(container: Any, kept: Any) -> bool:
    """Whether it holds the same objects; what these hold is looked at where they are containers themselves."""
    if len(container) != len(kept):
        return False
    if isinstance(container, set):
        return container == kept
    if isinstance(container, dict):
        return all(map(is_, container.values(), kept.values())) and all(map(eq, container, kept))
    return all(map(is_, container, kept))


def _refill(container: Any, kept: Any) -> None:
    container.clear()
    container.extend(kept) if isinstance(container, (list, deque)) else container.update(kept)
