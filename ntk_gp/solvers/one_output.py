r"""Each output by itself, where they have only features in common: one n×n system in place of one of (n·C)×(n·C).

With :math:`J = \Psi \otimes I_C` (:mod:`ntk_gp.jacobian.one_output`) and a noise that is diagonal,
:math:`K + D` consists of C blocks, one for each output, :math:`\Psi S \Psi^\top + D_c`. Where the noise is the same for
all outputs the blocks are one matrix, which is factorised once, and the outputs are right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..jacobian.base import Jacobian
from ..jacobian.one_output import OneOutputJacobian, OneOutputLinearization, one_output, one_output_at, scattered
from .base import Solver
from .system import System


def system_of_one_output(system: System) -> System | None:
    """The blocks as a system of one output, of n rows: B batches where the noise is the same for all outputs, else B·C.

    None where outputs share parameters, or there is one.
    """
    if system.jacobian.function.num_outputs == 1 or one_output(system.jacobian) is None:
        return None
    outputs = system.jacobian.function.num_outputs
    noise = system.noise.unflatten(-1, (-1, outputs))
    x, variances = system.x, system.variances
    if bool((noise == noise[..., :1]).all()):
        noise = noise[..., 0]
    else:
        noise = noise.expand(system.batch, -1, -1).mT.flatten(0, 1)
        x, variances = (part if len(part) == 1 else part.repeat_interleave(outputs, 0) for part in (x, variances))
    return System(OneOutputLinearization(system.linearization), x, variances, noise, system.dtype)


class OneOutputSolver(Solver):
    """The solver of one output's system, for all outputs.

    :param system: K + D of all outputs.
    :param one: The solver of :func:`system_of_one_output`.
    :param make_general: Makes one that takes K + D for any matrix: at test inputs where the network does other things
        than at those of training, its outputs may share parameters.
    """

    def __init__(self, system: System, one: Solver, make_general: Callable[[System], Solver]):
        super().__init__(system)
        self.one = one
        self._make_general = make_general
        self._general_memo: Solver | None = None
        self.name = one.name  # type: ignore[misc]
        self.is_exact = one.is_exact  # type: ignore[misc]
        self.keeps_small_variances = one.keeps_small_variances  # type: ignore[misc]
        self._outputs = system.jacobian.function.num_outputs
        self._is_shared = one.system.batch == system.batch  # one matrix for all outputs

    @classmethod
    def cost(cls, system: System) -> float:
        raise NotImplementedError("It is not chosen by its cost: it is taken where it can be, see choose_solver.")

    @classmethod
    def nbytes_needed(cls, system: System) -> float:
        raise NotImplementedError("It is not chosen by its memory: it is taken where it can be, see choose_solver.")

    @property
    def nbytes(self) -> int:
        return self.one.nbytes + (0 if self._general_memo is None else self._general_memo.nbytes)

    def whitened_size(self) -> int:
        return self.one.whitened_size()

    def solve(self, rhs: Tensor) -> Tensor:
        return self._joined(self.one.solve(self._split(rhs)))

    def logdet(self) -> Tensor:
        one = self.one.logdet()
        return self._outputs * one if self._is_shared else one.unflatten(0, (-1, self._outputs)).sum(-1)

    def logdet_derivatives(self) -> tuple[Tensor, Tensor]:
        by_group, by_noise = self.one.logdet_derivatives()
        if self._is_shared:
            return self._outputs * by_group, by_noise.repeat_interleave(self._outputs, -1)
        by_group, by_noise = (part.unflatten(0, (-1, self._outputs)) for part in (by_group, by_noise))
        return by_group.sum(1), by_noise.mT.flatten(1)

    def mean_weights(self, residual: Tensor) -> Tensor:
        one = self.one.mean_weights(self._split(residual.mT).mT)  # (B, C·r, p) or (B·C, r, p)
        split = (1, (self._outputs, -1)) if self._is_shared else (0, (-1, self._outputs))
        return scattered(one.unflatten(*split).transpose(1, 2), self.system.jacobian)

    def covariance(self, jacobian1: Jacobian, jacobian2: Jacobian) -> Tensor:
        one1 = self._one_output(jacobian1)
        one2 = one1 if jacobian2 is jacobian1 else self._one_output(jacobian2)
        if one1 is None or one2 is None:
            return self._general.covariance(jacobian1, jacobian2)
        block = self.one.covariance(one1, one2)
        blocks = block.unsqueeze(1) if self._is_shared else block.unflatten(0, (-1, self._outputs))
        blocks = blocks.expand(-1, self._outputs, -1, -1)
        return torch.diag_embed(blocks.permute(0, 2, 3, 1)).transpose(2, 3).flatten(3).flatten(1, 2)

    def variance(self, jacobian: Jacobian) -> Tensor:
        features = self._one_output(jacobian)
        if features is None:
            return self._general.variance(jacobian)
        one = self.one.variance(features)
        if self._is_shared:
            return one.repeat_interleave(self._outputs, -1)
        return one.unflatten(0, (-1, self._outputs)).mT.flatten(1)

    @property
    def _general(self) -> Solver:
        if self._general_memo is None:
            self._general_memo = self._make_general(self.system)
        return self._general_memo

    def _one_output(self, jacobian: Jacobian) -> Jacobian | None:
        found = one_output_at(jacobian, self.system.jacobian)
        if found is None or self._is_shared or len(found.x) == 1:
            return found
        x, features = (part.repeat_interleave(self._outputs, 0) for part in (found.x, found.features))
        return OneOutputJacobian(found.function, x, features)  # a batch for each output

    def _split(self, rhs: Tensor) -> Tensor:
        """(B, n·C, r) to (B, n, C·r) where the matrix is shared, or to (B·C, n, r)."""
        columns = rhs.unflatten(1, (-1, self._outputs))
        if self._is_shared:
            return columns.flatten(2)
        return columns.expand(self.system.batch, -1, -1, -1).transpose(1, 2).flatten(0, 1)

    def _joined(self, solution: Tensor) -> Tensor:
        """The inverse of :meth:`_split`."""
        if self._is_shared:
            return solution.unflatten(-1, (self._outputs, -1)).flatten(1, 2)
        return solution.unflatten(0, (-1, self._outputs)).transpose(1, 2).flatten(1, 2)
