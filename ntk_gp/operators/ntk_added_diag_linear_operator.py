"""K + D, kernel matrix and noise: where the way to solve is chosen."""

from __future__ import annotations

from typing import Any

import torch
from linear_operator.operators import (
    AddedDiagLinearOperator,
    ConstantDiagLinearOperator,
    DiagLinearOperator,
    LinearOperator,
)
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Size, Tensor

from .. import settings
from .._compat import added_diagonal, without_diagonal
from ..solvers import Solver, SolverReport, Spectrum, System, choose_solver, report_on, solver_class
from ..solvers.function_space import FunctionSpaceSolver
from ..solvers.rounding import accuracy, rounding_error
from ..solvers.spectrum import Groups, SpectrumBeside
from ._batches import FoldedColumns, common_shape, flatten_batch
from ._marginal_terms import Assembly, MarginalTerms
from ._one_output import one_output_blocks
from ._solve import Solve
from ._solving_operators import SolvesWithLogdet
from .ntk_sum_linear_operator import NTKSumLinearOperator, entry_by_entry

# Up to this size one eigendecomposition takes seconds, and the first step of fitting may as well do it.
_ALWAYS_DECOMPOSED = 4000
_STEPS_BEFORE_DECOMPOSING = 10


class NTKAddedDiagLinearOperator(SolvesWithLogdet, AddedDiagLinearOperator):
    r""":math:`\boldsymbol K + \boldsymbol D`: a neural tangent kernel matrix and a diagonal of noise.

    Solves and log-determinants are exact, in float64 and by the cheapest way that fits in the memory budget (see
    :mod:`ntk_gp.solvers`); beyond, they iterate and say so where they do not converge. While the noise and one scale
    are being fitted, and variances of a few parameters beside it, one eigendecomposition serves every step.

    :param linear_ops: The :class:`NTKLinearOperator` and the :class:`~linear_operator.operators.DiagLinearOperator`.
    """

    _solver_memo: Solver | None = None

    def __add__(self, other: Tensor | LinearOperator | float) -> LinearOperator | Tensor:
        if isinstance(other, DiagLinearOperator):
            return super().__add__(other)
        return (without_diagonal(self) + other) + added_diagonal(self)

    def _mul_matrix(self, other: Tensor | LinearOperator) -> LinearOperator:
        return entry_by_entry(self, other)

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        """A square root, for samples: exact as long as the matrix fits in the memory budget."""
        return self._as_sum.root_decomposition(method)

    def _size(self) -> Size:
        return common_shape(*(part.shape for part in self.linear_ops))

    def _kept(self, kind: str, system: System, build: Any) -> Any:
        """What was built for an equal system before: operators are rebuilt at every call, the linearization stays."""

        def compute(x: Tensor, variances: Tensor, noise: Tensor) -> Any:
            return build(System(system.linearization, x, variances, noise, system.dtype))

        return system.linearization.keep(f"{kind} {system.dtype}", (system.x, system.variances, system.noise), compute)

    @property
    def system(self) -> System:
        """K + D as the solvers take it, in float64 and without a graph."""
        kernel_matrix = without_diagonal(self)
        return System(
            kernel_matrix.linearization,
            flatten_batch(kernel_matrix.x1.detach()),
            _distinct_rows(kernel_matrix.variances.detach()),
            _distinct_rows(self._noise_diagonal.detach().unsqueeze(-2)),
        )

    @property
    def _noise_diagonal(self) -> Tensor:
        return added_diagonal(self)._diagonal().expand(self.shape[:-1])

    @property
    def solver(self) -> Solver:
        """The solver for this matrix, from the cache or newly built."""
        if self._solver_memo is None:
            system = self.system  # settings may ask for another kind than the one that is kept
            self._solver_memo = self._kept(f"solver {solver_class(system).__name__}", system, choose_solver)
        return self._solver_memo

    def solver_report(self) -> SolverReport:
        """Which solver this matrix has, or would have, and why; nothing is built for that."""
        return report_on(self.system, self._solver_memo)

    def _solve_columns(self, rhs: Tensor) -> Tensor:
        return Solve.apply(self, rhs, *self.representation()) if self._is_positive else self._as_sum._solve_columns(rhs)

    def _solve(self, rhs: Tensor, preconditioner: Any = None, num_tridiag: int | None = 0) -> Any:
        if num_tridiag or not self._is_positive:
            return self._as_sum._solve(rhs, preconditioner, num_tridiag)
        # A system with one batch serves all of the operator's, as more columns.
        columns = FoldedColumns(rhs.double(), self.batch_shape if self.solver.system.batch > 1 else Size())
        solution = columns.unfold(self.solver.solve(columns.flat))
        shape = common_shape(solution.shape[:-2], self.batch_shape)
        return solution.expand(*shape, *solution.shape[-2:]).to(self.dtype)

    @property
    def _is_positive(self) -> bool:
        """Whether K + D is positive definite by its construction, as every solver here assumes."""
        return bool((added_diagonal(self)._diagonal() > 0).all() and (without_diagonal(self).variances >= 0).all())

    @property
    def _as_sum(self) -> SolvesWithLogdet:
        """The same matrix, solved densely, with jitter where it needs that: for noise that is not positive."""
        return NTKSumLinearOperator(without_diagonal(self)) + added_diagonal(self)

    def _inv_quad_and_logdet(self, rhs: Tensor | None, logdet: bool) -> tuple[Tensor, Tensor]:
        columns = torch.zeros(*self.shape[:-1], 1, dtype=self.dtype, device=self.device) if rhs is None else rhs
        terms = self._marginal_terms(columns)
        if terms is None:
            return self._as_sum._inv_quad_and_logdet(rhs, logdet)
        inv_quad, log_determinant = terms
        return self._zeros() if rhs is None else inv_quad, log_determinant if logdet else self._zeros()

    def _marginal_terms(self, rhs: Tensor) -> tuple[Tensor, Tensor] | None:
        """rhsᵀ (K + D)⁻¹ rhs for each column, (*batch, r), and log |K + D|, (*batch); None if not K + D > 0."""
        if not self._is_positive:
            return None
        kernel_matrix = without_diagonal(self)
        if torch.is_grad_enabled() and (kernel_matrix.x1.requires_grad or kernel_matrix.x2.requires_grad):
            return self._dense_marginal_terms(rhs)
        apart = one_output_blocks(self)
        if apart is not None:
            return apart.marginal_terms(rhs)
        system = self.system
        out_shape, rhs, variances, noise = self._flat_arguments(rhs)
        fitted = torch.is_grad_enabled() and (variances.requires_grad or noise.requires_grad)
        constant = isinstance(added_diagonal(self), ConstantDiagLinearOperator)
        groups = Groups(kernel_matrix.function) if fitted and (constant or not noise.requires_grad) else None
        groups = groups if groups is not None and groups.are_few else None
        terms = None
        if groups is not None and _spectrum_fits(system) and self._spectrum_pays(system):
            terms = self._spectrum_terms(system, groups, rhs, variances, noise, constant)
        elif fitted and groups is None:
            terms = self._assembled_terms(system, rhs.reshape(*out_shape, *rhs.shape[-2:]))
        inv_quad, logdet = _MarginalTerms.apply(variances, noise, rhs, self.solver) if terms is None else terms
        return inv_quad.reshape(*out_shape, -1), logdet.reshape(out_shape)

    def _spectrum_pays(self, system: System) -> bool:
        """Whether to compute the eigenvalues of K now: they cost as much as some ten steps of fitting without them, so
        that a large K waits until it has been asked for that often."""
        if min(system.num_rows, system.num_parameters) <= _ALWAYS_DECOMPOSED:
            return True
        counter = system.linearization.of_network.keep("fitting steps", (system.x,), lambda _: _Counter())
        counter.count += 1
        return counter.count > _STEPS_BEFORE_DECOMPOSING

    def _flat_arguments(self, rhs: Tensor) -> tuple[Size, Tensor, Tensor, Tensor]:
        """Everything in float64 with one batch dimension: the batch shape, rhs, variances and noise."""
        shape = common_shape(rhs.shape[:-2], self.batch_shape)
        rhs = rhs.expand(*shape, *rhs.shape[-2:]).reshape(-1, *rhs.shape[-2:]).double()
        variances = without_diagonal(self).variances
        variances = variances.expand(*shape, *variances.shape[-2:]).reshape(-1, variances.shape[-1]).double()
        noise = self._noise_diagonal.expand(*shape, self.shape[-1]).reshape(-1, self.shape[-1]).double()
        return shape, rhs, variances, noise

    def _spectrum_terms(
        self, system: System, groups: Groups, rhs: Tensor, variances: Tensor, noise: Tensor, constant: bool
    ) -> tuple[Tensor, Tensor] | None:
        """From the eigenvalues, unless there is so little noise that they have lost the digits for it."""
        unit_noise = torch.ones_like(system.noise[:1]) if constant else system.noise
        own_noise = noise[:, :1] if constant else torch.ones_like(variances[:, :1])
        scale = variances[:, groups.large, None]
        unit = System(system.linearization, system.x, torch.ones_like(system.variances[:1]), unit_noise)
        if groups.num_small == 0:
            spectrum = self._spectrum(unit, groups)
            return spectrum.inv_quad_logdet(rhs, scale, own_noise) if spectrum.resolves(scale, own_noise) else None
        beside = self._kept(
            "spectrum beside", unit, lambda unit: SpectrumBeside(self._spectrum(unit, groups), unit, groups)
        )
        if not beside.spectrum.resolves(scale, own_noise, beside.trace(variances)):
            return None
        return beside.inv_quad_logdet(rhs, scale, own_noise, variances)

    def _spectrum(self, unit: System, groups: Groups) -> Spectrum:
        """That of the largest group, from the cache or newly computed."""
        return self._kept("spectrum", _of_one_group(unit, groups.large, unit.noise), Spectrum)

    def _assembled_terms(self, system: System, rhs: Tensor) -> tuple[Tensor, Tensor] | None:
        """From the Gram matrix of each group, kept, and one N×N matrix beside them, where function space is the
        cheapest and K + D can be factorised there without loss: nothing is kept of a step that no other asks for."""
        if settings.solver.value() is not None or solver_class(system) is not FunctionSpaceSolver:
            return None
        assembly, tensors = Assembly.of(self, 0.0)
        with torch.no_grad():
            factor = assembly.positive_factor(tensors) if assembly.keeps_grams else None
        if factor is None or rounding_error(factor) > accuracy(system):
            return None
        return MarginalTerms.apply(assembly, factor, rhs, True, *tensors)

    def _dense_marginal_terms(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """By autograd through a dense Cholesky factor, all of it in float64: inputs that require gradients."""
        kernel_matrix = without_diagonal(self)
        arguments = (kernel_matrix.x1, kernel_matrix.x2, kernel_matrix.variances)
        gram = kernel_matrix._like(*(tensor.double() for tensor in arguments)).to_dense()
        factor = psd_safe_cholesky(gram + torch.diag_embed(self._noise_diagonal.double()))
        half = torch.linalg.solve_triangular(factor, rhs.double(), upper=False)
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return half.square().sum(-2), logdet


class _Counter:
    count = 0
    nbytes = 0


class _MarginalTerms(torch.autograd.Function):
    """rhsᵀ A⁻¹ rhs and log |A| with their exact derivatives: −αᵀ ∂A α with α = A⁻¹ rhs, and tr(A⁻¹ ∂A).

    Both are written out, so that autograd does not go through the factorisation.
    """

    @staticmethod
    def forward(ctx, variances: Tensor, noise: Tensor, rhs: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
        alpha = solver.solve(rhs)
        ctx.solver = solver
        ctx.save_for_backward(alpha)
        return (rhs * alpha).sum(-2), solver.logdet().expand(rhs.shape[0])

    @staticmethod
    def backward(ctx, grad_inv_quad: Tensor, grad_logdet: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        if torch.is_grad_enabled():  # autograd would take these for constants
            raise RuntimeError(
                "The marginal likelihood has no second derivatives (create_graph=True) with several prior variances of "
                "many parameters each, with a learned noise for each point, or with ntk_gp.settings.solver set. Take "
                "differences of its gradients instead."
            )
        (alpha,) = ctx.saved_tensors
        solver, function = ctx.solver, ctx.solver.system.jacobian.function
        by_variance, by_noise = solver.logdet_derivatives()
        quadratic = function.sum_by_group(solver.system.jacobian.vjp(alpha.mT).square())
        grad_variances = grad_logdet.unsqueeze(-1) * by_variance - (grad_inv_quad.unsqueeze(-1) * quadratic).sum(-2)
        grad_noise = grad_logdet.unsqueeze(-1) * by_noise - (grad_inv_quad.unsqueeze(-2) * alpha.square()).sum(-1)
        return grad_variances, grad_noise, 2 * alpha * grad_inv_quad.unsqueeze(-2), None


def _spectrum_fits(system: System) -> bool:
    """Whether eigenvalues may serve: no solver is set, the one that is chosen is exact, and they fit in memory."""
    if settings.solver.value() is not None or not solver_class(system).is_exact:
        return False
    return system.fits(3.0 * system.x.shape[0] * min(system.num_rows, system.num_parameters) ** 2)


def _of_one_group(system: System, group: int, noise: Tensor) -> System:
    """The same inputs with unit variance for one group and zero for the others: of the network alone, where it is one
    of the network's, so that sums with it share what is computed."""
    network = system.linearization.of_network
    linearization = network if group < network.network.num_groups else system.linearization
    variances = torch.zeros_like(system.variances[:1, : linearization.network.num_groups])
    variances[:, group] = 1.0
    return System(linearization, system.x, variances, noise)


def _distinct_rows(rows: Tensor) -> Tensor:
    """(*batch, 1, k) to (B, k), where B = 1 if all batches are equal."""
    return flatten_batch(rows)[:, 0]
