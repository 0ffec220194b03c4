"""The eigenvalues of K: what makes every step of fitting the noise and one scale cost O(N).

With further groups of a few parameters, q together, each step is Woodbury's formula in the eigenvectors' coordinates:
O(N q²).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import settings
from ..jacobian.products import TransposedJacobianProduct
from ..network import NetworkFunction
from .rounding import MENDABLE
from .system import System
from .weight_space import feature_moment

# Parameters of small groups, together: from 64 on a step's q×q system, and K's coordinates of q columns, cost more than
# what they save.
_MOST_COLUMNS = 64


class Spectrum:
    r"""Eigenvalues and eigenvectors of one group's kernel matrix K with unit variance, or of
    :math:`D^{-1/2} K D^{-1/2}`.

    K does not change while the noise and the outputscale s are fitted:
    :math:`r^\top (sK + \sigma^2 I)^{-1} r = \sum_i (q_i^\top r)^2 / (s\lambda_i + \sigma^2)`, and the log-determinant
    is as short. Where P < N, the eigenvectors are those of the P×P matrix :math:`J^\top J`, and what they leave of r
    has eigenvalue zero.

    :param system: The inputs, with prior variances that are one for a group and zero for others; its noise scales the
        rows.
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

    def resolves(self, scale: Tensor, noise: Tensor, beside: float | Tensor = 0.0) -> bool:
        """Whether the noise is above what rounding leaves of the smallest eigenvalues of sK, for s and σ² of
        :meth:`inv_quad_logdet`; below, the features have to be orthogonalised.

        :param beside: The trace of what is added to sK, (B, 1), whitened.
        """
        rounding = torch.finfo(self.values.dtype).eps * (self.values.sum(-1, keepdim=True) * scale.detach() + beside)
        return bool((rounding <= MENDABLE.get(self.system.dtype, MENDABLE[torch.float32]) * noise.detach()).all())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._vectors.nbytes + self.values.nbytes

    def coordinates(self, whitened: Tensor) -> Tensor:
        """Qᵀ v for columns v that are whitened, (B, N, r) to (B, k, r)."""
        if not self.in_weight_space:
            return self._vectors.mT @ whitened
        scaled = (self.scale.unsqueeze(-1) * whitened).mT
        features = TransposedJacobianProduct.apply(scaled, self.system.jacobian).mT
        return self._vectors.mT @ (self.system.root_variances.unsqueeze(-1) * features)

    def _squares(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The squared coordinates of a whitened r, (B, k, r), and what is left of its square, (B, r)."""
        if self._last is not None and not residual.requires_grad and torch.equal(self._last[0], residual):
            return self._last[1:]
        squares = self.coordinates(residual).square()
        rest = (residual.square().sum(-2) - squares.sum(-2)).clamp_min(0.0)
        if not self.in_weight_space:  # nothing is: that would be rounding
            rest = torch.zeros_like(rest)
        if not residual.requires_grad:
            self._last = (residual.clone(), squares, rest)
        return squares, rest

    def logdet(self, scale: Tensor, noise: Tensor) -> Tensor:
        """log |sK + σ²D|, (B,)."""
        null_dimensions = self.system.num_rows - self.values.shape[-1]
        logdet = (scale * self.values + noise).log().sum(-1) + null_dimensions * noise.squeeze(-1).log()
        return logdet + self.system.noise.log().sum(-1)

    def inv_quad_logdet(self, residual: Tensor, scale: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """rᵀ(sK + σ²D)⁻¹r, (B, r), and log |sK + σ²D|, (B,), where D is the noise of the system this was made from.

        :param residual: r, (B, N, r).
        :param scale: s, (B, 1).
        :param noise: σ², (B, 1).
        """
        squares, rest = self._squares(self.scale.unsqueeze(-1) * residual)
        spectrum = scale * self.values + noise
        inv_quad = (squares / spectrum.unsqueeze(-1)).sum(-2) + rest / noise
        return inv_quad, self.logdet(scale, noise)


class Groups:
    """The parameters of the largest group, and the others where they are few.

    :param function: What says which parameter is in which group.

    :ivar large: The number of the largest group.
    :ivar num_small: q, how many parameters the other groups have together.
    """

    def __init__(self, function: NetworkFunction):
        sizes = [0] * function.num_groups
        for size, group in zip(function.sizes, function.group_indices, strict=True):
            sizes[group] += size
        self.large = max(range(len(sizes)), key=sizes.__getitem__)
        self.num_small = sum(sizes) - sizes[self.large]
        self._function = function

    @property
    def are_few(self) -> bool:
        """Whether those in other groups are so few that eigenvalues of the largest one's matrix serve all."""
        return self.num_small <= _MOST_COLUMNS

    def small(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The numbers of the parameters in other groups, and the group of each, (q,)."""
        function = self._function
        sizes = torch.tensor(function.sizes, device=device)
        groups = torch.tensor(function.group_indices, device=device).repeat_interleave(sizes)
        index = (groups != self.large).nonzero().squeeze(-1)
        return index, groups[index]


class SpectrumBeside:
    r"""A spectrum with the columns U of small groups beside it: A = sK + σ²D + U S Uᵀ.

    With :math:`B = s Q \Lambda Q^\top + \sigma^2 I` whitened, :math:`M = U^\top B^{-1} U`,
    :math:`z = (I + M S)^{-1} U^\top B^{-1} r` and :math:`e = r - U S z`,

    .. math:: r^\top A^{-1} r = e^\top B^{-1} e + z^\top S z, \qquad \log |A| = \log |B| + \log |I + M S| :

    the first is a minimum, so that an error of z counts by its square, and no S need be positive. What lies outside the
    span of Q (where P < N) has the eigenvalue σ², cross terms included.

    :param spectrum: That of the large group.
    :param system: The same inputs and noise, with all groups.
    :param groups: Which are small.
    """

    def __init__(self, spectrum: Spectrum, system: System, groups: Groups):
        self.spectrum = spectrum
        index, self._group_of = groups.small(system.x.device)
        columns = system.jacobian.some_columns(index)
        whitened = spectrum.scale.unsqueeze(-1) * columns
        spectrum.system.check_finite(whitened.square().sum(-1))
        # Of length one, so that entries of M can be compared.
        self._lengths = whitened.norm(dim=-2)
        self._lengths = self._lengths.where(self._lengths > 0, 1.0)
        columns = whitened / self._lengths.unsqueeze(-2)
        inside = spectrum.coordinates(columns)
        self._columns, self._coordinates = (part.mT.contiguous() for part in (columns, inside))  # (B, q, N), (B, q, k)
        self._left = self._left_of(columns, inside)
        self._last: tuple[Tensor, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, those of the spectrum too: it stays as long as what was made of its eigenvectors."""
        own = (self._columns, self._coordinates, self._left, self._group_of)
        return self.spectrum.nbytes + sum(tensor.nbytes for tensor in own)

    def trace(self, variances: Tensor) -> Tensor:
        """That of U S Uᵀ, whitened, (B, 1), for the variances of all groups, (B, G)."""
        return (self._lengths.square() * variances.detach()[:, self._group_of]).sum(-1, keepdim=True)

    def _left_of(self, columns: Tensor, inside: Tensor) -> Tensor:
        """Products of what Q leaves of U and of other columns, (B, q, r), from these and their coordinates."""
        if not self.spectrum.in_weight_space:  # nothing is: that would be rounding
            return inside.new_zeros(inside.shape[0], self._columns.shape[-2], inside.shape[-1])
        return self._columns @ columns - self._coordinates @ inside

    def _parts(self, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a whitened r: its coordinates, (B, k, r), and what is left of r with itself, (B, r), and of U with r."""
        if self._last is not None and not residual.requires_grad and torch.equal(self._last[0], residual):
            _, inside, rest, cross = self._last
            return inside, rest, cross
        inside = self.spectrum.coordinates(residual)
        rest = residual.square().sum(-2) - inside.square().sum(-2)
        rest = rest.clamp_min(0.0) if self.spectrum.in_weight_space else torch.zeros_like(rest)
        cross = self._left_of(residual, inside)
        if not residual.requires_grad:
            self._last = (residual.clone(), inside, rest, cross)
        return inside, rest, cross

    def inv_quad_logdet(
        self, residual: Tensor, scale: Tensor, noise: Tensor, variances: Tensor
    ) -> tuple[Tensor, Tensor]:
        """rᵀA⁻¹r, (B, r), and log |A|, (B,).

        :param residual: r, (B, N, r).
        :param scale: s, (B, 1).
        :param noise: σ², (B, 1).
        :param variances: Those of all groups, (B, G).
        """
        inside, rest, cross = self._parts(self.spectrum.scale.unsqueeze(-1) * residual)
        scaled = (self._lengths.square() * variances[:, self._group_of]).unsqueeze(-1)
        spectrum = scale * self.spectrum.values + noise
        weighted = self._coordinates / spectrum.unsqueeze(-2)
        outside = noise.unsqueeze(-1)
        moment = weighted @ self._coordinates.mT + self._left / outside
        system = moment * scaled.mT
        system = system + torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        known = weighted @ inside + cross / outside
        system, known = (part.expand(max(len(system), len(known)), -1, -1) for part in (system, known))
        duals = torch.linalg.solve(system, known)  # z
        weights = scaled * duals
        error = inside - self._coordinates.mT @ weights
        left = rest - 2 * (weights * cross).sum(-2) + (weights * (self._left @ weights)).sum(-2)
        inv_quad = (error.square() / spectrum.unsqueeze(-1)).sum(-2) + left / noise + (duals * weights).sum(-2)
        return inv_quad, self.spectrum.logdet(scale, noise) + torch.linalg.slogdet(system).logabsdet
