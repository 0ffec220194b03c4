"""K + D, the matrix to be solved with: kernel matrix of the training inputs and noise."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property

import torch
from torch import Tensor

from .. import memory
from ..jacobian.base import Jacobian
from ..jacobian.linearization import Linearization
from ..jacobian.products import JacobianProduct
from ..network import normal_tensor


class System:
    r""":math:`\boldsymbol A = \boldsymbol J \boldsymbol\Sigma \boldsymbol J^\top + \boldsymbol D`, in float64 whatever
    the inputs' dtype.

    With little noise, the condition number of an NTK matrix exceeds what float32 resolves, and a difference such as a
    posterior variance loses as many digits again.

    :param linearization: The frozen network with its engines.
    :param x: The training inputs, (B, n, d).
    :param variances: The prior variance of every group of parameters, (W, G); W is 1 or B. Not negative.
    :param noise: The diagonal of D, (B or 1, N). Positive.
    :param dtype: The precision that is asked of solutions; that of the inputs by default.
    """

    _at_test_inputs: tuple[Jacobian, Hashable] | None = None

    def __init__(
        self,
        linearization: Linearization,
        x: Tensor,
        variances: Tensor,
        noise: Tensor,
        dtype: torch.dtype | None = None,
    ):
        self.linearization = linearization
        self.dtype = x.dtype if dtype is None else dtype
        self.x, self.variances, self.noise = (
            normal_tensor(tensor.detach()).double() for tensor in (x, variances, noise)
        )
        self.state = linearization.network.fingerprint()

    def __getstate__(self) -> dict:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("jacobian", "_single_precision", "_at_test_inputs", "state")
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.state = self.linearization.network.fingerprint()

    @cached_property
    def jacobian(self) -> Jacobian:
        """J(X), (B, N, P)."""
        jacobian = self.linearization.jacobian(self.x)
        jacobian.shards.agree("prior variances and noise", self.variances, self.noise)
        return jacobian

    @cached_property
    def batch(self) -> int:
        """B."""
        return max(self.x.shape[0], self.variances.shape[0], self.noise.shape[0])

    @cached_property
    def num_rows(self) -> int:
        """N."""
        return self.jacobian.num_rows

    @cached_property
    def num_parameters(self) -> int:
        """P."""
        return self.jacobian.function.num_parameters

    @cached_property
    def parameter_variances(self) -> Tensor:
        """The diagonal of Σ, (W, P)."""
        return self.jacobian.function.expand_variances(self.variances)

    @cached_property
    def root_variances(self) -> Tensor:
        """The diagonal of Σ^{1/2}, (W, P): Φ = J Σ^{1/2}."""
        return self.parameter_variances.sqrt()

    def remember(self, jacobian: Jacobian) -> None:
        """J at test inputs, in float64: what comes next may be the variances there."""
        if jacobian.nbytes <= memory.TEST_POINTS.bytes(self.x.device):
            self._at_test_inputs = (jacobian, self.linearization.network.fingerprint())

    def jacobian_at(self, x: Tensor) -> Jacobian:
        """J at test inputs (B, m, d), in float64; differentiable where they require gradients."""
        known = self._at_test_inputs  # other threads may put another in its place
        is_valid = known is not None and not x.requires_grad and known[1] == self.linearization.network.fingerprint()
        if known is not None and is_valid and torch.equal(known[0].x, x.double()):
            return known[0]
        return self.linearization.jacobian(x.double(), keep=False)

    def starts_with(self, other: System) -> bool:
        """Whether the first rows of this system are the whole of another, of the same linearization and precision."""
        old, new = other.x.shape[1], self.x.shape[1]
        return (
            old < new
            and other.state == self.state
            and other.dtype == self.dtype
            and other.x.shape[2] == self.x.shape[2]
            and other.batch in (1, self.batch)
            and _same(other.variances, self.variances)
            and _same(other.x, self.x[:, :old])
            and _same(other.noise, self.noise[:, : other.noise.shape[1]])
        )

    def rows_after(self, other: System) -> System:
        """The system of the rows that this one has beyond another that it starts with."""
        x, noise = self.x[:, other.x.shape[1] :], self.noise[:, other.noise.shape[1] :]
        return System(self.linearization, x, self.variances, noise)

    def matmul(self, rhs: Tensor) -> Tensor:
        """A rhs, (B, N, r), from Jacobian products."""
        return self._kernel_matmul(rhs) + self.noise.unsqueeze(-1) * rhs

    def single_precision_matmul(self, rhs: Tensor) -> Tensor:
        """A rhs to the precision that is asked for: for float32 at several times the rate, from factors half as large.

        K's condition number may exceed that precision. Whoever iterates with this looks at the residual by `matmul`.
        """
        if self.dtype != torch.float32 or self.batch > 1:
            return self.matmul(rhs)
        jacobian = self._single_precision
        product = self.linearization.kernel_matmul(jacobian, jacobian, rhs.float(), self.variances.float())
        return product.double() + self.noise.unsqueeze(-1) * rhs

    @cached_property
    def _single_precision(self) -> Jacobian:
        """J(X) in float32."""
        return self.linearization.jacobian(self.x.float())

    def _kernel_matmul(self, rhs: Tensor) -> Tensor:
        batch, rows, columns = rhs.shape
        if batch == max(self.x.shape[0], self.variances.shape[0]):
            return self.linearization.kernel_matmul(self.jacobian, self.jacobian, rhs, self.variances)
        # One K for noises of several batches: they are more columns for it.
        flat = rhs.movedim(0, 1).reshape(1, rows, -1)
        product = self.linearization.kernel_matmul(self.jacobian, self.jacobian, flat, self.variances)
        return product.reshape(rows, batch, columns).movedim(0, 1)

    def dense(self) -> Tensor:
        """A, (B, N, N), in memory of its own."""
        gram = self.linearization.gram(self.jacobian, self.jacobian, self.variances)
        gram = gram.expand(self.batch, *gram.shape[-2:])
        if gram.stride(0) == 0 and self.batch > 1:
            gram = gram.clone()
        gram.diagonal(dim1=-2, dim2=-1).add_(self.noise)
        return gram

    def features(self, alpha: Tensor) -> Tensor:
        """Σ Jᵀ alpha: (B, N, r) to (B, P, r)."""
        return self.parameter_variances.unsqueeze(-1) * self.jacobian.vjp(alpha.mT).mT

    def cross(self, jacobian: Jacobian) -> Tensor:
        """K(X, x), (B, N, M); differentiable where the inputs of the Jacobian are."""
        if not jacobian.x.requires_grad:
            return self.jacobian.gram(jacobian, self.variances)
        tangents = jacobian.rows() * self.parameter_variances.unsqueeze(-2)
        return JacobianProduct.apply(tangents, self.jacobian).mT

    def fits(self, elements: float) -> bool:
        """Whether so many float64 numbers are within the memory budget."""
        return 8 * elements <= memory.SYSTEM.bytes(self.x.device)

    def check_finite(self, computed: Tensor) -> None:
        """Raises where what was computed from the Jacobian is NaN or infinite, naming the inputs that made it so."""
        if torch.isfinite(computed).all():
            return
        finite = torch.isfinite(self.jacobian.diagonal(self.variances))
        bad = (~finite).any(0).nonzero().squeeze(-1) // self.jacobian.function.num_outputs
        points = bad.unique()[:3].tolist()
        raise ValueError(
            f"The network's Jacobian is NaN or infinite at some training inputs, of shape {tuple(self.x.shape)}: first "
            f"in rows {points}. Check the network's weights and the scale of the inputs."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, up to batches that are one."""
    if a.shape[1:] != b.shape[1:] or (a.shape[0] != b.shape[0] and a.shape[0] != 1):
        return False
    return bool((a == b).all())
