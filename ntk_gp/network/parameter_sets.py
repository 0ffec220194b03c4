"""Sets of a network's parameters that have names of their own beside shell patterns, and groups given by patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from .._compat import COMPILED, parameters_in

LAST_LAYER = "last_layer"
NORM = "norm"
BIAS = "bias"

# The group of what no pattern matches.
OTHER = "other"

# The module under which `torch.nn.utils.parametrize` keeps what a parameter is made of.
PARAMETRIZATIONS = "parametrizations"

# BatchNorm2d, LayerNorm, LlamaRMSNorm, GroupNorm1 and so on, by the name of a class or of one that it inherits from.
_NORM_CLASS = re.compile(r"Norm(\dd?)?$")

_IN_WORDS = {
    LAST_LAYER: 'no layer within it that has a weight (parameters="*" takes all of it)',
    NORM: "no normalisation with affine parameters",
    BIAS: "no biases",
}

GroupBy = Callable[[str], str] | Mapping[str, str] | None


class ParameterSets:
    """What names and patterns stand for in a network.

    =============  ================================================================================================
    `last_layer`   all that is in the last layer with a weight, see :mod:`.last_layer`
    `norm`         the parameters of BatchNorm, LayerNorm, RMSNorm and the like themselves, whatever is within them
    `bias`         those with "bias" in the last part of their names: `conv.bias`, `attention.in_proj_bias`
    =============  ================================================================================================

    These three are exact strings; everything else is a shell pattern for whole names.

    :param network: The eager module.
    :param names: Its parameters, by all of their names.
    :param last_layer: The name of the layer that is the last.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], last_layer: str | None):
        self.last_layer = last_layer
        self._names = tuple(names)
        self._norms = _norms(network)

    def matching(self, pattern: str) -> list[str]:
        """The names that a pattern, or the name of a set, stands for, in the network's order."""
        if pattern == LAST_LAYER:
            return [] if self.last_layer is None else within(self.last_layer, self._names)
        if pattern == NORM:
            return [name for name in self._names if _place(name)[0] in self._norms]
        if pattern == BIAS:
            return [name for name in self._names if "bias" in _place(name)[1]]
        return [name for name in self._names if fnmatchcase(name, pattern)]

    @staticmethod
    def are_named(patterns: Iterable[str]) -> bool:
        """Whether the name of a set is among them."""
        return any(pattern in _IN_WORDS for pattern in patterns)

    @staticmethod
    def missing(patterns: Iterable[str]) -> str:
        """A sentence on the sets among these, which match nothing."""
        parts = [_IN_WORDS[pattern] for pattern in patterns if pattern in _IN_WORDS]
        return f" It has {', and '.join(parts)}." if parts else ""

    def groups(self, selected: Iterable[str], group_by: GroupBy) -> tuple[str, ...]:
        """The group of each of the selected parameters, in their order.

        :raises ValueError: If a pattern decides for none of them.
        """
        selected = tuple(selected)
        if group_by is None:
            return ("all",) * len(selected)
        if not isinstance(group_by, Mapping):
            return tuple(group_by(name) for name in selected)
        matching = {pattern: set(self.matching(pattern)) for pattern in group_by}
        first = {name: next((p for p, names in matching.items() if name in names), None) for name in selected}
        idle = [pattern for pattern in group_by if pattern not in first.values()]
        if idle:
            taken = [pattern for pattern in idle if matching[pattern] & set(selected)]
            why = " (patterns before them take all that they match)" if taken == idle else ""
            raise ValueError(
                f"The patterns {idle} of variance_groups decide for no selected parameter{why}. The first pattern that "
                f"matches decides. The selected parameters are: {', '.join(selected)}."
            )
        return tuple(OTHER if pattern is None else group_by[pattern] for pattern in first.values())


def within(layer: str, names: Iterable[str]) -> list[str]:
    """The parameters in a layer, or in layers within it."""
    return [name for name in names if name.startswith(f"{layer}.")]


def layers_with_weights(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that have a weight, the network perhaps among them, with their names, as they were registered."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if _has_weight(module) and PARAMETRIZATIONS not in name.split(".")
    ]


def _has_weight(module: nn.Module) -> bool:
    """Whether a module itself has a parameter of two dimensions or more, or one that such are made of."""
    kept = getattr(module, PARAMETRIZATIONS, None)
    inside = kept.parameters() if isinstance(kept, nn.Module) else ()
    return any(p is not None and p.dim() > 1 for p in (*parameters_in(module).values(), *inside))


def last_registered(network: nn.Module) -> str | None:
    """The name of the module within a network that has a weight and was registered last."""
    layers = [name for name, _ in layers_with_weights(network) if name]
    return layers[-1].replace(f"{COMPILED}.", "") if layers else None


def _place(name: str) -> tuple[str, str]:
    """The module that has a parameter, and its name there, also where it is parametrised."""
    module, found, rest = name.rpartition(f"{PARAMETRIZATIONS}.")
    if found:
        return module.removesuffix("."), rest.split(".")[0]
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _norms(network: nn.Module) -> set[str]:
    return {
        name.replace(f"{COMPILED}.", "")
        for name, module in network.named_modules()
        if any(_NORM_CLASS.search(kind.__name__) for kind in type(module).__mro__)
    }
