"""What was chosen of a network, and what is known of it by looking at its module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from .chosen_outputs import THE_ONLY_ONE, Outputs
from .inputs import InputDtype, Inputs, InputShape
from .parameter_sets import GroupBy, ParameterSets
from .returned import Output, Step, check_steps, way_and_columns


@dataclass(frozen=True)
class Specification:
    """Which function a network is taken for: its parameters, its inputs and its outputs.

    :param parameter_names: The selected parameters by their canonical names, in the network's order.
    :param group_labels: For each of these, the group it belongs to.
    :param inputs: What it is called with, made of rows.
    :param steps: The way from what it returns to the tensor whose columns are the outputs.
    :param outputs: Which of these take part.
    :param is_recurrent: Whether some layers are recurrent ones, which have switches of their own.
    :param written: The tensors that calls are known to write to.
    :param kept: Attributes that are tensors and neither parameters nor buffers: constants, or so it seems.
    :param left_out: Those that were computed from the parameters, and are not in the snapshot.
    """

    parameter_names: tuple[str, ...]
    group_labels: tuple[str, ...]
    inputs: Inputs = field(default_factory=Inputs)
    steps: tuple[Step, ...] = ()
    outputs: Outputs = THE_ONLY_ONE
    is_recurrent: bool = False
    written: frozenset[str] = frozenset()
    kept: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups of parameters, in the order in which they appear."""
        return tuple(dict.fromkeys(self.group_labels))

    @property
    def group_indices(self) -> tuple[int, ...]:
        """For each parameter, the number of its group."""
        names = self.group_names
        return tuple(names.index(label) for label in self.group_labels)


def specify(
    network: nn.Module,
    aliases: Mapping[str, str],
    names: Iterable[str],
    sets: ParameterSets,
    *,
    input_shape: InputShape,
    input_dtype: InputDtype,
    output: Output,
    group_by: GroupBy,
    attributes: tuple[list[str], list[str]],
) -> Specification:
    """The specification of a module.

    :param aliases: Every name of each of its tensors, and the canonical one.
    :param names: The selected parameters, by any of their names.
    :param sets: What patterns stand for.
    :param attributes: Those that are kept, and those that are left out.
    """
    steps, columns = way_and_columns(output)
    parameter_names = tuple(dict.fromkeys(aliases[name] for name in names))
    return Specification(
        parameter_names=parameter_names,
        group_labels=sets.groups(parameter_names, group_by),
        inputs=Inputs.of(input_shape, input_dtype),
        steps=steps,
        outputs=Outputs.of(columns),
        is_recurrent=any(isinstance(module, nn.RNNBase) for module in network.modules()),
        written=_renormalised_embeddings(network, aliases),
        kept=tuple(attributes[0]),
        left_out=tuple(attributes[1]),
    )


def check_output_argument(output: object) -> None:
    """Raises where an option `output` is none that there is."""
    steps, columns = way_and_columns(output)
    check_steps(steps)
    Outputs.of(columns)


def _renormalised_embeddings(network: nn.Module, aliases: Mapping[str, str]) -> frozenset[str]:
    """The weights that lookups write to: rows longer than `max_norm` are shortened in place."""
    return frozenset(
        aliases[f"{name}.weight".lstrip(".")]
        for name, module in network.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    )
