"""Whether a neural tangent kernel is in a kernel, a model or a matrix: that decides whether GPyTorch's way is taken."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator.operators import LinearOperator
from torch import Tensor, nn

from .._compat import arguments_of, children_in, keyword_arguments_of
from ..jacobian.columns import Column
from ..network import FrozenNetwork
from ..operators import NTKAddedDiagLinearOperator, NTKLinearOperator
from ..operators._densely_solved import DenselySolved
from ..operators.ntk_block_linear_operators import NTKBlockDiagLinearOperator, NTKBlockInterleavedLinearOperator
from ..operators.ntk_interpolated_linear_operator import NTKInterpolatedLinearOperator
from ..operators.ntk_kronecker_linear_operator import NTKKroneckerLinearOperator
from ..operators.ntk_stationary_linear_operator import NTKStationaryLinearOperator
from ..operators.of_network_linear_operator import OfNetworkLinearOperator

# Solved by this package as they are.
SOLVED_OPERATORS = (
    NTKAddedDiagLinearOperator,
    NTKBlockDiagLinearOperator,
    NTKBlockInterleavedLinearOperator,
    NTKInterpolatedLinearOperator,
    NTKKroneckerLinearOperator,
)

# The matrices of a network's kernels themselves; each knows the state of its network.
_OF_NETWORKS = (NTKLinearOperator, NTKStationaryLinearOperator, OfNetworkLinearOperator)

# An evaluated matrix that an NTK is a part of has one of these in it.
_NTK_OPERATORS = (*_OF_NETWORKS, DenselySolved, *SOLVED_OPERATORS)


class NeuralTangentKernel(Kernel):
    """What a neural tangent kernel is recognised by, and any other kernel made of a network: it is of this class."""

    is_linear_in_weights = False
    """Whether `forward` gives an :class:`~ntk_gp.NTKLinearOperator`, and a sum with known features is another one."""

    is_by_output = False
    """Whether it is a batch of kernels, one for each output of the network."""


class KnownFeaturesKernel(NeuralTangentKernel):
    """A kernel of a few known features of the input and the network's value there, as it says itself."""

    @abstractmethod
    def known_features(self, x1: Tensor, x2: Tensor) -> list[tuple[Column, Tensor]] | None:
        """The features, each with the prior variances of its groups, (*batch, 1, groups); None if there are other ones
        at these inputs, (*batch, n, d). They are looked at, as `forward` would.

        They are functions of the inputs as the neural tangent kernel of the sum takes them: by output, or not."""


def named_modules_of(whole: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules()` gives them, but for those in snapshots of networks: deep networks have hundreds, each only
    there for its tensors."""
    seen: set[nn.Module] = set()
    pending = [("", whole)]
    while pending:
        name, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        if not isinstance(module, FrozenNetwork):
            children = [(key, child) for key, child in children_in(module).items() if child is not None]
            pending += [(f"{name}.{key}" if name else key, child) for key, child in reversed(children)]


def contains_ntk(whole: nn.Module | LinearOperator) -> bool:
    """Whether a neural tangent kernel is this kernel or a part of it, or of a model or a matrix, evaluated or not."""
    if isinstance(whole, nn.Module):
        return any(isinstance(module, NeuralTangentKernel) for _, module in named_modules_of(whole))
    if isinstance(whole, LazyEvaluatedKernelTensor):
        return contains_ntk(whole.kernel)
    return isinstance(whole, _NTK_OPERATORS) or any(contains_ntk(part) for part in parts_of(whole))


def networks_of(matrix: LinearOperator) -> set[int]:
    """The states of the networks whose kernels are parts of this matrix, as numbers."""
    if isinstance(matrix, _OF_NETWORKS):
        state = matrix.network_state
        return set() if state is None else {state}
    return set().union(*(networks_of(part) for part in parts_of(matrix)))


def parts_of(matrix: LinearOperator) -> list[LinearOperator]:
    """The matrices that this one is put together from; none for one of numbers."""
    return [
        part
        for part in (*arguments_of(matrix), *keyword_arguments_of(matrix).values())
        if isinstance(part, LinearOperator)
    ]
