"""Cholesky factors of large matrices K + D, in the memory of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..replacements.onednn import matmul

_LARGE = 1024  # rows; LAPACK's own is as quick below
_PANEL = 384  # columns
_INVERTED = 256  # columns of an inverse that are made at once


def cholesky(matrix: Tensor, noise: Tensor, tolerance: float = 0.0) -> tuple[Tensor, Tensor]:
    """The Cholesky factor L of K + D and LAPACK's `info`, zero where it exists; the matrix may be overwritten.

    On a CPU, a large matrix is factorised panel by panel: all earlier columns are multiplied out of a panel at once, a
    product that reaches the processor's rate, and one triangle is all that is computed: N³/3 flops.

    The first columns explain most of K. From the column on where the rest is small enough, what later columns
    contribute is multiplied in float32, from a copy, at up to four times the rate. With v what is left of the diagonal
    of K, each entry's rounding error is at most eps √(vᵢ vⱼ), so that the factorised matrix differs from K + D by at
    most eps Σ v in its norm. Relative to the smallest noise, that bounds the relative error of every posterior
    variance.

    :param matrix: K + D, float64, (B, N, N).
    :param noise: The diagonal of D, (B or 1, N).
    :param tolerance: What that bound may be; zero for float64 throughout.
    """
    if matrix.device.type != "cpu" or matrix.shape[-1] < _LARGE:
        with settings.stage("Factorisation"):
            return torch.linalg.cholesky_ex(matrix)
    noise = noise.expand(len(matrix), -1)
    info = [_factorise(one, own_noise, tolerance) for one, own_noise in zip(matrix, noise, strict=True)]
    return matrix, torch.tensor(info, device="cpu")


def numbers_held(rows: int, device: torch.device) -> float:
    """Of float64, for a matrix of so many rows and its factor: one triangle may be there in float32 as well."""
    return (1.5 if device.type == "cpu" and rows >= _LARGE else 2.0) * rows**2


def cholesky_solve(factor: Tensor, rhs: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ rhs for a factor L (B, N, N), of which PyTorch's own function of this name would make a copy first."""
    forward = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, forward, upper=True)


def factorise_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L and LAPACK's `info` for a symmetric matrix, (*batch, N, N) and contiguous, whose memory L takes on a CPU."""
    if matrix.device.type != "cpu":
        with settings.stage("Factorisation"):
            return torch.linalg.cholesky_ex(matrix)
    factor = matrix.mT  # LAPACK's order of the entries, and the same matrix
    info = torch.empty(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    with settings.stage("Factorisation"):
        torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, info


def invert_in_place(factor: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹, symmetric to rounding, in the memory of L, (*batch, N, N): 2 N³/3 flops.

    By blocks of columns, from the last to the first: with S the inverse for the rows and columns after a block, and
    W = L₂₁ L₁₁⁻¹, the block's part of the inverse is −S W below the diagonal, and L₁₁⁻ᵀ L₁₁⁻¹ + Wᵀ S W on it. That is
    one large product for each block, where LAPACK's inverse is many small ones, for which threads wait for one another.
    """
    if factor.device.type != "cpu" or factor.shape[-1] <= _INVERTED:
        return factor.copy_(torch.cholesky_inverse(factor))
    with settings.stage("Inverse"):
        for one in factor.view(-1, *factor.shape[-2:]) if factor.dim() != 2 else [factor]:
            _invert(one)
    return factor


def _invert(matrix: Tensor) -> None:
    """Overwrites a factor (N, N) with the inverse of what it is the factor of."""
    for start in reversed(range(0, len(matrix), _INVERTED)):
        here, after = slice(start, start + _INVERTED), slice(start + _INVERTED, None)
        block = matrix[here, here]
        identity = torch.eye(len(block), dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(block, identity, upper=False)
        block.copy_(inverse.mT @ inverse)
        if start + _INVERTED < len(matrix):
            known = matrix[after, here] @ inverse
            below = matrix[after, after] @ known
            block.addmm_(known.mT, below)
            matrix[after, here] = below.neg_()
            matrix[here, after] = below.mT


def positive_factor(matrix: Tensor) -> Tensor | None:
    """The Cholesky factor of a matrix (B, N, N), if it has one."""
    with settings.stage("Factorisation"):
        factor, info = torch.linalg.cholesky_ex(matrix)
    return None if info.any() else factor


def _factorise(matrix: Tensor, noise: Tensor, tolerance: float) -> int:
    """Overwrites a matrix (N, N) with its factor. Returns zero, or k where the leading k×k block is not positive
    definite, as LAPACK's `info`."""
    remainder = matrix.diagonal() - noise  # of the diagonal of K, by the columns so far
    rounding = torch.finfo(torch.float32).eps / float(noise.amin())
    rest: _SinglePrecision | None = None
    for start in settings.progress(range(0, len(matrix), _PANEL), "Factorisation"):
        panel = matrix[start:, start : start + _PANEL]
        size = panel.shape[1]
        if rest is None and rounding * float(remainder[start:].clamp_min(0.0).sum()) <= tolerance:
            rest = _SinglePrecision(start)
        exact = matrix[start:, : start if rest is None else rest.start]
        torch.addmm(panel, exact, exact[:size].mT, alpha=-1, out=panel)
        if rest is not None:
            rest.subtract_from(panel)
        block, info = torch.linalg.cholesky_ex(panel[:size])
        if info:
            return start + int(info)
        panel[:size] = block
        panel[size:] = torch.linalg.solve_triangular(block.mT, panel[size:], upper=True, left=False)
        matrix[:start, start : start + size] = 0.0
        remainder[start:] -= panel.square().sum(-1)
        if rest is not None:
            rest.append(panel)
    return 0


class _SinglePrecision:
    """The columns of a factor from some column on, in float32: panel by panel, each from its own first row on.

    :param start: The first column.
    """

    def __init__(self, start: int):
        self.start = start
        self.panels: list[Tensor] = []

    def append(self, panel: Tensor) -> None:
        self.panels.append(panel.float())

    def subtract_from(self, panel: Tensor) -> None:
        """Subtracts what these columns contribute to the panel that follows them."""
        total: Tensor | None = None
        rows, columns = panel.shape
        for known in self.panels:
            below = known[len(known) - rows :]
            product = matmul(below, below[:columns].mT)
            total = product if total is None else total.add_(product)
        if total is not None:
            panel -= total
