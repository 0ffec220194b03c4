"""Matrices with a neural tangent kernel in them that GPyTorch solves by their structure: solved by it, exactly.

=============================  ===================================  =======================================
matrix                         by                                   flops, beside products with vectors
=============================  ===================================  =======================================
⊗ Kᵢ + ⊗ Nᵢ (multitask)        eigenvalues of each whitened factor  Σ nᵢ³
blocks of a batch              each block's own solver              a sum over blocks
W B Wᵀ + D (interpolation)     Woodbury's formula                   n m² + m³, for a grid of m points
R Rᵀ + D (inducing points)     GPyTorch's own Woodbury formula      n m² + m³
=============================  ===================================  =======================================

Everything in float64, no setting of GPyTorch decides, and no gradient goes through a factorisation: a solve is
α + S(b − A α), with α the solution and S the inverse, both constants, and A with its graph.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    BlockInterleavedLinearOperator,
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    InterpolatedLinearOperator,
    KroneckerProductLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
    SumLinearOperator,
)
from linear_operator.operators.block_linear_operator import BlockLinearOperator
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NotPSDError
from torch import Tensor

from ._solving_operators import Factorised, Solves
from .ntk_sum_linear_operator import NTKSumLinearOperator


class _SolvedByStructure(Factorised):
    """What the classes below share; they say how to factorise, apply the inverse, and sum the log-determinant.

    A factor is whatever these methods take, all of it in float64.
    """

    @abstractmethod
    def _inverse(self, parts: Any, rhs: Tensor) -> Tensor:
        """A⁻¹ rhs, (*batch, N, r); `parts` taken for constants."""

    @abstractmethod
    def _product(self, parts: Any, rhs: Tensor) -> Tensor:
        """A rhs, (*batch, N, r)."""

    @abstractmethod
    def _log_determinant(self, parts: Any) -> Tensor:
        """log |A|, (*batch)."""

    def _solution(self, parts: Any, rhs: Tensor) -> Tensor:
        with torch.no_grad():
            solution = self._inverse(parts, rhs)
        return solution + self._inverse(parts, rhs - self._product(parts, solution))

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Any:
        if num_tridiag:
            return super()._solve(rhs, preconditioner, num_tridiag)
        return self._solve_columns(rhs)

    def _solve_columns(self, rhs: Tensor) -> Tensor:
        return self._solution(self._factor, rhs.double()).to(rhs.dtype)

    def _inv_quad_and_logdet(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        parts = self._factor
        inv_quad = log_determinant = self._zeros()
        if rhs is not None:
            rhs = rhs.double()
            inv_quad = (rhs * self._solution(parts, rhs)).sum(-2)
        if logdet:
            log_determinant = self._log_determinant(parts).expand(self.batch_shape)
        return inv_quad, log_determinant

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """A square root, for samples, by a dense factor."""
        return NTKSumLinearOperator(*self._args).root_decomposition(method)


class _Whitened(NamedTuple):
    """One factor of the Kronecker products: K, and N = L Lᵀ; L⁻¹ K L⁻ᵀ = Q Λ Qᵀ."""

    kernel: Tensor  # K, (*batch, n, n)
    noise: Tensor  # N, (*batch, n, n), or its diagonal, (*batch, n, 1)
    values: Tensor  # Λ, (*batch, n)
    inverse_root: Tensor  # L⁻ᵀQ, (*batch, n, n), a constant
    root: Tensor  # L Q, (*batch, n, n), a constant
    noise_logdet: Tensor  # log |N|, (*batch)


class NTKKroneckerLinearOperator(_SolvedByStructure, SumLinearOperator):
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
        factors = (_symmetric(factor.double().to_dense()) for factor in kernel.linear_ops)
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


def _symmetric(matrix: Tensor) -> Tensor:
    """The same, with a symmetric derivative, as upstream has it: x₁ and x₂ then take half of it each."""
    return (matrix + matrix.mT) / 2


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


class _Blockwise(Solves, BlockLinearOperator):
    """A block-diagonal matrix whose blocks, a batch, know how to solve."""

    _stock: type[BlockLinearOperator]

    def _solve_columns(self, rhs: Tensor) -> Tensor:
        rhs = rhs.expand(*torch.broadcast_shapes(rhs.shape[:-2], self.batch_shape), *rhs.shape[-2:]).contiguous()
        return self._remove_batch_dim(self.base_linear_op.solve(self._add_batch_dim(rhs)))

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Any:
        if num_tridiag:
            return super()._solve(rhs, preconditioner, num_tridiag)
        return self._solve_columns(rhs)

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        root = self.base_linear_op.root_decomposition(method).root.to_dense()
        return RootLinearOperator(self._stock(root))


class NTKBlockDiagLinearOperator(_Blockwise, BlockDiagLinearOperator):
    """One block after the other.

    :param base_linear_op: The blocks, (*batch, k, n, n), solved exactly.
    """

    _stock = BlockDiagLinearOperator


class NTKBlockInterleavedLinearOperator(_Blockwise, BlockInterleavedLinearOperator):
    """The rows of the blocks in turn, as in an interleaved multitask distribution of independent outputs.

    :param base_linear_op: The blocks, (*batch, k, n, n), solved exactly.
    """

    _stock = BlockInterleavedLinearOperator


class _Woodbury(NamedTuple):
    """W B Wᵀ + D, with C = I + B Wᵀ D⁻¹ W."""

    weights: Tensor  # W, (*batch, n, m)
    base: Tensor  # B, (*batch, m, m)
    noise: Tensor  # D's diagonal, (*batch, n, 1)
    capacitance: Tensor  # C, (*batch, m, m)
    lu: tuple[Tensor, Tensor]  # of C, a constant


class NTKInterpolatedLinearOperator(_SolvedByStructure, SumLinearOperator):
    """W B Wᵀ + D, interpolation from a grid of m points, by Woodbury's formula. B may be singular.

    :param kernel: The same interpolation from both sides.
    :param noise: D, positive.
    """

    def __init__(self, kernel: InterpolatedLinearOperator, noise: DiagLinearOperator):
        super().__init__(kernel, noise)

    def _factorise(self) -> _Woodbury:
        kernel, noise = self.linear_ops
        base = _symmetric(kernel.base_linear_op.double().to_dense())
        indices, values = (
            kernel.left_interp_indices,
            (kernel.left_interp_values + kernel.right_interp_values).double() / 2,
        )
        weights = values.new_zeros(*indices.shape[:-1], base.shape[-1]).scatter_add(-1, indices, values)
        diagonal = noise._diagonal().double().unsqueeze(-1)
        identity = torch.eye(base.shape[-1], dtype=base.dtype, device=base.device)
        capacitance = identity + base @ (weights.mT @ (weights / diagonal))
        return _Woodbury(weights, base, diagonal, capacitance, torch.linalg.lu_factor(capacitance.detach()))

    def _inverse(self, parts: _Woodbury, rhs: Tensor) -> Tensor:
        weights, base, noise = parts.weights.detach(), parts.base.detach(), parts.noise.detach()
        scaled = rhs / noise
        return scaled - weights @ torch.linalg.lu_solve(*parts.lu, base @ (weights.mT @ scaled)) / noise

    def _product(self, parts: _Woodbury, rhs: Tensor) -> Tensor:
        return parts.weights @ (parts.base @ (parts.weights.mT @ rhs)) + parts.noise * rhs

    def _log_determinant(self, parts: _Woodbury) -> Tensor:
        sign, logdet = torch.linalg.slogdet(parts.capacitance)
        if (sign <= 0).any():
            raise NotPSDError("The kernel matrix of the grid is not positive semidefinite.")
        return logdet + parts.noise.squeeze(-1).log().sum(-1)


def pays_to_interpolate(kernel: InterpolatedLinearOperator) -> bool:
    """Whether this is W B Wᵀ, with a W on both sides, and Woodbury's (n + m) m² flops are fewer than n³/3."""
    n, m = kernel.shape[-1], kernel.base_linear_op.shape[-1]
    sides = (
        (kernel.left_interp_indices, kernel.right_interp_indices),
        (kernel.left_interp_values, kernel.right_interp_values),
    )
    same = all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in sides)
    return same and 3 * (n + m) * m**2 < n**3
