r"""Leading singular subspaces of Jacobians, and the principal angles between two of them.

With K = U S² Uᵀ, the singular value decomposition of J is U S Vᵀ, V = Jᵀ U S⁻¹. Directions in the space of the weights
(V) say what one network would have to learn for two tasks; directions over points and outputs (U) what two networks can
say of one set of inputs. Where points count w times, the right singular vectors in the coordinates of V are the
eigenvectors of M = S Uᵀ W U S, and the left ones follow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from .. import memory
from .tangents import Tangents

# Squares of singular values below this part of the largest are what rounding leaves.
_FLOOR = 1e-12
# Up to so many rows, all eigenvectors cost less than a search for the first.
_DENSE = 500
# Singular values whose squares differ by less, as a part of themselves, are taken for equal.
_TIED = 1e-6
# Directions that resampled points are expressed in, for each that is compared, and at least.
_KEPT, _LEAST_KEPT = 4, 32
_STEPS, _OVERSAMPLED, _TOLERANCE = 12, 8, 1e-8


class Leading(NamedTuple):
    """The first singular vectors of a layer's Jacobian.

    :ivar vectors: U, (N, m).
    :ivar values: S, (m,), the largest first.
    """

    vectors: Tensor
    values: Tensor

    @property
    def features(self) -> Tensor:
        """J in the coordinates of V, (N, m)."""
        return self.vectors * self.values


def leading(tangents: Tangents, layer: int, rank: int) -> Leading:
    """As many as are kept for `rank` of them, or as the layer's Jacobian has above rounding."""
    # Of C outputs, up to C - 1 more may be equal to the last.
    wanted = min(rank + tangents.num_outputs, tangents.num_rows)
    kept = min(max(_KEPT * rank, _LEAST_KEPT, wanted), tangents.num_rows)
    jacobian, variances = tangents.jacobian, tangents.variances(layer)
    is_formed = 8 * tangents.num_rows**2 <= memory.GRAM_BLOCK.bytes(tangents.x.device)
    matrix = jacobian.gram(jacobian, variances)[0] if is_formed else None

    def multiply(columns: Tensor) -> Tensor:
        if matrix is not None:
            return matrix @ columns
        return jacobian.kernel_matmul(jacobian, columns.unsqueeze(0), variances)[0]

    if matrix is not None and tangents.num_rows <= _DENSE:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(-1)[:kept], vectors.flip(-1)[:, :kept]
    else:
        values, vectors = leading_eigenpairs(multiply, tangents.x.new_empty(tangents.num_rows), kept, wanted)
    seen = values > _FLOOR * values[0].clamp_min(0.0)
    return Leading(vectors[:, seen], values[seen].sqrt())


def leading_eigenpairs(
    multiply: Callable[[Tensor], Tensor], like: Tensor, kept: int, wanted: int
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a positive semidefinite matrix, and their vectors, by a block Krylov space.

    :param multiply: Multiplies the matrix with columns (N, r).
    :param like: (N,), in the dtype and on the device of the matrix.
    :param kept: How many are returned.
    :param wanted: How many of them are to be exact.
    """
    n = len(like)
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(n, kept + _OVERSAMPLED, generator=generator, dtype=torch.float64, device="cpu")
    block = torch.linalg.qr(start.to(like)).Q
    basis, images = block, multiply(block)
    for _ in range(_STEPS):
        values, rotation = torch.linalg.eigh(basis.mT @ images)
        values, rotation = values.flip(-1)[:kept], rotation.flip(-1)[:, :kept]
        vectors = basis @ rotation
        residuals = (images @ rotation - vectors * values)[:, :wanted].norm(dim=0)
        # What rounding leaves of a large eigenvalue is no error of a small one.
        allowed = _TOLERANCE * values[:wanted].clamp_min(_FLOOR * values[0])
        if (residuals <= allowed).all() or basis.shape[1] == n:
            return values, vectors
        block = images[:, -block.shape[1] :][:, : n - basis.shape[1]]
        for _ in range(2):  # once is not enough where little is left
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, multiply(block)], dim=1)
    warnings.warn(
        f"The leading {wanted} eigenvectors of a kernel matrix of {n} rows have not converged: their residuals are up "
        f"to {float((residuals / values[:wanted]).max()):.1e} of the eigenvalues. Take a lower rank or fewer points.",
        NumericalWarning,
        stacklevel=2,
    )
    return values, vectors


def comparable(one: Leading, other: Leading, rank: int) -> int:
    """How many directions of either are compared: `rank`, or those that there are; or more, where the last of them has
    a singular value in common with the next, so that which of the two is the last is anyone's choice.

    That is the rule in the last layer of a network with C outputs, where every singular value is C times there.
    """
    most = min(len(one.values), len(other.values))
    for count in range(min(rank, most), most):
        if not any(_is_tied(each.values.square(), count) for each in (one, other)):
            return count
    return most


def _is_tied(squares: Tensor, count: int) -> bool:
    """Whether a value after so many of them is equal to the one before."""
    if not 0 < count < len(squares):
        return False
    return bool(squares[count - 1] - squares[count] <= _TIED * squares[count - 1] + _FLOOR * squares[0])


def right_basis(tangents: Tangents, layer: int, found: Leading, count: int) -> Tensor:
    """The first right singular vectors, (P of the layer, count)."""
    vectors = tangents.jacobian.vjp(found.vectors[:, :count].mT.unsqueeze(0))[0][:, tangents.columns(layer)]
    return torch.linalg.qr((vectors / found.values[:count].unsqueeze(-1)).mT).Q


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Those between the spans of two orthonormal bases (m, k), in radians, the smallest first: (k,).

    By the cosines where these are small, and by the sines where those are (Björck and Golub, 1973).
    """
    inner = one.mT @ other
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    sines = torch.linalg.svdvals(other - one @ inner).flip(-1).clamp(max=1.0)
    return torch.where(cosines.square() > 0.5, sines.arcsin(), cosines.arccos())


def overlaps(
    one: tuple[Leading, Tensor],
    other: tuple[Leading, Tensor],
    cross: Callable[[Tensor], Tensor],
    count: int,
    left: bool,
) -> Tensor:
    """The mean squared cosine of the first principal angles for each set of points, (R,).

    :param one: What is leading, and how often each row counts, (R, N).
    :param other: The same of the other Jacobian.
    :param cross: VᵀV' for the right subspaces, or S Uᵀ W U' S' for the left ones, of weights (N,): (m, m').
    :param count: How many directions of each are compared, as far as the points that were drawn have them.
    :param left: Whether the left subspaces are compared.
    """
    out = []
    (a, a_weights), (b, b_weights) = one, other
    for w, v in zip(a_weights, b_weights, strict=True):
        (p, p_values), (q, q_values) = _reweighted(a, w, count), _reweighted(b, v, count)
        k = min(p.shape[1], q.shape[1])
        inner = p[:, :k].mT @ cross(w) @ q[:, :k]
        if left:
            inner = inner / (p_values[:k].sqrt().unsqueeze(-1) * q_values[:k].sqrt())
        out.append(inner.square().sum() / k)
    return torch.stack(out)


def _reweighted(found: Leading, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first right singular vectors where rows count so often, in the coordinates of V, and the squares of the
    singular values."""
    features = found.features
    values, vectors = torch.linalg.eigh(features.mT @ (weights.unsqueeze(-1) * features))
    values, vectors = values.flip(-1)[:count], vectors.flip(-1)[:, :count]
    seen = values > _FLOOR * values[0]
    return vectors[:, seen], values[seen]
