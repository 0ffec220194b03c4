"""The first look at a network: whether it can be evaluated at some inputs, in which precision, and row by row."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Protocol

import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .function import Findings, NetworkFunction
from .probe import probe
from .rows import check_rows_are_independent, some_rows

# Rows that a network is tried with.
FEW = 16
# The precisions in which one is tried that does not compute in that of its inputs.
_PRECISIONS = (torch.float32, torch.float64)


class Conversion(Protocol):
    """Makes a network's function in a dtype, and in a precision of its own where that is given."""

    def __call__(self, dtype: torch.dtype, inner_dtype: torch.dtype | None = None) -> NetworkFunction: ...


class Trial:
    """What trying a network at some rows (n, d) has found; raises where it cannot be linearised there.

    Up to 16 different rows are looked at for whether each is treated by itself, in float64 where the network has that:
    a dependence stands out from rounding there.

    :param function: The network in the dtype of the rows.
    :param rows: The inputs, (n, d); none of them, and only the number of outputs and the like are found out.
    :param convert: Makes its function in other precisions.

    :ivar function: The function, or one in a precision of its own where the network computes in no other.
    :ivar exact_findings: What its function in float64 has learned, if that was tried.
    """

    def __init__(self, function: NetworkFunction, rows: Tensor, convert: Conversion):
        self.exact_findings: Findings | None = None
        self._convert = convert
        self.function = self._probed(function, rows[:FEW] if len(rows) else rows.new_zeros(1, rows.shape[1]))
        if len(rows):
            with self.function.tracing(), torch.no_grad():
                some = some_rows(rows, FEW, partial(self.function, self.function.parameters))
            check_rows_are_independent(self._most_exact(some), some)

    def _probed(self, function: NetworkFunction, rows: Tensor) -> NetworkFunction:
        try:
            probe(function, rows)
        except (ValueError, TypeError) as error:
            own = None if function.inner_dtype is not None else self._in_its_own_precision(rows)
            if own is None or own.inner_dtype is None:
                raise
            if torch.promote_types(own.inner_dtype, rows.dtype) != own.inner_dtype:
                warnings.warn(_less_precise(own.inner_dtype, rows.dtype, error), NumericalWarning, stacklevel=2)
            function = own
        if function.unreached and function.specification.kept:
            warnings.warn(
                f"The network's output does not depend on its parameters {', '.join(sorted(function.unreached))}, and "
                f"it holds tensors that are neither parameters nor buffers: {', '.join(function.specification.kept)}. "
                "If these were computed from the parameters, delete them before making a kernel or mean of the "
                "network.",
                UserWarning,
                stacklevel=2,
            )
        return function

    def _in_its_own_precision(self, rows: Tensor) -> NetworkFunction | None:
        for inner_dtype in _PRECISIONS:
            if inner_dtype != rows.dtype:
                function = self._convert(rows.dtype, inner_dtype)
                try:
                    probe(function, rows)
                except (ValueError, TypeError):
                    continue
                return function
        return None

    def _most_exact(self, rows: Tensor) -> NetworkFunction:
        """The function in float64, if network and device have it."""
        if self.function.inner_dtype is not None or rows.dtype == torch.float64:
            return self.function
        exact = self._convert(torch.float64)
        try:
            self.exact_findings = probe(exact, rows.double())
        except (RuntimeError, TypeError, ValueError):
            return self.function
        return exact


def _less_precise(inner: torch.dtype, asked: torch.dtype, error: Exception) -> str:
    return (
        f"The network computes in {inner} whatever it is given: at {asked}, {error} Its Jacobian then has the rounding "
        f"errors of {inner}, about {10 * torch.finfo(inner).eps:.0e} of itself, and posteriors lose digits where the "
        "noise is that small a part of the kernel. To have it exact, create tensors in forward with dtype=x.dtype and "
        "device=x.device."
    )
