"""How results are compared with their references, and how the difference is told."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_shape(what: str, actual: Tensor, expected: Tensor) -> None:
    """Raises AssertionError unless the shapes are equal."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: the shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}.")


def assert_close(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises AssertionError unless shapes are equal and the norm of the error is this part of the expected norm."""
    assert_shape(what, actual, expected)
    expected = expected.to(torch.float64)
    error = (actual.to(torch.float64) - expected).norm()
    if not error <= tolerance * expected.norm() + 1e-300:
        raise AssertionError(_message(what, error, expected.norm(), tolerance) + _worst(actual, expected))


def assert_entries_close(what: str, actual: Tensor, expected: Tensor, allowed: Tensor, tolerance: float) -> None:
    """Raises AssertionError unless each entry's error is at most `tolerance` of its entry in `allowed`."""
    error = (actual.to(torch.float64) - expected).abs()
    wrong = ~(error <= tolerance * allowed + 1e-300)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        scale = allowed.expand_as(error)[place]
        raise AssertionError(
            f"{_message(what, error[place], scale, tolerance)} {int(wrong.sum())} of {wrong.numel()} entries are "
            f"wrong, first {place}: {float(actual[place]):.10g}, expected {float(expected[place]):.10g}."
        )


def _message(what: str, error: Tensor, scale: Tensor, tolerance: float) -> str:
    return f"{what}: the relative error is {float(error / scale):.1e}, allowed {tolerance:.0e}."


def _worst(actual: Tensor, expected: Tensor) -> str:
    if not actual.numel():
        return ""
    error = (actual.to(torch.float64) - expected).abs()
    place = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
    return f" The worst entry is {place}: {float(actual[place]):.10g}, expected {float(expected[place]):.10g}."
