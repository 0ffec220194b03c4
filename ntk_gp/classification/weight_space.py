"""Weight space: Λ = I + Φᵀ H Φ, as many rows as there are weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import Shards
from ..jacobian.base import Jacobian
from ..solvers import System
from ..solvers.cholesky import cholesky_solve, factorise_in_place, invert_in_place
from ..solvers.weight_space import add_lower_products
from .function_space import too_large
from .spaces import Curvature, Position, Space


class WeightSpace(Space):
    """Whitened weights u with f − m = Φ u, Φ = J Σ^{1/2}, for kernels that are linear in weights. Holds 3 P² numbers,
    and 2 N·P where there is room for them; takes n·r·P² + P³/3 flops a step.

    :param system: What the kernel is made of.
    """

    def __init__(self, system: System):
        self.system = system
        self.num_coordinates = system.num_parameters
        self._features: Tensor | None = None
        held = self.shards.most_rows(system.num_rows)
        if system.fits(3.0 * self.num_coordinates**2 + 2.0 * held * self.num_coordinates):
            self._features = self._whitened(system.jacobian.own.rows()[0])

    @property
    def shards(self) -> Shards:
        """Which rows are whose."""
        return self.system.jacobian.shards

    def __getstate__(self) -> dict[str, Any]:
        """Without features of which other processes have their rows."""
        return vars(self) if self.shards.is_whole else {**vars(self), "_features": None}

    @staticmethod
    def nbytes_needed(parameters: int) -> float:
        """Λ, its factor, and its inverse."""
        return 8 * 3.0 * parameters**2

    def _whitened(self, rows: Tensor) -> Tensor:
        return rows * self.system.root_variances

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Some of the own points after others, and their rows of Φ, (m·C, P)."""
        own = self.system.jacobian.own
        if self._features is not None:
            yield slice(0, own.num_points), self._features
            return
        for points, rows in own.row_blocks():
            yield points, self._whitened(rows[0])

    def at(self, coordinates: Tensor) -> Position:
        if self._features is not None:
            return Position(coordinates, self.shards.gathered(self._features @ coordinates, 0))
        weights = (self.system.root_variances * coordinates).unsqueeze(0)
        return Position(coordinates, self.system.jacobian.jvp(weights).reshape(-1))

    def transposed(self, vector: Tensor) -> Tensor:
        """Φᵀ v, (N,) to (P,)."""
        if self._features is not None:
            return self.shards.summed(self._features.mT @ self.shards.own(vector, 0))
        return (self.system.root_variances * self.system.jacobian.vjp(vector.reshape(1, 1, -1))).reshape(-1)

    def inner(self, left: Position, right: Position) -> Tensor:
        return left.coordinates @ right.coordinates

    def curved(self, root: Tensor) -> WeightSpaceCurvature:
        return WeightSpaceCurvature(self, root)


class WeightSpaceCurvature(Curvature):
    """By the Cholesky factor M of Λ.

    :param space: The space.
    :param root: R, (n, C, r).
    """

    is_explained = False

    def __init__(self, space: WeightSpace, root: Tensor):
        self.space = space
        self.root = root
        size = space.num_coordinates
        # LAPACK reads one triangle: the lower one of the transpose.
        precision = torch.zeros(size, size, dtype=root.dtype, device=root.device)
        lower = precision.mT.unsqueeze(0)
        own_root = space.shards.own(root.flatten(0, 1), 0).unflatten(0, (-1, root.shape[1]))
        for points, rows in space.blocks():
            own = own_root[points]
            features = (own.mT @ rows.unflatten(0, own.shape[:2])).flatten(0, 1)
            add_lower_products(lower, features.unsqueeze(0))
        space.shards.lower_summed(lower)
        precision.diagonal().add_(1.0)
        diagonal = precision.diagonal().clone()
        self.cholesky, info = factorise_in_place(precision)
        if info.any():
            space.system.check_finite(diagonal)
            raise too_large(float(space.system.jacobian.diagonal(space.system.variances).max()))

    def newton_step(self, position: Position, gradient: Tensor) -> Position:
        return self.space.at(self._solve(self.space.transposed(gradient) - position.coordinates))

    def _solve(self, vector: Tensor) -> Tensor:
        """Λ⁻¹ v, (P,)."""
        return cholesky_solve(self.cholesky, vector.unsqueeze(-1)).squeeze(-1)

    def _curve(self, latent: Tensor) -> Tensor:
        """H f, (N,)."""
        by_point = latent.reshape(*self.root.shape[:2], 1)
        return (self.root @ (self.root.mT @ by_point)).reshape(-1)

    def solve(self, vector: Tensor) -> Tensor:
        return vector - self._curve(self.space.at(self._solve(self.space.transposed(vector))).latent)

    def logdet(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum()

    def covariance_of_points(self) -> Tensor:
        outputs = self.root.shape[1]
        blocks = []
        for _, rows in self.space.blocks():
            half = torch.linalg.solve_triangular(self.cholesky, rows.mT, upper=False).unflatten(-1, (-1, outputs))
            blocks.append(torch.einsum("pnc,pnd->ncd", half, half))
        own = torch.cat(blocks)
        return self.space.shards.gathered(own.flatten(0, 1), 0).unflatten(0, (-1, outputs))

    def evidence_by_prior(self, position: Position, pull: Tensor) -> Tensor:
        """By each group's variance, (1, G): Φᵀ R B⁻¹ Rᵀ Φ = I − Λ⁻¹, Φᵀ a = u and Φᵀ t = Λ⁻¹ Φᵀ s."""
        system, u = self.space.system, position.coordinates
        shrinkage = 1 - invert_in_place(self.cholesky.clone()).diagonal()
        by_parameter = 0.5 * (u * u - shrinkage) + u * self._solve(self.space.transposed(pull))
        return system.jacobian.function.sum_by_group(by_parameter / system.parameter_variances)

    def mean_weights(self, position: Position) -> Tensor:
        return (self.space.system.root_variances * position.coordinates).reshape(-1)

    @property
    def num_normals(self) -> int:
        return self.space.num_coordinates

    def draw_weights(self, normals: Tensor) -> Tensor:
        """Σ^{1/2} M⁻ᵀ ε."""
        whitened = torch.linalg.solve_triangular(self.cholesky.mT, normals.mT, upper=True)
        return whitened.mT * self.space.system.root_variances

    def whitened_size(self) -> int:
        return len(self.cholesky)

    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        rows = jacobian.rows() * self.space.system.root_variances.unsqueeze(-2)
        return torch.linalg.solve_triangular(self.cholesky, rows.mT, upper=False)
