"""How rows of numbers become what a network is called with: reshaped, whole numbers, several arguments in one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_tensor

InputShape = Iterable[int] | Mapping[str, Iterable[int]] | None
InputDtype = torch.dtype | Mapping[str, torch.dtype] | None


@dataclass(frozen=True)
class Field:
    """One argument of a network.

    :param name: Its keyword; None for the only one there is, which is passed by its place.
    :param shape: Of one input; None for rows as they come.
    :param dtype: That of whole numbers or booleans which the network wants; None for that of its parameters.
    """

    name: str | None = None
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def width(self) -> int:
        """How many numbers of a row it takes."""
        return math.prod(self.shape or ())

    def argument(self, columns: Tensor, dtype: torch.dtype | None) -> Tensor:
        """What the network is given for columns (n, width) of the rows: (n, *shape).

        :param dtype: That of the network, where it is not that of the rows; it never touches whole numbers.
        """
        wanted = self.dtype or dtype
        columns = columns if wanted is None else columns.to(wanted)
        return columns if self.shape is None else columns.reshape(columns.shape[0], *self.shape)

    def check(self, columns: Tensor) -> None:
        """Raises where these are no whole numbers, or were too large for their dtype to hold, though the network wants
        such."""
        if self.dtype in (None, torch.bool) or not columns.numel():
            return
        what = f"input_dtype={self.dtype}" + (f" for {self.name!r}" if self.name else "")
        if not bool((columns == columns.trunc()).all()):
            bad = columns[columns != columns.trunc()][0].item()
            raise ValueError(f"{what} wants whole numbers, got {bad}.")
        low, high = columns.min().item(), columns.max().item()
        _check_exact(max(-low, high), columns.dtype, what)
        limits = torch.iinfo(self.dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(f"{what} holds {limits.min} to {limits.max}, got {low:.0f} to {high:.0f}.")


@dataclass(frozen=True)
class Inputs:
    """What a network is called with, and how it is made of the rows (n, d) that GPyTorch's models have.

    :param fields: Its arguments, side by side in a row in this order.
    """

    fields: tuple[Field, ...] = (Field(),)

    @classmethod
    def of(cls, input_shape: InputShape, input_dtype: InputDtype) -> Inputs:
        """Those that a user's options stand for.

        :raises TypeError: If they are of other types.
        :raises ValueError: If a dtype is no integer or boolean one, or names an argument that there is not.
        """
        if not isinstance(input_shape, Mapping):
            shape = None if input_shape is None else tuple(int(size) for size in input_shape)
            if isinstance(input_dtype, Mapping):
                raise TypeError("input_dtype by name needs input_shape by name, e.g. input_shape={'ids': (128,)}.")
            return cls((Field(None, shape, _checked_dtype(input_dtype)),))
        dtypes = input_dtype if isinstance(input_dtype, Mapping) else dict.fromkeys(input_shape, input_dtype)
        if not input_shape or dtypes.keys() - input_shape.keys():
            raise ValueError(
                f"input_shape has {list(input_shape)}, input_dtype {list(dtypes)}: a shape is needed for each name."
            )
        return cls(
            tuple(
                Field(name, tuple(int(size) for size in shape), _checked_dtype(dtypes.get(name)))
                for name, shape in input_shape.items()
            )
        )

    @property
    def shape(self) -> Any:
        """`input_shape` as a user gives it."""
        if self._is_one:
            return self.fields[0].shape
        return {str(field.name): field.shape for field in self.fields}

    @property
    def _is_one(self) -> bool:
        return self.fields[0].name is None

    @property
    def width(self) -> int | None:
        """d, or None where any width will do."""
        return None if self.fields[0].shape is None else sum(field.width for field in self.fields)

    @property
    def are_whole(self) -> bool:
        """Whether all of them are whole numbers, which nothing can be differentiated with respect to."""
        return all(field.dtype is not None for field in self.fields)

    def arguments(self, x: Tensor, dtype: torch.dtype | None = None) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Positional and keyword arguments for rows x (n, d).

        :param dtype: That of the network, where it is not that of x.
        """
        if self._is_one:
            return (self.fields[0].argument(x, dtype),), {}
        return (), {str(field.name): field.argument(columns, dtype) for field, columns in self._split(x)}

    def _split(self, x: Tensor) -> Iterable[tuple[Field, Tensor]]:
        if self._is_one:
            return [(self.fields[0], x)]
        return zip(self.fields, x.split([field.width for field in self.fields], dim=-1), strict=True)

    def flattened(self, x: Tensor) -> Tensor:
        """Inputs of one argument's shape, (*batch, n, *shape), as rows (*batch, n, d); others as they are."""
        shape = self.fields[0].shape or ()
        is_shaped = self._is_one and len(shape) > 1 and x.dim() > len(shape) and tuple(x.shape[-len(shape) :]) == shape
        return x.flatten(-len(shape)) if is_shaped and x.shape[-1] != math.prod(shape) else x

    def carried(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Integers in a floating-point dtype that holds each of them exactly; other inputs as they are.

        :raises TypeError: Where the network wants no integers.
        :raises ValueError: Where that dtype does not hold them.
        """
        if x.is_floating_point():
            return x
        if x.is_complex() or all(field.dtype is None for field in self.fields):
            raise TypeError(
                f"Expected inputs of a floating-point dtype, got {x.dtype}. Cast them, e.g. with x.float(), or say "
                "input_dtype=torch.long where the network wants integers."
            )
        return _exactly(x, dtype, "The inputs")

    def check_width(self, x: Tensor) -> None:
        """Raises where rows are not as wide as the arguments together."""
        if self.width is None or x.shape[-1] == self.width:
            return
        raise ValueError(
            f"Got inputs of width {x.shape[-1]} (shape {tuple(x.shape)}), but input_shape={self.shape} needs "
            f"{self.width} features. "
            + (
                "Flatten each input to one row, e.g. x.flatten(1) for the whole model (GPyTorch takes all but the last "
                "two dimensions for batches), or change input_shape."
                if self._is_one
                else "ntk_gp.pack(input_shape, {...}) makes such rows."
            )
        )

    def check(self, x: Tensor) -> None:
        """Raises where the network wants whole numbers and is given others."""
        for field, columns in self._split(x):
            field.check(columns)


def pack(
    input_shape: Mapping[str, Iterable[int]], tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Tensor:
    """Several arguments of a network side by side in one row for each input, as GPyTorch's models want their inputs.

    With the same `input_shape`, :class:`~ntk_gp.NTKKernel` and :class:`~ntk_gp.NetworkMean` call the network with these
    tensors by name. Whole numbers are carried exactly, or refused.

    :param input_shape: The shape of one input of each argument, e.g. `{"ids": (128,), "mask": (128,)}`.
    :param tensors: Each argument by name, (*batch, n, *shape), what a tokenizer returns for instance; others than those
        in `input_shape` are refused.
    :param dtype: Of the rows. (Default: the widest floating-point dtype among the tensors, or torch's default.)
    :return: (*batch, n, d), on the tensors' device.

    :raises ValueError: If names or shapes differ, or a whole number is too large for the dtype.

    Example:
        >>> shapes = {"ids": (3,), "mask": (3,)}
        >>> pack(shapes, {"ids": torch.tensor([[5, 7, 0]]), "mask": torch.tensor([[True, True, False]])})
        tensor([[5., 7., 0., 1., 1., 0.]])
    """
    inputs = Inputs.of(input_shape, None)
    if set(tensors) != set(input_shape):
        raise ValueError(f"Expected the tensors {', '.join(input_shape)}, got {', '.join(tensors)}.")
    floating = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    for other in floating:
        dtype = other if dtype is None else torch.promote_types(dtype, other)
    dtype = dtype or torch.get_default_dtype()
    return torch.cat([_packed(tensors[str(field.name)], field, dtype) for field in inputs.fields], dim=-1)


def _packed(tensor: Tensor, field: Field, dtype: torch.dtype) -> Tensor:
    check_tensor(tensor)
    shape = field.shape or ()
    if tensor.dim() <= len(shape) or tensor.shape[tensor.dim() - len(shape) :] != shape:
        raise ValueError(
            f"Expected {field.name!r} of shape (n, {', '.join(map(str, shape))}), got {tuple(tensor.shape)}."
        )
    rows = tensor.reshape(*tensor.shape[: tensor.dim() - len(shape)], field.width)
    return rows.to(dtype) if rows.is_floating_point() else _exactly(rows, dtype, repr(field.name))


def _exactly(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    if x.dtype != torch.bool and x.numel() and not torch.compiler.is_compiling():
        _check_exact(max(-int(x.min()), int(x.max())), dtype, what)
    return x.to(dtype)


def _check_exact(largest: float, dtype: torch.dtype, what: str) -> None:
    exact = 2 / torch.finfo(dtype).eps  # beyond, not every whole number is one of the dtype's
    if largest > exact:
        raise ValueError(
            f"{what}: {dtype} holds whole numbers exactly up to {exact:.0f}, got {largest:.0f}. Use torch.float64 for "
            "inputs and model."
        )


def _checked_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"input_dtype must be a torch.dtype such as torch.long, got {dtype!r}.")
    if dtype.is_floating_point or dtype.is_complex:
        raise ValueError(
            f"input_dtype={dtype}: inputs of real numbers have the dtype that the model computes in. Leave it out, or "
            "name an integer or boolean one."
        )
    return dtype
