"""The eigenvalues of K: what makes every step of fitting the noise and one scale cost O(N)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..jacobian.products import TransposedJacobianProduct
from .rounding import MENDABLE
from .system import System
from .weight_space import feature_moment


class Spectrum:
    r"""Eigenvalues and eigenvectors of a kernel matrix K with unit variances, or of :math:`D^{-1/2} K D^{-1/2}`.

    K does not change while the noise and the outputscale s are fitted:
    :math:`r^\top (sK + \sigma^2 I)^{-1} r = \sum_i (q_i^\top r)^2 / (s\lambda_i + \sigma^2)`, and the log-determinant
    is as short. Where P < N, the eigenvectors are those of the P×P matrix :math:`J^\top J`, and what they leave of r
    has eigenvalue zero.

    :param system: The inputs, with unit prior variances; its noise scales the rows.
    """

    def __init__(self, system: System):
        self.system = system
        self.scale = system.noise.rsqrt()
        self.in_weight_space = system.num_parameters < system.num_rows
        if self.in_weight_space:
            self._decompose_features()
        else:
            self._decompose_gram()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def _decompose_gram(self) -> None:
        system = self.system
        gram = system.linearization.gram(system.jacobian, system.jacobian, system.variances)
        system.check_finite(gram.diagonal(dim1=-2, dim2=-1))
        with settings.stage("Eigenvalues"):
            values, self._vectors = torch.linalg.eigh(self.scale.unsqueeze(-1) * gram * self.scale.unsqueeze(-2))
        self.values = values.clamp_min(0.0)

    def _decompose_features(self) -> None:
        moment = feature_moment(self.system)
        with settings.stage("Eigenvalues"):
            values, vectors = torch.linalg.eigh(moment)
        # Directions that rounding alone fills belong to the null space.
        floor = values[..., -1:].clamp_min(0.0) * values.shape[-1] * torch.finfo(values.dtype).eps
        seen = values > floor
        self.values = torch.where(seen, values, 0.0)
        self._vectors = vectors * torch.where(seen, values.where(seen, 1.0).rsqrt(), 0.0).unsqueeze(-2)

    def resolves(self, scale: Tensor, noise: Tensor) -> bool:
        """Whether the noise is above what rounding leaves of the smallest eigenvalues of sK, for s and σ² of
        :meth:`inv_quad_logdet`; below, the features have to be orthogonalised."""
        rounding = torch.finfo(self.values.dtype).eps * self.values.sum(-1, keepdim=True) * scale.detach()
        return bool((rounding <= MENDABLE.get(self.system.dtype, MENDABLE[torch.float32]) * noise.detach()).all())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._vectors.nbytes + self.values.nbytes

    def _coordinates(self, residual: Tensor) -> Tensor:
        """Qᵀ residual, (B, k, r)."""
        if not self.in_weight_space:
            return self._vectors.mT @ residual
        scaled = (self.scale.unsqueeze(-1) * residual).mT
        return self._vectors.mT @ TransposedJacobianProduct.apply(scaled, self.system.jacobian).mT

    def _squares(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The squared coordinates of a whitened r, (B, k, r), and what is left of its square, (B, r)."""
        if self._last is not None and not residual.requires_grad and torch.equal(self._last[0], residual):
            return self._last[1:]
        squares = self._coordinates(residual).square()
        rest = (residual.square().sum(-2) - squares.sum(-2)).clamp_min(0.0)
        if not residual.requires_grad:
            self._last = (residual.clone(), squares, rest)
        return squares, rest

    def inv_quad_logdet(self, residual: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """rᵀ(sK + σ²D)⁻¹r, (B, r), and log |sK + σ²D|, (B,), where D is the noise of the system this was made from.

        :param residual: r, (B, N, r).
        :param scale: s, (B, 1).
        :param noise: σ², (B, 1).
        """
        squares, rest = self._squares(self.scale.unsqueeze(-1) * residual)
        spectrum = scale * self.values + noise
        inv_quad = (squares / spectrum.unsqueeze(-1)).sum(-2) + rest / noise
        null_dimensions = self.system.num_rows - self.values.shape[-1]
        logdet = spectrum.log().sum(-1) + null_dimensions * noise.squeeze(-1).log()
        return inv_quad, logdet + self.system.noise.log().sum(-1)
