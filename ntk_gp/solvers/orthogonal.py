r"""Orthogonalisation: triangular factors without K + D, whose condition number is that of the features squared.

With whitened features :math:`\Phi = J \Sigma^{1/2}`, both systems are squares of tall matrices,

.. math:: I + \Phi^\top D^{-1} \Phi = R^\top R, \quad Q R = \begin{pmatrix} D^{-1/2} \Phi \\ I \end{pmatrix},
          \qquad
          \Phi \Phi^\top + D = R^\top R, \quad Q R = \begin{pmatrix} \Phi^\top \\ D^{1/2} \end{pmatrix},

and Householder's R has the digits that a Cholesky factor of the square loses (Björck, "Numerical Methods for Least
Squares Problems", 1996, chapter 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..jacobian.base import Jacobian
from .system import System

# Of float64, while a tall matrix is orthogonalised: itself, LAPACK's copy, and Q.
_COPIES = 3
# At least so many rows at once, where memory allows: small ones cost more calls than flops.
_ROWS = 4096


def weight_space_fits(system: System) -> bool:
    """Whether the memory budget has room for :func:`weight_space_factor`."""
    return system.fits(2.0 * _COPIES * system.batch * system.num_parameters**2)


def weight_space_factor(system: System, rhs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """M, (B, P, P), lower triangular, with M Mᵀ = I + Φᵀ D⁻¹ Φ, and M⁻¹ Φᵀ D⁻¹ rhs, (B, P, r): about 4 N P² flops.

    About as many rows at a time as M has: a block's factor takes the place of its rows, and is orthogonalised together
    with the next block. The right-hand sides are columns beside the features: no product with Φᵀ loses their digits.

    :param rhs: (B, N, r); none by default.
    """
    jacobian, shards = system.jacobian.own, system.jacobian.shards
    outputs, size = jacobian.function.num_outputs, system.num_parameters
    block = max(-(-size // outputs), min(jacobian.points_per_block(), _ROWS // outputs))
    rhs = system.x.new_zeros(1, system.num_rows, 0) if rhs is None else rhs
    rhs = shards.own(rhs, 1)
    scale, roots = shards.own(system.noise, 1).rsqrt().unsqueeze(-1), system.root_variances.unsqueeze(-2)
    triangle = rhs.new_zeros(max(system.batch, len(rhs)), 0, size + rhs.shape[-1])
    for i in settings.progress(range(0, jacobian.num_points, block), "Orthogonalising features"):
        here = slice(i * outputs, (i + block) * outputs)
        features = jacobian[slice(i, i + block)].rows() * roots
        triangle = _triangle(triangle, _beside(features, rhs[:, here]) * scale[:, here])
    if not shards.is_whole:  # those of all ranks, one on another: of one shape
        width = triangle.shape[-1]
        triangle = shards.stacked(torch.nn.functional.pad(triangle, (0, 0, 0, width - triangle.shape[-2])), -2)
    prior = torch.eye(size, size + rhs.shape[-1], dtype=rhs.dtype, device=rhs.device)
    triangle = _triangle(triangle, prior.unsqueeze(0))[..., :size, :]
    triangle = triangle * _signs(triangle[..., :size]).unsqueeze(-1)
    return triangle[..., :size].mT, triangle[..., size:]


def _beside(one: Tensor, other: Tensor) -> Tensor:
    batch = max(one.shape[0], other.shape[0])
    return torch.cat([part.expand(batch, -1, -1) for part in (one, other)], dim=-1)


def _triangle(above: Tensor, below: Tensor) -> Tensor:
    """R of two matrices, one on the other."""
    batch = max(above.shape[0], below.shape[0])
    return torch.linalg.qr(torch.cat([part.expand(batch, -1, -1) for part in (above, below)], dim=-2), mode="r").R


def _signs(triangle: Tensor) -> Tensor:
    """What makes the diagonal positive, as a Cholesky factor has it."""
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()
    return signs.where(signs != 0, 1.0)


class FunctionSpaceBasis:
    """Φᵀ above D^{1/2}, orthogonalised: 2 (P + N) N numbers while it is made, half of them kept.

    The part of [φ(x), 0] that is orthogonal to it is the posterior's, however much larger the prior is.

    :param system: K + D.

    :ivar torch.Tensor factor: L, (B, N, N), lower triangular with L Lᵀ = K + D.
    """

    def __init__(self, system: System):
        self.system = system
        features = system.jacobian.rows() * system.root_variances.unsqueeze(-2)
        features = features.expand(system.batch, -1, -1)
        roots = torch.diag_embed(system.noise.sqrt()).expand(system.batch, -1, -1)
        with settings.stage("Orthogonalising features"):
            self._basis, triangle = torch.linalg.qr(torch.cat([features.mT, roots], dim=-2))
        signs = _signs(triangle)
        self.factor = (triangle * signs.unsqueeze(-1)).mT
        self._basis *= signs.unsqueeze(-2)

    @staticmethod
    def fits(system: System) -> bool:
        """Whether the memory budget has room for it."""
        height = system.num_parameters + system.num_rows
        return system.fits(1.0 * _COPIES * system.batch * height * system.num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._basis.nbytes + self.factor.nbytes

    def mean_weights(self, residual: Tensor, alpha: Tensor) -> Tensor:
        """Σ Jᵀ A⁻¹ r for rows r, (B, r, N) to (B, r, P), with one step of refinement.

        :param alpha: A⁻¹ r, as far as it is known.
        """
        weights = self._explained(residual)
        remainder = residual - self.system.jacobian.jvp(weights) - self.system.noise.unsqueeze(-2) * alpha
        return weights + self._explained(remainder)

    def _explained(self, residual: Tensor) -> Tensor:
        rotated = torch.linalg.solve_triangular(self.factor, residual.mT, upper=False)
        size = self.system.num_parameters
        return self.system.root_variances.unsqueeze(-2) * (self._basis[:, :size] @ rotated).mT

    def left_at(self, jacobian: Jacobian) -> Tensor:
        """What is orthogonal, (B, M, P + N); projected out twice, against rounding."""
        features = jacobian.rows() * self.system.root_variances.unsqueeze(-2)
        left = torch.nn.functional.pad(features, (0, self.system.num_rows))
        for _ in range(2):
            left = left - (left @ self._basis) @ self._basis.mT
        return left
