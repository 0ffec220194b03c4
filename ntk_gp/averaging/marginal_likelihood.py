"""Marginal likelihoods of sums of scaled kernels at inputs that stay as they are.

A search for hyperparameters evaluates hundreds of them. With few data GPyTorch takes nearly all of the time for finding
out, each time anew, what the model is made of; here that is found out once, and what has no hyperparameters is kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.models import ExactGP
from linear_operator.operators import LinearOperator
from torch import Tensor

from .. import memory
from ..bridge.feature_sums import Summand, summands
from ..bridge.kernel_matrices import evaluated
from ..operators._marginal_terms import Assembly, exact_terms, in_double
from ..operators._parts import Arguments, Diagonal, Multiple, Numbers, Part, Sum, part_of

# With more data, what is asked for anew takes no part of the time.
_LARGEST = 1000


class _Term(NamedTuple):
    """A kernel of the sum with what it is scaled by, the columns of the inputs that it sees, and its matrix in float64
    where nothing in it is trained."""

    summand: Summand
    x: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, summand: Summand, x: Tensor) -> _Term:
        x = x if summand.active_dims is None else x.index_select(-1, summand.active_dims)
        return cls(summand, x, _kept(summand.kernel, x))

    def part(self, arguments: Arguments) -> Part:
        if self.kept is None:
            part = part_of(_matrix(self.summand.kernel, self.x), arguments)
        else:
            part = Numbers(arguments.add(self.kept))
        if not self.summand.scales:
            return part
        scale = torch.stack([scale.outputscale for scale in self.summand.scales]).prod(0)
        return Multiple(arguments.add(scale), part)


class SumOfKernels:
    """The log marginal likelihood log p(y) of a model, at the hyperparameters that it has whenever it is asked for.

    :param likelihood: With one noise for all.
    :param residual: The targets minus the mean, (n,) in float64.
    :param terms: What is added up.
    """

    def __init__(self, likelihood: GaussianLikelihood, residual: Tensor, terms: list[_Term]):
        self._likelihood = likelihood
        self._residual = residual
        self._terms = terms

    @classmethod
    def of(cls, model: ExactGP) -> SumOfKernels | None:
        """That of a model in train mode; None where it is of another form, or has many data."""
        targets, likelihood = model.train_targets, model.likelihood
        if type(likelihood) is not GaussianLikelihood or likelihood.noise.shape != (1,):
            return None
        if targets.dim() != 1 or len(targets) > _LARGEST or not targets.isfinite().all():
            return None
        if any(True for _ in model.added_loss_terms()):
            return None
        with torch.enable_grad():
            prior = model(*model.train_inputs)
        matrix, mean = prior.lazy_covariance_matrix, prior.mean
        is_known = type(prior) is MultivariateNormal and mean.shape == targets.shape and not mean.requires_grad
        if not is_known or not _is_kernels(matrix):
            return None
        parts = summands(matrix.kernel)
        kept = sum(not _is_trained(part.kernel) for part in parts)
        if 8 * (kept + 3) * len(targets) ** 2 > memory.SYSTEM.bytes(targets.device):
            return None
        return cls(likelihood, (targets - mean).double(), [_Term.of(part, matrix.x1) for part in parts])

    def __call__(self) -> Tensor:
        """log p(y), with derivatives that are written out.

        :raises NotPSDError: If the matrix has no Cholesky factor.
        """
        arguments, n = Arguments(), len(self._residual)
        parts = [term.part(arguments) for term in self._terms]
        noise = Diagonal(arguments.add(self._likelihood.noise.expand(n)))
        jitter = gpytorch_settings.cholesky_jitter.value(torch.float64)
        assembly = Assembly(Sum([*parts, noise]), torch.Size([n, n]), jitter)
        inv_quad, logdet = exact_terms(assembly, arguments.tensors, self._residual.unsqueeze(-1), torch.float64)
        return -0.5 * (inv_quad.sum() + logdet + n * math.log(2 * math.pi))


def _is_kernels(matrix: Any) -> bool:
    """Whether it is a kernel's matrix at inputs that no hyperparameter changes."""
    return (
        type(matrix) is LazyEvaluatedKernelTensor
        and not matrix.last_dim_is_batch
        and not matrix.params
        and not (matrix.x1.requires_grad or matrix.x2.requires_grad)
        and torch.equal(matrix.x1, matrix.x2)
        and matrix.x1.dim() == 2
        and matrix.kernel.active_dims is None
        and len(matrix.kernel.batch_shape) == 0
    )


def _matrix(kernel: Kernel, x: Tensor) -> LinearOperator:
    """Evaluated at the columns that the kernel sees; not by GPyTorch, which switches lazy evaluation off in all threads
    meanwhile."""
    return evaluated(LazyEvaluatedKernelTensor(x, x, kernel=kernel))


def _kept(kernel: Kernel, x: Tensor) -> Tensor | None:
    """The matrix of a kernel in which nothing is trained, also nothing that it has of other modules."""
    if _is_trained(kernel):
        return None
    with torch.enable_grad():
        matrix = in_double(_matrix(kernel, x))
    return None if matrix.requires_grad else matrix


def _is_trained(kernel: Kernel) -> bool:
    return any(parameter.requires_grad for parameter in kernel.parameters())
