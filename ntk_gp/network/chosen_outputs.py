"""Which of a network's outputs take part, and where they are in a result.

==============  ====================  ======================  =================================================
`output=`       outputs               values at (*b, n, d)    in a kernel
==============  ====================  ======================  =================================================
None            the only one          (*b, n)                 (*b, n, n)
an index        that one              (*b, n)                 (*b, n, n)
`"all"`         all C, together       (*b, n, C)              (*b, n·C, n·C), row = point·C + output
some indices    these k, together     (*b, n, k)              (*b, n·k, n·k), in the order given
`"batch"`       all C, one by one     (*b, C, n)              (*b, C, n, n), one kernel for each
==============  ====================  ======================  =================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

ALL_OUTPUTS = "all"
OUTPUTS_AS_BATCH = "batch"

OutputSelection = int | str | Sequence[int] | None


@dataclass(frozen=True)
class Outputs:
    """What was chosen by an option `output`.

    :param chosen: An index, a tuple of indices, `"all"`, `"batch"`, or None where the network has just one.
    """

    chosen: int | str | tuple[int, ...] | None = None

    @classmethod
    def of(cls, chosen: OutputSelection) -> Outputs:
        """Takes what a user gives.

        :raises TypeError: If it is nothing that there is.
        :raises ValueError: If it is a list that is empty or names one twice.
        """
        if isinstance(chosen, Sequence) and not isinstance(chosen, str):
            return cls(_checked_indices(chosen))
        if chosen is None or chosen in (ALL_OUTPUTS, OUTPUTS_AS_BATCH) or _is_index(chosen):
            return cls(chosen)
        raise TypeError(
            f"output must be an index, a list of indices, '{ALL_OUTPUTS}', '{OUTPUTS_AS_BATCH}', None, the name of a "
            f"part of what the network returns, a function of it, or a tuple of such and one of these; got {chosen!r}."
        )

    @property
    def option(self) -> int | str | list[int] | None:
        """What the user gave."""
        return list(self.chosen) if isinstance(self.chosen, tuple) else self.chosen

    @property
    def is_batch(self) -> bool:
        """Whether each output is a function by itself, in a batch of them."""
        return self.chosen == OUTPUTS_AS_BATCH

    @property
    def are_tasks(self) -> bool:
        """Whether several are taken together, as the tasks of a multitask model."""
        return self.chosen == ALL_OUTPUTS or isinstance(self.chosen, tuple)

    def check(self, size: int, shape: Sequence[int]) -> None:
        """Raises where a network has no such outputs.

        :param size: How many it has.
        :param shape: Of what it returns, for the message.
        """
        indices = self.chosen if isinstance(self.chosen, tuple) else (self.chosen,)
        beyond = [i for i in indices if isinstance(i, int) and not -size <= i < size]
        if beyond:
            raise ValueError(f"output={self.option} is out of range: the network has {size} outputs, 0 to {size - 1}.")
        if isinstance(self.chosen, tuple) and len({i % size for i in self.chosen}) < len(self.chosen):
            raise ValueError(f"output={self.option} names an output twice: the network has {size}.")
        if self.chosen is None and size != 1:
            raise ValueError(
                f"The network has {size} outputs for each input (shape {tuple(shape)} for {shape[0]} inputs), but one "
                f"was expected. Choose it with output=k, or take all of them with output='{ALL_OUTPUTS}' (and a "
                f"multitask model), some with output=[i, j], or one kernel for each with output='{OUTPUTS_AS_BATCH}'."
            )

    def count(self, size: int) -> int:
        """How many of so many outputs take part."""
        known = self.known_count
        return size if known is None else known

    @property
    def known_count(self) -> int | None:
        """How many take part, where that is known without the network."""
        if isinstance(self.chosen, tuple):
            return len(self.chosen)
        return None if self.chosen in (ALL_OUTPUTS, OUTPUTS_AS_BATCH) else 1

    def pick(self, values: Tensor) -> Tensor:
        """Those that take part, of all outputs (n, size): (n, C). By operators that keep rows apart."""
        if isinstance(self.chosen, tuple):
            return torch.cat([values[:, i].unsqueeze(-1) for i in self.chosen], dim=1)
        return values[:, self.chosen].unsqueeze(-1) if isinstance(self.chosen, int) else values

    def shaped(self, values: Tensor, shape: Size) -> Tensor:
        """Values of all points, (*k, N, C), as the table above has them.

        :param shape: That of the points, (*b, n), N in all. As a batch of outputs, the last dimension of b is theirs:
            it is missing or 1, and all have the same inputs, or it is C, and each has its own.
        """
        values = values.reshape(*values.shape[:-2], *shape, values.shape[-1])
        if self.is_batch:
            return _in_batches(values, len(shape))
        return values if self.are_tasks else values.squeeze(-1)

    def unrepeated(self, x: Tensor) -> Tensor:
        """The same inputs once, (n, d) or (*b, 1, n, d), where they are repeated for each output, (*b, C, n, d)."""
        if not self.is_batch or x.dim() < 3 or x.requires_grad or x.shape[-3] == 0:
            return x
        first = x[..., :1, :, :]
        repeated = x.stride(-3) == 0 or x.shape[-3] == 1 or torch.equal(x, first.expand_as(x))
        if not repeated:
            return x
        return first[0] if x.dim() == 3 else first


THE_ONLY_ONE = Outputs()


def _in_batches(values: Tensor, dims: int) -> Tensor:
    """(*k, *b, n, C) as (*k, *b, C, n), with b and n together `dims` dimensions."""
    if dims < 2:
        return values.mT if dims else values
    repeats, outputs = values.shape[-3], values.shape[-1]
    if repeats == 1:
        return values.squeeze(-3).mT
    if repeats == outputs:
        return values.diagonal(dim1=-3, dim2=-1).mT
    raise ValueError(
        f"Got {repeats} batches of inputs for {outputs} outputs, one batch of which is each output's own. Give inputs "
        "(n, d) or (*batch, 1, n, d), the same for all outputs: x.unsqueeze(-3); or (*batch, C, n, d)."
    )


def _checked_indices(chosen: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(chosen)
    if not all(map(_is_index, indices)):
        raise TypeError(f"output must be a list of integers, got {list(indices)!r}.")
    if not indices or len(set(indices)) < len(indices):
        raise ValueError(f"output must name one output or more, each once, got {list(indices)}.")
    return indices


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
