"""Function space: B = I + Rᵀ K R, as many rows as H has ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..jacobian.base import Jacobian
from ..solvers import System
from ..solvers.cholesky import cholesky_solve, factorise_in_place, invert_in_place
from .spaces import Curvature, Position, Space


class FunctionSpace(Space):
    """Coordinates a with f − m = K a, for any kernel. Holds 5 N² numbers at most, and takes (n·r)³/3 flops a step.

    :param matrix: K, (N, N), float64.
    :param system: Where K is a neural tangent kernel's: what it is made of.
    """

    def __init__(self, matrix: Tensor, system: System | None = None):
        self.matrix = matrix
        self.system = system
        self.num_coordinates = len(matrix)

    @staticmethod
    def nbytes_needed(rows: int) -> float:
        """K, B's factor, and what derivatives are made of."""
        return 8 * 5.0 * rows**2

    def at(self, coordinates: Tensor) -> Position:
        return Position(coordinates, self.matrix @ coordinates)

    def inner(self, left: Position, right: Position) -> Tensor:
        return left.coordinates @ right.latent

    def curved(self, root: Tensor) -> FunctionSpaceCurvature:
        return FunctionSpaceCurvature(self, root)


class FunctionSpaceCurvature(Curvature):
    """By the Cholesky factor L of B.

    :param space: The space.
    :param root: R, (n, C, r).
    """

    is_explained = True

    def __init__(self, space: FunctionSpace, root: Tensor):
        self.space = space
        self.root = root
        inner = self._transposed_root(self._transposed_root(space.matrix).mT).contiguous()
        inner.diagonal().add_(1.0)
        self.cholesky, info = factorise_in_place(inner)
        if info.any():
            raise too_large(float(space.matrix.diagonal().max()))

    def _transposed_root(self, columns: Tensor) -> Tensor:
        """Rᵀ v, (*batch, N, k) to (*batch, n·r, k)."""
        by_point = columns.unflatten(-2, self.root.shape[:2])
        return (self.root.mT @ by_point).flatten(-3, -2)

    def _root(self, columns: Tensor) -> Tensor:
        """R v, (*batch, n·r, k) to (*batch, N, k)."""
        by_point = columns.unflatten(-2, (len(self.root), self.root.shape[-1]))
        return (self.root @ by_point).flatten(-3, -2)

    def newton_step(self, position: Position, gradient: Tensor) -> Position:
        # From the residual: where it is small, so are the errors.
        return self.space.at(self.solve(gradient - position.coordinates))

    def solve(self, vector: Tensor) -> Tensor:
        explained = self._transposed_root((self.space.matrix @ vector).unsqueeze(-1))
        return vector - self._root(cholesky_solve(self.cholesky, explained)).squeeze(-1)

    def logdet(self) -> Tensor:
        return 2 * self.cholesky.diagonal().log().sum()

    def covariance_of_points(self) -> Tensor:
        points, outputs = self.root.shape[:2]
        matrix = self.space.matrix
        prior = matrix.view(points, outputs, points, outputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        half = self.explained(matrix).unflatten(-1, (points, outputs))
        return prior - torch.einsum("knc,knd->ncd", half, half)

    def explained(self, cross: Tensor) -> Tensor:
        """L⁻¹ Rᵀ K(X, x) for any kernel, (*batch, n·r, M), from K(X, x), (*batch, N, M)."""
        return torch.linalg.solve_triangular(self.cholesky, self._transposed_root(cross), upper=False)

    def evidence_by_prior(self, position: Position, pull: Tensor) -> Tensor:
        a, t = position.coordinates, self.solve(pull)
        inverse = invert_in_place(self.cholesky.clone(memory_format=torch.contiguous_format))
        cotangent = self._root(self._root(inverse).mT).neg_()
        del inverse
        left = a + t
        cotangent.addr_(left, left).addr_(t, t, alpha=-1.0)  # a aᵀ + t aᵀ + a tᵀ
        return cotangent.mul_(0.5)

    @property
    def _of_weights(self) -> System:
        if self.space.system is None:
            raise TypeError("This kernel has no weights.")
        return self.space.system

    def mean_weights(self, position: Position) -> Tensor:
        return self._of_weights.features(position.coordinates.reshape(1, -1, 1)).reshape(-1)

    @property
    def num_normals(self) -> int:
        return self._of_weights.num_parameters + len(self.cholesky)

    def draw_weights(self, normals: Tensor) -> Tensor:
        """Pathwise: w − Σ Jᵀ R B⁻¹ (Rᵀ J w + ε), for w ~ N(0, Σ) and ε ~ N(0, I)."""
        system = self._of_weights
        whitened, noise = normals.split([system.num_parameters, len(self.cholesky)], dim=-1)
        weights = whitened * system.root_variances
        values = self._transposed_root(system.jacobian.jvp(weights.unsqueeze(0))[0].mT)
        explained = self._root(cholesky_solve(self.cholesky, values + noise.mT))
        return weights - system.features(explained.unsqueeze(0))[0].mT

    def whitened_size(self) -> int:
        return len(self.cholesky)

    def whitened_cross(self, jacobian: Jacobian) -> Tensor:
        return self.explained(self._of_weights.cross(jacobian))


def too_large(largest: float) -> RuntimeError:
    """That B or Λ, of which no eigenvalue is below one, has lost its positive definiteness.

    :param largest: The largest prior variance.
    """
    return RuntimeError(
        f"The prior variances of the latent function, up to {largest:.1e} at the training inputs, are so large that "
        "Laplace's approximation has no factor in float64, or the kernel matrix is not positive semidefinite. Give the "
        "kernel a smaller outputscale, or a constraint on it; logits vary by tens, not by millions."
    )
