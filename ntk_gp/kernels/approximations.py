"""Kernels made of the neural tangent kernel that are not it: normalised to correlations, and projected at random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpytorch.kernels import Kernel
from linear_operator import to_dense
from linear_operator.operators import LinearOperator, MatmulLinearOperator, to_linear_operator
from torch import Size, Tensor, nn

from ..jacobian.base import Jacobian
from ..network import InputDtype, InputShape, Output, ParameterSelection, normal_tensor
from ..operators._batches import are_one, flatten_batch
from ..operators.of_network_linear_operator import OfNetworkLinearOperator
from .base import NetworkKernel, refuse_last_dim_is_batch, with_graphs_wanted
from .ntk import NTKKernel

# Columns of the projection that are drawn together, each block from a seed of its own: never changed, or a seed would
# mean other columns.
_BLOCK = 16


class CosineNTKKernel(NetworkKernel):
    r"""The neural tangent kernel as a correlation, :math:`k(x, x') / \sqrt{k(x, x)\, k(x', x')}`.

    It is no linear model in the network's weights any more: the length of a gradient, which says how much the
    network's output there moves with its weights, is left out, and its direction kept. The variance is one everywhere.
    Prior variances of the kernel within enter the norm, a common factor has no effect. Its matrix is dense, n² numbers,
    and solved by a Cholesky factorisation.

    :param base_kernel: The :class:`~ntk_gp.NTKKernel`, without a scale.

    :raises TypeError: If it is of another kind.
    :raises ValueError: At inputs where all derivatives are zero: there is no direction.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> kernel = CosineNTKKernel(NTKKernel(network))
        >>> kernel(torch.randn(5, 2)).diagonal().tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, base_kernel: NTKKernel):
        if not isinstance(base_kernel, NTKKernel):
            raise TypeError(
                f"Expected an NTKKernel to normalise, got {type(base_kernel).__name__}. Put a ScaleKernel around this "
                "kernel, not within."
            )
        Kernel.__init__(self, batch_shape=base_kernel.batch_shape)
        self.base_kernel = base_kernel
        self._engine = base_kernel._engine

    @property
    def network(self) -> Any:  # type: ignore[override]
        """That of the kernel within."""
        return self.base_kernel.network

    def linearize(self, network: nn.Module) -> None:
        self.base_kernel.linearize(network)

    def named_sub_kernels(self) -> Iterator[tuple[str, Kernel]]:
        yield "base_kernel", self.base_kernel

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        return self.base_kernel.num_outputs_per_input(x1, x2)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> LinearOperator | Tensor:
        x1, x2 = with_graphs_wanted(x1, x2)
        same = are_one(x1, x2)
        norms1 = self._norms(x1, **params)
        norms2 = norms1 if same else self._norms(x2, **params)
        if diag and same:
            return torch.ones_like(norms1)
        values = self.base_kernel(x1, x2, diag=diag, **params)
        if diag:
            return values / (norms1 * norms2)
        matrix = to_dense(values) / (norms1.unsqueeze(-1) * norms2.unsqueeze(-2))
        if same:
            matrix = matrix - matrix.diagonal(dim1=-2, dim2=-1).sub(1.0).diag_embed()  # one to the last bit
        return OfNetworkLinearOperator(to_linear_operator(matrix), network_state=self.network.fingerprint())

    def _norms(self, x: Tensor, **params: Any) -> Tensor:
        """√k(x, x), (*batch, n·C)."""
        squares = self.base_kernel(x, diag=True, **params)
        if not (squares > 0).all():
            first = (~(squares > 0)).nonzero()[0].tolist()
            raise ValueError(
                f"All derivatives of the network are zero in row {first[-1]}, so that its gradient has no direction "
                "there. Use NTKKernel, or leave such inputs out."
            )
        return squares.sqrt()


class RandomProjectionNTKKernel(NetworkKernel):
    r"""An approximation of the neural tangent kernel by q random features, :math:`J(x) R R^\top J(x')^\top`.

    The entries of R are :math:`\pm 1/\sqrt q`, independent and equally likely, so that the matrix is the kernel's in
    expectation; :meth:`standard_error` tells what it is off by, about :math:`\sqrt{2/q}` of the variance. It is for
    networks of so many parameters that the exact kernel's cost matters more than that: elsewhere
    :class:`~ntk_gp.NTKKernel` is exact, and often cheaper. Costs q Jacobian-vector products at each set of inputs;
    R is drawn in blocks from the seed, on the CPU, the same on every device, and never held as a whole.

    Prior variances are one: put it in a :class:`~gpytorch.kernels.ScaleKernel`.

    :param network: The trained network, see :class:`~ntk_gp.NTKKernel`.
    :param num_features: q.
    :param seed: Of R.
    :param parameters: See :class:`~ntk_gp.NTKKernel`.
    :param input_shape: See :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: See :class:`~ntk_gp.NTKKernel`.
    :param output: See :class:`~ntk_gp.NTKKernel`.
    :param engine: See :class:`~ntk_gp.NTKKernel`.
    :param batch_shape: The batch shape of the kernel.
    :param active_dims: The columns of the inputs that the network sees.

    :raises ValueError: If there are fewer than two features, which say nothing of their error.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> kernel = RandomProjectionNTKKernel(network, num_features=64)
        >>> x = torch.randn(5, 2)
        >>> kernel(x).shape, kernel.standard_error(x).shape
        (torch.Size([5, 5]), torch.Size([5, 5]))
    """

    def __init__(
        self,
        network: nn.Module,
        num_features: int,
        *,
        seed: int = 0,
        parameters: ParameterSelection = None,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        engine: str | None = None,
        batch_shape: Size | None = None,
        active_dims: tuple[int, ...] | None = None,
    ):
        if num_features < 2:
            raise ValueError(f"num_features must be 2 or more, got {num_features}.")
        inputs = {"input_shape": input_shape, "input_dtype": input_dtype}
        options = {"parameters": parameters, **inputs, "output": output}
        super().__init__(network, engine, options, batch_shape=batch_shape, active_dims=active_dims)
        if self.is_by_output:
            raise NotImplementedError(
                "A batch of outputs (output='batch') is not projected. Make a kernel for each output, or use NTKKernel."
            )
        self.num_features, self.seed = num_features, seed

    def features(self, x: Tensor) -> Tensor:
        """J(x) R, (*batch, n, d) to (*batch, n·C, q)."""
        return self._features(self._active(x))

    def standard_error(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        """The standard error of each entry, (*batch, n₁·C, n₂·C): from how its q independent terms differ."""
        one = self.features(x1)
        other = one if x2 is None else self.features(x2)
        # Terms q φ_j φ'_j, whose mean is the entry; sums of their squares are a product of squares.
        q = self.num_features
        squares = q * (one.square() @ other.square().mT)
        return ((squares - (one @ other.mT).square()).clamp(min=0.0) / (q - 1)).sqrt()

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **_: Any
    ) -> LinearOperator | Tensor:
        refuse_last_dim_is_batch(last_dim_is_batch)
        x1, x2 = with_graphs_wanted(*self._carried(x1, x2))
        function = self.network.bind(x1, x2)
        one = self._features(x1)
        other = one if are_one(x1, x2) else self._features(x2)
        if diag:
            return (one * other).sum(-1).expand(*torch.broadcast_shapes(one.shape[:-2], self.batch_shape), -1)
        matrix: LinearOperator = MatmulLinearOperator(one, other.mT)
        shape = torch.broadcast_shapes(matrix.batch_shape, self.batch_shape)
        matrix = matrix if matrix.batch_shape == shape else matrix.expand(*shape, *matrix.matrix_shape)
        return OfNetworkLinearOperator(matrix, network_state=function.state)

    def _features(self, x: Tensor) -> Tensor:
        function = self.network.bind(x)
        if torch.is_grad_enabled() and x.requires_grad:
            jacobian = self._linearization.jacobian(x.reshape(-1, *x.shape[-2:]))
            return self._projected(jacobian).reshape(*x.shape[:-2], -1, self.num_features)
        flat = flatten_batch(normal_tensor(x.detach()))

        def compute(points: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return self._projected(self._linearization.jacobian(points))

        kind = f"{self.num_features} random projections of seed {self.seed}"
        found = self._linearization.keep(kind, (flat,), compute, function.state)
        return found.expand(x.shape[:-2].numel(), -1, -1).reshape(*x.shape[:-2], -1, self.num_features)

    def _projected(self, jacobian: Jacobian) -> Tensor:
        """J R, (B, n·C, q), a block of columns at a time."""
        pieces = [jacobian.jvp(block.unsqueeze(0)) for block in self._blocks(jacobian)]
        return torch.cat(pieces, dim=1).mT * self.num_features**-0.5

    def _blocks(self, jacobian: Jacobian) -> Iterator[Tensor]:
        """Rows of ±1, the columns of R without their factor."""
        for start in range(0, self.num_features, _BLOCK):
            generator = torch.Generator(device="cpu").manual_seed((self.seed << 24) + start)
            shape = (_BLOCK, jacobian.function.num_parameters)
            signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device="cpu")
            yield signs[: self.num_features - start].to(jacobian.x) * 2 - 1
