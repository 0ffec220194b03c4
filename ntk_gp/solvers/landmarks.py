"""Landmarks: a few training rows that stand for all, by Cholesky with pivots drawn at random.

Epperly, Tropp and Webber, "Embrace rejection: kernel matrix approximation by accelerated randomly pivoted Cholesky",
2024. A row is drawn with a probability proportional to what is left of its prior variance when those before are known:
an NTK's rows are so redundant that a few thousand leave less than the noise of any number of training points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import memory
from .system import System

# Rows drawn at once, at most and at least: for each draw, Jacobian factors that are not held are captured again.
_PROPOSALS = 512
_FEWEST_PROPOSALS = 32
# Training rows, drawn at random, from which posterior variances are estimated while landmarks are still being added.
_CHECKED = 2000


class PivotedCholesky:
    r"""K ≈ Fᵀ F from m landmarks, where K − Fᵀ F is positive semidefinite.

    :param system: K + D, without batches.
    :param limit: The most landmarks that there may be.

    :ivar Tensor factor: F, (m, N); where rows are shared among ranks, the own columns of it.
    :ivar Tensor rows: The landmarks, (m,).
    :ivar Tensor remainder: The diagonal of K − Fᵀ F, (N,).
    :ivar Tensor checked: Some rows, (k,), drawn at random.
    :ivar Tensor checked_variances: About the posterior variances there, (k,).
    """

    def __init__(self, system: System, limit: int):
        self.system = system
        jacobian = system.jacobian
        self.outputs = jacobian.function.num_outputs
        self.remainder = jacobian.diagonal(system.variances)[0].clone()
        system.check_finite(self.remainder)
        self.limit = min(limit, len(self.remainder))
        self.shards = jacobian.shards
        # Row by row: touched as it is filled.
        self._memory = self.remainder.new_empty(self.limit, jacobian.own.num_rows)
        self._blocks: list[Tensor] = []
        self.rows = torch.empty(0, dtype=torch.long, device=self.remainder.device)
        eps = torch.finfo(self.remainder.dtype).eps
        self._rounding = eps * float((self.remainder / system.noise[0]).sum())
        # Kernel values are no better than this, and the inverse of their matrix magnifies it.
        rounding = eps * float(self.remainder.max())
        self._jitter = min(max(1e-6 * float(system.noise.min()), 4 * rounding), 1024 * rounding)
        self._least = 4 * self._jitter  # what a row must have left to become a landmark
        self._generator = torch.Generator(device="cpu").manual_seed(0)
        order = torch.randperm(jacobian.num_points, generator=self._generator, device="cpu").to(self.remainder.device)
        room = int((memory.TRIANGLE.bytes(system.x.device) / 8) ** 0.5)
        points = order[: max(1, min(_CHECKED, room) // self.outputs)]
        self.checked = self._rows_of(points)
        checked = jacobian[points]
        self.checked_variances = self._variances(checked.gram(checked, system.variances)[0])

    @property
    def rank(self) -> int:
        return len(self.rows)

    @property
    def factor(self) -> Tensor:
        return self._memory[: self.rank]

    def columns(self, rows: Tensor) -> Tensor:
        """F at some rows, (m, k), whosever they are."""
        return self.shards.picked(self.factor, rows, 1)

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing but rounding is left."""
        return bool(self.remainder.max() <= self._least)

    @property
    def is_full(self) -> bool:
        """Whether there can be no more landmarks."""
        return self.rank == self.limit or self.is_exhausted

    def grow(self) -> None:
        """One block of landmarks more."""
        points = self._draw()
        accepted, factor = self._accept(self._rows_of(points))
        if not len(accepted):
            return
        start, stop = self.rank, self.rank + len(accepted)
        used = torch.isin(points, accepted // self.outputs)
        block = self._kernel_rows(points[used])[torch.isin(self._rows_of(points[used]), accepted)]
        block.addmm_(self.columns(accepted).mT, self.factor, alpha=-1)
        new = self._memory[start:stop]
        new.copy_(torch.linalg.solve_triangular(factor, block, upper=False))
        self.remainder.sub_(self.shards.gathered(new.square().sum(0), 0)).clamp_min_(0.0)
        self.rows = torch.cat([self.rows, accepted])
        self.remainder[self.rows] = 0.0  # but for the jitter
        self._blocks.append(factor)

    def _rows_of(self, points: Tensor) -> Tensor:
        return (points.unsqueeze(-1) * self.outputs + torch.arange(self.outputs, device=points.device)).flatten()

    def _draw(self) -> Tensor:
        """Points whose rows are proposed as landmarks, (k,): drawn without replacement.

        The more of a point's prior variance is left when the landmarks so far are known, the likelier and the earlier
        it is drawn.
        """
        weights = self.remainder.unflatten(0, (-1, self.outputs)).sum(-1).cpu()
        count = max(1, min(_PROPOSALS, max(_FEWEST_PROPOSALS, self.limit // 16), self.limit) // self.outputs)
        count = min(count, int((weights > 0).sum()))
        # The k largest of log w − log E, with E exponential, are a draw in proportion to the weights w, one by one
        # ("Gumbel's trick"). torch.multinomial does that for up to 2²⁴ points only.
        keys = weights.log() - torch.empty_like(weights).exponential_(generator=self._generator).log()
        return keys.topk(count).indices.to(self.remainder.device)

    def _kernel_rows(self, points: Tensor) -> Tensor:
        """The own entries of the rows of K of some points, (·, N), in memory of its own."""
        jacobian = self.system.jacobian
        return jacobian[points].gram(jacobian.own, self.system.variances)[0]

    def _accept(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the proposed rows become landmarks, (k,), and the Cholesky factor of what is left of them, (k, k).

        All were drawn before any of them was known. Had they been drawn one by one, a row that an earlier one of them
        explains would have come up more rarely. So each is kept with a probability of what is left of it now, over what
        was left when it was drawn: the landmarks are distributed as if drawn one by one ("rejection sampling").
        """
        chosen = self.system.jacobian[rows[:: self.outputs] // self.outputs]
        known = self.columns(rows)
        matrix = (chosen.gram(chosen, self.system.variances)[0] - known.mT @ known).cpu()
        proposed = matrix.diagonal().clone()
        chances = torch.rand(len(rows), generator=self._generator, dtype=matrix.dtype, device="cpu")
        if not self.rank:  # one by one, a draw would reject nearly all: K falls fast at first, and is formed each time
            chances.zero_()
        rest = matrix.clone()
        kept: list[int] = []
        for i in range(len(rows)):
            pivot = float(rest[i, i])
            if pivot <= max(self._least, float(chances[i] * proposed[i])) or self.rank + len(kept) == self.limit:
                continue
            kept.append(i)
            column = rest[i:, i] / pivot**0.5
            rest[i:, i:].addr_(column, column, alpha=-1)
        # Rows with nothing but rounding left, by this more exact figure, are not drawn again.
        self.remainder[rows[(proposed <= self._least).to(rows.device)]] = 0.0
        index = torch.tensor(kept, dtype=torch.long, device="cpu")
        matrix = matrix[index][:, index]
        matrix.diagonal().add_(self._jitter)
        factor = torch.linalg.cholesky(matrix).to(self.remainder)
        return rows[index.to(rows.device)], factor

    def _variances(self, kernel: Tensor) -> Tensor:
        """About the posterior variances of the checked rows: as if they alone were observed, each with less noise, as
        a mean of as many observations as there are rows for each of them.

        :param kernel: Their kernel matrix, (k, k).
        """
        noise = self.system.noise[0].expand(len(self.remainder))[self.checked] * (
            len(self.checked) / len(self.remainder)
        )
        noise = noise.clamp_min(self._jitter)
        matrix = kernel + noise.diag()
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info:
            return noise
        inverse = torch.cholesky_inverse(factor).diagonal()
        return (noise - noise.square() * inverse).clamp_min(torch.finfo(noise.dtype).eps * noise)

    def root(self) -> Tensor:
        """L, (m, m), lower triangular, with L Lᵀ the landmarks' kernel matrix, a jitter added; F is L⁻¹ k(Z, X), for
        landmarks Z and training inputs X."""
        root = self.columns(self.rows).mT.tril(-1)
        start = 0
        for block in self._blocks:
            stop = start + len(block)
            root[start:stop, start:stop] = block
            start = stop
        return root

    def left_if_new(self, rows: Tensor) -> Tensor:
        """What landmarks leave of the prior variance of each of these rows, as if it were that of a new point.

        That is the remainder, but for landmarks: they leave nothing of themselves, and a new point is none. So of a
        landmark it is what the other ones leave.
        """
        remainder = self.remainder[rows]
        which, place = (rows.unsqueeze(-1) == self.rows).nonzero(as_tuple=True)
        unit = remainder.new_zeros(self.rank, len(which))
        unit[place, torch.arange(len(which), device="cpu")] = 1.0
        remainder[which] = 1 / torch.linalg.solve_triangular(self.root(), unit, upper=False).square().sum(0)
        return remainder

    def residual(self) -> float:
        r"""What the landmarks leave of K, in units of the noise, and what rounding adds to it: the mean of those
        eigenvalues of :math:`D^{-1/2} (K - F^\top F) D^{-1/2}` that are not zero by construction."""
        directions = min(len(self.remainder), self.system.num_parameters) - self.rank
        if self.is_exhausted:  # what is left is jitter, in the landmarks' own directions
            directions = self.rank
        return float((self.remainder / self.system.noise[0]).sum()) / max(1, directions) + self._rounding
