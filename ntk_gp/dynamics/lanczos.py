"""Lanczos' process: what products with a symmetric matrix say of its spectrum, as seen from given vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Lanczos:
    r"""K Vⱼ = Vⱼ Tⱼ + βⱼ vⱼ₊₁ eⱼᵀ for each column of some vectors, which V begins with; V is kept orthonormal.

    Each step is one product with K for all columns together. Where a column's space is exhausted (it is invariant under
    K, up to rounding), its β is zero from there on.

    :param product: V to K V, (N, r) to (N, r), in float64.
    :param start: (N, r), float64.

    :ivar norms: ‖start‖, (r,).
    :ivar steps: m, those done so far.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], start: Tensor):
        self._product = product
        self.norms = start.norm(dim=0)
        self.steps = 0
        self._basis = start.new_empty(start.shape[1], 8, start.shape[0])  # (r, room, N)
        self._basis[:, 0] = (start / self.norms.where(self.norms > 0, 1.0)).mT
        self._diagonal: list[Tensor] = []
        self._beside: list[Tensor] = []  # β₁, …, βₘ, each (r,)
        self._largest = torch.zeros_like(self.norms)  # number of T, for what rounding leaves

    @property
    def basis(self) -> Tensor:
        """V, (r, m, N)."""
        return self._basis[:, : self.steps]

    @property
    def remainder(self) -> Tensor:
        """βₘ, (r,): zero where the space is exhausted."""
        return self._beside[-1]

    @property
    def is_exhausted(self) -> bool:
        return self.steps > 0 and not bool(self.remainder.any())

    def extend(self, steps: int) -> None:
        """So many more steps, or fewer where all is exhausted."""
        for _ in range(steps):
            if self.is_exhausted:
                return
            self._step()

    def _step(self) -> None:
        m = self.steps
        if m + 1 >= self._basis.shape[1]:
            room = self._basis.new_empty(*self._basis.shape[:1], self._basis.shape[1], self._basis.shape[2])
            self._basis = torch.cat([self._basis, room], dim=1)
        current, known = self._basis[:, m], self._basis[:, : m + 1]
        image = self._product(current.mT).mT
        diagonal = (current * image).sum(-1)
        for _ in range(2):  # once leaves what rounding has mixed in
            image = image - (known.mT @ (known @ image.unsqueeze(-1))).squeeze(-1)
        beside = image.norm(dim=-1)
        self._diagonal.append(diagonal)
        for size in (diagonal.abs(), *self._beside[-1:]):
            self._largest = torch.maximum(self._largest, size)
        rounding = 10 * torch.finfo(image.dtype).eps * image.shape[-1] ** 0.5 * self._largest
        beside = beside.where((beside > rounding) & (m + 1 < image.shape[-1]), 0.0)
        self._beside.append(beside)
        self._basis[:, m + 1] = torch.where(
            beside.unsqueeze(-1) > 0, image / beside.where(beside > 0, 1.0).unsqueeze(-1), 0.0
        )
        self.steps += 1

    def tridiagonal(self) -> Tensor:
        """T, (r, m, m)."""
        matrix = torch.diag_embed(torch.stack(self._diagonal, dim=-1))
        if self.steps == 1:
            return matrix
        beside = torch.stack(self._beside[:-1], dim=-1)
        return matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)

    def eigh(self) -> tuple[Tensor, Tensor]:
        """Ritz values, (r, m), in ascending order, and the eigenvectors S of T, (r, m, m)."""
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        return values, vectors
