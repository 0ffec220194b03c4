"""What kernels made of a network share: the frozen network, what it says of inputs, and batches that share it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import Kernel
from gpytorch.priors import Prior
from torch import Size, Tensor, nn

from .._compat import parameters_in
from ..bridge.prediction_strategies import NTKPredictionStrategy
from ..bridge.recognised import NeuralTangentKernel
from ..jacobian.linearization import Linearization
from ..jacobian.shared import linearization_of
from ..network import FrozenNetwork, are_one_slice, without_needless_graph
from ..stock import mark_botorchs


class NetworkKernel(NeuralTangentKernel):
    """A kernel of a frozen network, which it owns as buffers; with others made of the same network it shares what is
    computed from it.

    :param network: The trained network.
    :param engine: See :class:`~ntk_gp.NTKKernel`.
    :param network_options: What is chosen of it, see :class:`~ntk_gp.network.FrozenNetwork`.
    :param kernel_options: Those of :class:`gpytorch.kernels.Kernel`.
    """

    network: FrozenNetwork

    def __init__(self, network: nn.Module, engine: str | None, network_options: dict[str, Any], **kernel_options: Any):
        mark_botorchs()
        super().__init__(**kernel_options)
        self._engine = engine
        self._take(linearization_of(network, engine, **network_options))

    def _take(self, linearization: Linearization) -> None:
        self.network = linearization.network
        self._linearization = linearization

    def linearize(self, network: nn.Module) -> None:
        """Takes a new snapshot, of this network, with the same options, and drops everything computed from the last.

        A model's prediction caches are its own: call `model.train()` and `model.eval()` after this.
        """
        self._take(linearization_of(network, self._engine, **self.network.options))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and of the network, which `.to()` keeps the same, single precision at least.

        Results are in the inputs' dtype.
        """
        dtypes = self._dtypes()
        if len(dtypes) > 1:
            raise RuntimeError(
                f"The kernel's parameters have multiple dtypes: {dtypes}. Convert the kernel with .to(dtype)."
            )
        return dtypes.pop()

    def _dtypes(self) -> set[torch.dtype]:
        """Those that have to be one."""
        parameters = (torch.promote_types(parameter.dtype, torch.float32) for parameter in self.parameters())
        return {self.network.dtype, *parameters}

    @property
    def device(self) -> torch.device:
        return self.network.device

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """The kernel matrix of (*batch, n, d), or of (*batch, n, *input_shape)."""
        if self.active_dims is None:
            x1, x2 = self.network.flattened(x1), None if x2 is None else self.network.flattened(x2)
        return super().__call__(x1, x2, *args, **kwargs)

    def prediction_strategy(self, train_inputs, train_prior_dist, train_labels, likelihood) -> NTKPredictionStrategy:
        """GPyTorch asks for it, and serves every prediction by it."""
        return NTKPredictionStrategy(train_inputs, train_prior_dist, train_labels, likelihood)

    def named_sub_kernels(self) -> Iterator[tuple[str, Kernel]]:
        """None; GPyTorch would look for some among the modules of the network, whenever it needs the batch shape."""
        return iter(())

    def _active(self, x: Tensor) -> Tensor:
        """The columns that the network sees, of inputs as a user gives them."""
        x = self.network.flattened(x) if self.active_dims is None else x.index_select(-1, self.active_dims)
        return x.unsqueeze(-1) if x.dim() == 1 else x

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C with `output="all"`, else 1."""
        if self.active_dims is None:  # asked for before anything else, also by the kernels this one is in
            return self.network.num_outputs_per_row(x1)
        return self.network.num_outputs(x1)

    def expand_batch(self, *sizes: Size | tuple[int, ...] | int) -> Kernel:
        """The same kernel with a larger batch shape; shares the network."""
        shape = Size([n for size in sizes for n in ([size] if isinstance(size, int) else size)])
        if shape == self.batch_shape:
            return self
        return self._with_batches(
            shape, lambda raw: raw.expand(*shape, *raw.shape[-2:]), lambda kernel: kernel.expand_batch(shape)
        )

    def __getitem__(self, index: Any) -> Kernel:
        """The kernel of some of the batches; shares the network."""
        if not self.batch_shape:
            return self
        index = index if isinstance(index, tuple) else (index,)
        shape = torch.empty(self.batch_shape, device="meta")[index].shape
        return self._with_batches(
            shape, lambda raw: raw[(*index, slice(None), slice(None))], lambda kernel: kernel[index]
        )

    def _with_batches(
        self, batch_shape: Size, transform: Callable[[Tensor], Tensor], inner: Callable[[Kernel], Kernel]
    ) -> NetworkKernel:
        """A copy with other batches.

        :param transform: Of the parameters of its own.
        :param inner: Of the kernels inside of it.
        """
        new = copy.deepcopy(self)  # cheap: the network's tensors are shared
        new.batch_shape = batch_shape
        for name, parameter in parameters_in(self).items():
            if parameter is not None:
                setattr(new, name, nn.Parameter(transform(parameter.detach()).clone(), parameter.requires_grad))
        for name, kernel in self.named_sub_kernels():
            setattr(new, name, inner(kernel.expand_batch(self.batch_shape)))
        return new

    def _register_variance(
        self,
        name: str,
        closures: tuple[Callable[..., Tensor], Callable[..., None]],
        prior: Prior | None,
        constraint: Interval | None,
        groups: int = 1,
    ) -> None:
        """A parameter `raw_name`, (*batch, 1, groups), with its constraint, positive by default, and its prior.

        :param closures: What reads and sets its value, at the top of a module, so that it can be pickled.
        """
        zeros = torch.zeros(*self.batch_shape, 1, groups, dtype=self.network.dtype, device=self.network.device)
        self.register_parameter(f"raw_{name}", nn.Parameter(zeros))
        self.register_constraint(f"raw_{name}", constraint or Positive())
        if prior is None:
            return
        if not isinstance(prior, Prior):
            raise TypeError(f"Expected gpytorch.priors.Prior but got {type(prior).__name__}")
        self.register_prior(f"{name}_prior", prior, *closures)


def with_graphs_wanted(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Both without a graph where none is recorded, or it leads to no derivative; one set of inputs stays one."""
    if not (x1.requires_grad or x2.requires_grad):
        return x1, x2
    prepared = without_needless_graph if torch.is_grad_enabled() else Tensor.detach
    first = prepared(x1)
    return first, first if x2 is x1 or are_one_slice(x1, x2) else prepared(x2)


def refuse_last_dim_is_batch(last_dim_is_batch: bool) -> None:
    """Raises where each column of the inputs is to have a kernel of its own."""
    if last_dim_is_batch:
        raise NotImplementedError(
            "last_dim_is_batch asks for one kernel for each column of the inputs, and a trained network takes all of "
            "them at once. Use active_dims for some columns, or batch_shape for a batch of kernels."
        )
