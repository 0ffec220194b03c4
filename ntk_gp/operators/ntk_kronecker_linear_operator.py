"""Kronecker products with a neural tangent kernel matrix, plus noise: multitask kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from linear_operator.operators import (
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from ._solved_by_structure import SolvedByStructure, symmetric


class _Whitened(NamedTuple):
    """One factor of the Kronecker products: K, and N = L Lᵀ; L⁻¹ K L⁻ᵀ = Q Λ Qᵀ."""

    kernel: Tensor  # K, (*batch, n, n)
    noise: Tensor  # N, (*batch, n, n), or its diagonal, (*batch, n, 1)
    values: Tensor  # Λ, (*batch, n)
    inverse_root: Tensor  # L⁻ᵀQ, (*batch, n, n), a constant
    root: Tensor  # L Q, (*batch, n, n), a constant
    noise_logdet: Tensor  # log |N|, (*batch)


class NTKKroneckerLinearOperator(SolvedByStructure, SumLinearOperator):
    """⊗ Kᵢ + ⊗ Nᵢ, such as a multitask kernel and its noise.

    :param kernel: The Kronecker product, with a neural tangent kernel matrix as a factor.
    :param noise: Positive definite: a constant diagonal, or a Kronecker product of factors of the same sizes.
    """

    def __init__(self, kernel: LinearOperator, noise: LinearOperator):
        super().__init__(kernel, noise)

    def _factorise(self) -> list[_Whitened]:
        kernel, noise = self.linear_ops
        noises = noise_factors(noise, [factor.shape[-1] for factor in kernel.linear_ops])
        assert noises is not None
        factors = (symmetric(factor.double().to_dense()) for factor in kernel.linear_ops)
        return [_whitened(factor, n) for factor, n in zip(factors, noises, strict=True)]

    def _values(self, parts: list[_Whitened]) -> Tensor:
        """The eigenvalues of ⊗ L⁻¹KL⁻ᵀ, (*batch, N)."""
        values = parts[0].values
        for part in parts[1:]:
            values = (values.unsqueeze(-1) * part.values.unsqueeze(-2)).flatten(-2)
        return values

    def _inverse(self, parts: list[_Whitened], rhs: Tensor) -> Tensor:
        roots = [part.inverse_root for part in parts]
        rotated = _kronecker_matmul([root.mT for root in roots], rhs)
        return _kronecker_matmul(roots, rotated / (1 + self._values(parts).detach()).unsqueeze(-1))

    def _product(self, parts: list[_Whitened], rhs: Tensor) -> Tensor:
        noisy = _kronecker_matmul([part.noise for part in parts], rhs)
        return _kronecker_matmul([part.kernel for part in parts], rhs) + noisy

    def _log_determinant(self, parts: list[_Whitened]) -> Tensor:
        noise = sum(part.noise_logdet * (self.shape[-1] // part.values.shape[-1]) for part in parts)
        return self._values(parts).log1p().sum(-1) + noise

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """(⊗ L Q)(1 + Λ)^{1/2}."""
        if method is not None:
            return super().root_decomposition(method)
        parts = self._factor
        scales = (1 + self._values(parts)).sqrt().to(self.dtype)
        turned = KroneckerProductLinearOperator(*(part.root.to(self.dtype) for part in parts))
        return RootLinearOperator(MatmulLinearOperator(turned, DiagLinearOperator(scales)))


def _whitened(kernel: Tensor, noise: Tensor) -> _Whitened:
    """:param noise: N, (*batch, n, n), or its diagonal, (*batch, n, 1)."""
    if noise.shape[-1] == 1:
        scale = noise.sqrt()
        values, vectors = torch.linalg.eigh(kernel / (scale * scale.mT))
        vectors, scale = vectors.detach(), scale.detach()
        inverse_root, root = vectors / scale, vectors * scale
        logdet = noise.squeeze(-1).log().sum(-1)
    else:
        factor = psd_safe_cholesky(noise)
        left = torch.linalg.solve_triangular(factor, kernel, upper=False)
        values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, left.mT, upper=False))
        vectors = vectors.detach()
        inverse_root = torch.linalg.solve_triangular(factor.detach().mT, vectors, upper=True)
        root = factor.detach() @ vectors
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    values = values - values.detach().clamp_max(0.0)  # a kernel's are not negative but by rounding
    return _Whitened(kernel, noise, values, inverse_root, root, logdet)


def noise_factors(noise: LinearOperator, sizes: list[int]) -> list[Tensor] | None:
    """Nᵢ in float64, (*batch, nᵢ, nᵢ), or where they are diagonal these, (*batch, nᵢ, 1); None if they are not a
    Kronecker product of these sizes."""
    noise = noise.double()
    if isinstance(noise, ConstantDiagLinearOperator):
        first = noise.diag_values.unsqueeze(-1)
        scales = [first] + [torch.ones_like(first)] * (len(sizes) - 1)
        return [scale.expand(*scale.shape[:-2], n, 1) for scale, n in zip(scales, sizes, strict=True)]
    if not isinstance(noise, KroneckerProductLinearOperator):
        return None
    if [factor.shape[-1] for factor in noise.linear_ops] != sizes:
        return None
    return [
        factor._diagonal().unsqueeze(-1) if isinstance(factor, DiagLinearOperator) else factor.to_dense()
        for factor in noise.linear_ops
    ]


def are_positive(factors: list[Tensor]) -> bool:
    """Whether the factors of the noise are positive definite."""
    return all(
        bool((f > 0).all()) if f.shape[-1] == 1 else not torch.linalg.cholesky_ex(f.detach())[1].any() for f in factors
    )


def _kronecker_matmul(factors: list[Tensor], rhs: Tensor) -> Tensor:
    """(⊗ Aᵢ) rhs, (*batch, N, r). A factor (*batch, n, n), or its diagonal, (*batch, n, 1)."""
    batch = torch.broadcast_shapes(rhs.shape[:-2], *(factor.shape[:-2] for factor in factors))
    columns = rhs.shape[-1]
    result = rhs.expand(*batch, *rhs.shape[-2:])
    for factor in factors:  # rows are turned, so that the next factor's come first
        n = factor.shape[-2]
        result = result.reshape(*batch, n, -1)
        result = factor * result if factor.shape[-1] == 1 else factor @ result
        result = result.reshape(*batch, n, -1, columns).transpose(-3, -2).reshape(*batch, -1, columns)
    return result
