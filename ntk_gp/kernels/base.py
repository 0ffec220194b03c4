"""What kernels made of a network share: the frozen network, what it says of inputs, and batches that share it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import Kernel
from torch import Size, Tensor, nn

from .._compat import parameters_in
from ..bridge.recognised import NeuralTangentKernel
from ..network import FrozenNetwork, NetworkFunction, check_tensor


class NetworkKernel(NeuralTangentKernel):
    """A kernel that owns a frozen copy of a network, as buffers.

    :ivar network: The frozen network, set by the subclass.
    """

    network: FrozenNetwork

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and of the network, which `.to()` keeps the same, single precision at least.

        Results are in the inputs' dtype.
        """
        parameters = (torch.promote_types(parameter.dtype, torch.float32) for parameter in self.parameters())
        dtypes = {self.network.dtype, *parameters}
        if len(dtypes) > 1:
            raise RuntimeError(
                f"The kernel's parameters have multiple dtypes: {dtypes}. Convert the kernel with .to(dtype)."
            )
        return dtypes.pop()

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The kernel matrix of (*batch, n, d), or of (*batch, n, *input_shape)."""
        if self.active_dims is None:
            x1, x2 = self.network.flattened(x1), None if x2 is None else self.network.flattened(x2)
        return super().__call__(x1, x2, *args, **kwargs)

    def named_sub_kernels(self) -> Iterator[tuple[str, Kernel]]:
        """None; GPyTorch would look for some among the modules of the network, whenever it needs the batch shape."""
        return iter(())

    def _bind(self, x1: Tensor, x2: Tensor) -> NetworkFunction:
        """What serves both sets of inputs, which are looked at here, and once."""
        if x2 is x1:
            return self.network.bind(x1)
        for given in (x1, x2):
            check_tensor(given)
        if (x1.dtype, x1.device) != (x2.dtype, x2.device):
            raise ValueError(
                f"The two sets of inputs differ: {x1.dtype} on {x1.device}, and {x2.dtype} on {x2.device}. "
                "Convert one with .to() to the dtype and device of the other."
            )
        return self.network.bind(x1, x2)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C with `output="all"`, else 1."""
        if self.active_dims is None:  # asked for before anything else, also by the kernels this one is in
            return self.network.num_outputs_per_row(x1)
        return self.network.num_outputs(x1)

    def expand_batch(self, *sizes: Size | tuple[int, ...] | int) -> NetworkKernel:
        """The same kernel with a larger batch shape; shares the network."""
        shape = Size([n for size in sizes for n in ([size] if isinstance(size, int) else size)])
        if shape == self.batch_shape:
            return self
        return self._with_batch_shape(shape, lambda raw: raw.expand(*shape, *raw.shape[-2:]))

    def __getitem__(self, index) -> NetworkKernel:
        """The kernel of some of the batches; shares the network."""
        if not self.batch_shape:
            return self
        index = index if isinstance(index, tuple) else (index,)
        shape = torch.empty(self.batch_shape, device="meta")[index].shape
        return self._with_batch_shape(shape, lambda raw: raw[(*index, slice(None), slice(None))])

    def _with_batch_shape(self, batch_shape: Size, transform: Callable[[Tensor], Tensor]) -> NetworkKernel:
        new = copy.deepcopy(self)  # cheap: the network's tensors are shared
        new.batch_shape = batch_shape
        for name, raw in parameters_in(self).items():  # (*batch, 1, k), each of them
            setattr(new, name, nn.Parameter(transform(raw.detach()).clone(), raw.requires_grad))
        return new

    def _register_variance(self, raw_name: str, constraint: Interval | None) -> None:
        """A parameter of this name, (*batch, 1, 1), with its constraint, positive by default."""
        zeros = torch.zeros(*self.batch_shape, 1, 1, dtype=self.network.dtype, device=self.network.device)
        self.register_parameter(raw_name, nn.Parameter(zeros))
        self.register_constraint(raw_name, Positive() if constraint is None else constraint)
