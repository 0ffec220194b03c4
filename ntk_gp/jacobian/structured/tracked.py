"""Which tensors a network computes from its parameters alone, while it runs.

Such a tensor is the same at all inputs, and stands for the parameters in a use of it. A tensor counts as one only if
every call on the way to it was seen, and had nothing but parameters, the network's other tensors, such tensors, and
plain Python values among its arguments. Whatever else it may be, it is taken for one that depends on the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..._compat import base_of, version_of
from ..maps import Computed, Operand
from ..terms import ParameterView

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
# Through what these return, a tensor is changed and does not know of it.
_LEAKS = (Tensor.data.__get__, Tensor.numpy)  # type: ignore[attr-defined]

_requires_grad = attrgetter("requires_grad")


class Tracker:
    """What the calls in one recording have computed from parameters alone, and where tensors are.

    :param constants: Tensors that do not depend on the inputs.
    :param leaves: The parameters, by name: where they are, and what is differentiated.
    :param spread: The numbers of those calls, in order, whose results have a row for each point (a class token that is
        expanded to a batch): they are not looked at. None: no call is.
    :ivar computed: The tensors that were computed, by name.
    :ivar shapes: Of the results of each call with a parameter; None for those in `spread`.
    """

    def __init__(
        self,
        constants: Iterable[Tensor],
        leaves: Mapping[str, tuple[ParameterView, Tensor]],
        spread: frozenset[int] | None,
    ):
        self.computed: dict[str, Computed] = {}
        self.shapes: list[tuple[torch.Size, ...] | None] = []
        self._leaves = leaves
        self._spread = spread
        # Tensors by their ids, with what is known of them. They are held, so that no other gets that id.
        self._known: dict[int, tuple[Tensor, tuple[int, bool]]] = {}
        self._places = {id(leaf): (view, leaf) for view, leaf in leaves.values()}
        if spread is not None:
            for tensor in (*constants, *(leaf for _, leaf in leaves.values())):
                self._learn(tensor)

    def _learn(self, tensor: Tensor) -> None:
        self._known[id(tensor)] = (tensor, _state(tensor))

    def knows(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call gives what does not depend on the inputs, so that :meth:`add` is to be told of its results."""
        if self._spread is None or not (self._is_known(args) and self._is_known(kwargs)):
            return False
        if function in _LEAKS:
            for tensor in _tensors(args):
                self._known.pop(id(tensor), None)
            return False
        if len(self.shapes) in self._spread and any(map(_requires_grad, _tensors((args, *kwargs.values())))):
            self.shapes.append(None)
            return False
        return True

    def _is_known(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            found = self._known.get(id(value))
            return found is not None and found[1] == _state(value)
        if isinstance(value, (tuple, list)):
            return all(map(self._is_known, value))
        if isinstance(value, dict):
            return all(map(self._is_known, value.values()))
        if isinstance(value, slice):
            return all(map(self._is_known, (value.start, value.stop, value.step)))
        return value is ... or isinstance(value, _PLAIN)

    def add(self, function: Callable, args: tuple, kwargs: dict[str, Any], results: Any) -> None:
        """Takes note of the results of a call that gives what does not depend on the inputs."""
        found = list(_tensors(results))
        if any(map(_requires_grad, _tensors((args, *kwargs.values())))):
            self.shapes.append(tuple(tensor.shape for tensor in found))
        for tensor in found:
            changed = id(tensor) in self._known and not self._is_known(tensor)
            self._learn(tensor)
            if tensor.requires_grad and tensor.is_floating_point() and (changed or self.view(tensor) is None):
                name = f"~{len(self.computed)}"
                operands = (self._operands(args), self._operands(kwargs))
                leaves = {name: self._leaves[name] for name in self._leaf_names(operands)}
                node = self.computed[name] = Computed(name, tensor, function, *operands, leaves)
                self._places[id(tensor)] = (node.view, tensor)

    def view(self, value: Any) -> ParameterView | None:
        """Where a tensor is in a parameter, or in a computed tensor; None if it is anything else."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        place = self._places.get(id(value))
        if place is not None:
            whole, origin = place
            return whole if whole.name in self._leaves or self._is_known(origin) else None
        base = base_of(value)
        if base is None or id(base) not in self._places:
            return None
        whole, origin = self._places[id(base)]
        if whole.name not in self._leaves and not (origin.is_contiguous() and self._is_known(origin)):
            return None
        if value.dtype != origin.dtype or value.is_conj() or value.is_neg() or not _is_plain_view(value, origin):
            return None
        offset = whole.offset + int(value.storage_offset()) - int(origin.storage_offset())
        view = replace(whole, offset=offset, shape=tuple(value.shape), strides=tuple(value.stride()))
        return None if view.overlaps_itself else view

    def _operands(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Operand(value.detach(), self.view(value))
        if isinstance(value, (tuple, list)):
            return tuple(map(self._operands, value))
        if isinstance(value, dict):
            return {name: self._operands(each) for name, each in value.items()}
        return value

    def _leaf_names(self, value: Any) -> dict[str, None]:
        """The parameters that operands depend on."""
        if isinstance(value, Operand):
            if value.view is None:
                return {}
            node = self.computed.get(value.view.name)
            return {value.view.name: None} if node is None else dict.fromkeys(node.leaves)
        names: dict[str, None] = {}
        if isinstance(value, (tuple, list, dict)):
            for each in value.values() if isinstance(value, dict) else value:
                names |= self._leaf_names(each)
        return names


def _state(tensor: Tensor) -> tuple[int, bool]:
    """What a tensor that is known has to stay: unwritten, and with or without a graph. A user's autograd function gives
    what it has computed without one its own."""
    return version_of(tensor), tensor.requires_grad


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _is_plain_view(value: Tensor, base: Tensor) -> bool:
    """Whether autograd takes the tensor for a view of its base, not for the result of a custom function."""
    node = value.grad_fn
    while node is not None and node is not base.grad_fn:
        if isinstance(node, torch.autograd.function.BackwardCFunction) or len(node.next_functions) > 1:
            return False
        node = node.next_functions[0][0] if node.next_functions else None
    return True
