"""Kernels on the features that a layer of the network computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor
from linear_operator import to_dense, to_linear_operator
from linear_operator.operators import LinearOperator
from torch import Size, Tensor, nn

from ..bridge.kernel_matrices import evaluated
from ..jacobian.linearization import Linearization
from ..network import (
    ALL_OUTPUTS,
    PENULTIMATE,
    InputDtype,
    InputShape,
    NetworkFunction,
    Output,
    head_of,
    layer_features,
    normal_tensor,
)
from ..operators._batches import are_one, flatten_batch
from ..operators.of_network_linear_operator import OfNetworkLinearOperator
from .base import refuse_last_dim_is_batch
from .metric import MetricKernel


class FeatureKernel(MetricKernel):
    r"""Any kernel of GPyTorch's on the features of a layer of a trained network.

    .. math::

        k(\boldsymbol x, \boldsymbol x') = k_0(\boldsymbol\phi(\boldsymbol x), \boldsymbol\phi(\boldsymbol x'))

    with :math:`\boldsymbol\phi(\boldsymbol x)`, F numbers, what the layer returns, flattened. The kernel owns a frozen
    copy of the network, in eval mode, as buffers; only the base kernel has parameters to fit, with the priors,
    constraints and lengthscales for each feature that it was given. Features are computed in the dtype and on the
    device of the inputs, are kept for the inputs seen last, and are differentiable with respect to the inputs.

    :param network: The trained network, see :class:`~ntk_gp.NTKKernel`.
    :param base_kernel: :math:`k_0`. Its `active_dims` and `ard_num_dims` are of features: :meth:`num_features` counts
        them.
    :param layer: The name of the layer, as `network.named_modules()` has it; or `"penultimate"`, what is given to the
        last module with a weight (a parameter of two dimensions or more) that a call begins to run: a classifier's or
        regressor's last linear layer.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: The way to a tensor in what the network returns, where it returns more, likewise; features do not
        depend on it.
    :param batch_shape: The batch shape of the kernel, beside that of the base kernel.
    :param active_dims: The columns of the inputs that the network sees.

    :raises TypeError: If the base kernel is none.
    :raises ValueError: At the first inputs, if the network has no such layer, or the layer is called more than once, or
        what it returns has no row for each input.

    Example:
        >>> import gpytorch
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(5, 2)
        >>> kernel = FeatureKernel(network, gpytorch.kernels.MaternKernel(nu=1.5))
        >>> kernel.num_features(x)
        16
        >>> kernel.base_kernel.lengthscale = kernel.median_distance(x)
        >>> kernel(x).shape
        torch.Size([5, 5])
    """

    def __init__(
        self,
        network: nn.Module,
        base_kernel: Kernel,
        layer: str = PENULTIMATE,
        *,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = ALL_OUTPUTS,
        batch_shape: Size | None = None,
        active_dims: tuple[int, ...] | None = None,
    ):
        if not isinstance(base_kernel, Kernel):
            raise TypeError(
                f"base_kernel must be a gpytorch.kernels.Kernel, got {type(base_kernel).__name__}. It comes after the "
                "network, e.g. FeatureKernel(network, gpytorch.kernels.MaternKernel())."
            )
        if not isinstance(layer, str):
            raise TypeError(f"layer must be the name of one of the network's modules, got {layer!r}.")
        options = {"parameters": "*", "input_shape": input_shape, "input_dtype": input_dtype, "output": output}
        super().__init__(network, None, options, batch_shape=batch_shape, active_dims=active_dims)
        self.base_kernel = base_kernel
        self.layer = layer

    def _take(self, linearization: Linearization) -> None:
        super()._take(linearization)
        self._head: str | None = None  # known once the network has been called

    def _dtypes(self) -> set[torch.dtype]:
        """Of the base kernel's parameters, or of the network where it has none."""
        return {parameter.dtype for parameter in self.parameters()} or {self.network.dtype}

    def features(self, x: Tensor) -> Tensor:
        """φ(x): (*batch, n, d) to (*batch, n, F)."""
        x = self._active(x)
        return self._features(x, self.network.bind(x))

    def num_features(self, x: Tensor) -> int:
        """F at inputs like these, (*batch, n, d): the `ard_num_dims` of a base kernel with a lengthscale for each."""
        x = self._active(x).detach()
        return self._features(x.flatten(0, -2)[:1], self.network.bind(x)).shape[-1]

    @classmethod
    def count_features(
        cls,
        network: nn.Module,
        x: Tensor,
        layer: str = PENULTIMATE,
        *,
        output: Output = ALL_OUTPUTS,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
    ) -> int:
        """The same before there is a base kernel.

        Example:
            >>> import gpytorch
            >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
            >>> F = FeatureKernel.count_features(network, torch.randn(5, 2))
            >>> kernel = FeatureKernel(network, gpytorch.kernels.RBFKernel(ard_num_dims=F))
        """
        return cls(
            network, Kernel(), layer, input_shape=input_shape, input_dtype=input_dtype, output=output
        ).num_features(x)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params
    ) -> LinearOperator | Tensor:
        refuse_last_dim_is_batch(last_dim_is_batch)
        x1, x2 = self._carried(x1, x2)
        function = self.network.bind(x1, x2)
        features1 = self._features(x1, function)
        features2 = features1 if are_one(x1, x2) else self._features(x2, function)
        result = self.base_kernel(features1, features2, diag=diag, **params)
        if diag:
            return to_dense(result).to(x1.dtype)
        if isinstance(result, LazyEvaluatedKernelTensor):
            result = evaluated(result)
        matrix = to_linear_operator(result)
        matrix = matrix if matrix.dtype == x1.dtype else matrix.to(x1.dtype)
        batch_shape = torch.broadcast_shapes(matrix.batch_shape, self.batch_shape)
        matrix = matrix if matrix.batch_shape == batch_shape else matrix.expand(*batch_shape, *matrix.matrix_shape)
        return OfNetworkLinearOperator(matrix, network_state=function.state)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> Any:
        """That of the base kernel."""
        return self.base_kernel.num_outputs_per_input(x1, x2)

    def named_sub_kernels(self) -> Iterator[tuple[str, Kernel]]:
        """The base kernel alone; GPyTorch would look among the modules of the network."""
        yield "base_kernel", self.base_kernel

    def _features(self, x: Tensor, function: NetworkFunction) -> Tensor:
        """φ(x), for inputs that have been looked at."""
        if torch.is_grad_enabled() and x.requires_grad:
            function.check_input_gradients(x)
            return self._computed(function, x.flatten(0, -2)).reshape(*x.shape[:-1], -1)
        flat = flatten_batch(normal_tensor(x.detach()))

        def compute(points: Tensor) -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return self._computed(function, points.flatten(0, -2)).reshape(*points.shape[:-1], -1)

        features = self._linearization.keep(f"features of {self.layer}", (flat,), compute, function.state)
        return features.expand(x.shape[:-2].numel(), -1, -1).reshape(*x.shape[:-1], -1)

    def _computed(self, function: NetworkFunction, x: Tensor) -> Tensor:
        """(n, d) to (n, F)."""
        if self.layer != PENULTIMATE:
            return layer_features(function, x, self.layer)
        if self._head is None:
            self._head = head_of(function, x)
        return layer_features(function, x, self._head, of_input=True)

    def _distances(self, x: Tensor) -> Tensor:
        return torch.pdist(self._features(x, self.network.bind(x)).double())
