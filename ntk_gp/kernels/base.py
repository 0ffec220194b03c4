"""What kernels made of a network share: the frozen network, what it says of inputs, and batches that share it."""

from __future__ import annotations

import copy
import warnings
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
from ..jacobian.by_output import LinearizationByOutput
from ..jacobian.linearization import Linearization
from ..jacobian.shared import linearization_of
from ..network import OUTPUTS_AS_BATCH, FrozenNetwork, NetworkFunction, count_outputs, numbered
from ..operators._batches import are_one
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
    _output_numbers: Tensor | None  # of a batch of outputs, (*batch, 1, 1)

    def __init__(self, network: nn.Module, engine: str | None, network_options: dict[str, Any], **kernel_options: Any):
        mark_botorchs()
        linearization = linearization_of(network, engine, **network_options)
        if linearization.network.outputs.is_batch:
            kernel_options["batch_shape"] = batch_of_outputs(linearization.network, kernel_options.get("batch_shape"))
        super().__init__(**kernel_options)
        self._engine = engine
        self._given_batch = Size(kernel_options.get("batch_shape") or ())
        self._take(linearization)
        numbers = None
        if self.network.outputs.is_batch:
            numbers = torch.arange(self.batch_shape[-1]).expand(self.batch_shape)[..., None, None].clone()
        self.register_buffer("_output_numbers", numbers, persistent=False)

    def _take(self, linearization: Linearization) -> None:
        self.network = linearization.network
        is_batch = self.network.outputs.is_batch
        self._linearization = LinearizationByOutput(linearization) if is_batch else linearization
        self._states_checked: set[int | None] = set()  # one with the copies in which matrices are evaluated

    def _rows(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, NetworkFunction]:
        """The inputs as kernel matrices take them, looked at, and the network as it was bound to them.

        In a batch of outputs they carry the number of the output, and have the kernel's batches.
        """
        function = self.network.bind(x1, x2)
        self._check_outputs(function)
        numbers = self._output_numbers
        if numbers is None:
            return x1, x2, function
        assert isinstance(self._linearization, LinearizationByOutput)
        rows1 = numbered(x1, numbers)
        rows2 = rows1 if are_one(x1, x2) else numbered(x2, numbers)
        return rows1, rows2, self._linearization.network.by_output(function)

    def _check_outputs(self, function: NetworkFunction) -> None:
        """Raises where a batch is of another number of outputs than the network has, and warns where one is repeated
        for each of them; once for each state of the network."""
        if not self._given_batch or function.state in self._states_checked:
            return
        batches, outputs = self._given_batch[-1], function.network_outputs
        if self.network.outputs.is_batch and batches != outputs:
            raise ValueError(
                f"batch_shape={tuple(self._given_batch)} ends in {batches}, but output='{OUTPUTS_AS_BATCH}' is a "
                f"kernel for each output, and the network has {outputs}. Give batch_shape=torch.Size([{outputs}]), or "
                "leave it out."
            )
        if isinstance(self.network.outputs.chosen, int) and batches == outputs > 1:
            warnings.warn(
                f"All {batches} kernels of batch_shape={tuple(self._given_batch)} are of output "
                f"{self.network.outputs.chosen} of the network, which has {outputs}. For a kernel of each output, give "
                f"output='{OUTPUTS_AS_BATCH}'.",
                UserWarning,
                stacklevel=2,
            )
        self._states_checked.add(function.state)

    def linearize(self, network: nn.Module) -> None:
        """Takes a new snapshot, of this network, with the same options, and drops everything computed from the last.

        A model's prediction caches are its own: call `model.train()` and `model.eval()` after this.
        """
        self._take(linearization_of(network, self._engine, **self.network.options))

    @property
    def is_by_output(self) -> bool:  # type: ignore[override]
        return self.network.outputs.is_batch

    @property
    def outputs_of_batches(self) -> Tensor:
        """Which output each kernel of a batch of them is of, (*batch_shape)."""
        assert self._output_numbers is not None
        return self._output_numbers[..., 0, 0]

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
        given = self.network.flattened if self.active_dims is None else self.network.carried
        x1, x2 = given(x1), None if x2 is None else given(x2)
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
        x = self.network.carried(x)
        return x.unsqueeze(-1) if x.dim() == 1 else x

    def _carried(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Both in a floating-point dtype, as kernels around this one do not see to; one set of inputs stays one."""
        first = self.network.carried(x1)
        return first, first if x2 is x1 else self.network.carried(x2)

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """C with `output="all"`, k with a list of k, else 1."""
        x1 = self.network.carried(x1)
        if self.active_dims is None:  # asked for before anything else, also by the kernels this one is in
            self.network.check_width(x1)
        return 1 if self.network.outputs.is_batch else self.network.num_outputs(x1)

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
        if self._output_numbers is not None:
            new._output_numbers = transform(self._output_numbers)
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


def batch_of_outputs(network: FrozenNetwork, given: Size | None) -> Size:
    """The batch shape of a kernel for each output: the one that is given, or as many as the network has.

    :raises ValueError: If none is given, and the network does not tell before it is given inputs.
    """
    if given:
        return Size(given)
    outputs = count_outputs(network)
    if outputs is None:
        raise ValueError(
            f"How many outputs the network has is not known before it is given inputs: output='{OUTPUTS_AS_BATCH}' "
            "needs batch_shape=torch.Size([C]), or input_shape= for it to be tried."
        )
    return Size([outputs])


def detached(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Both without a graph; one set of inputs stays one."""
    first = x1.detach()
    return first, first if x2 is x1 else x2.detach()


def refuse_last_dim_is_batch(last_dim_is_batch: bool) -> None:
    """Raises where each column of the inputs is to have a kernel of its own."""
    if last_dim_is_batch:
        raise NotImplementedError(
            "last_dim_is_batch asks for one kernel for each column of the inputs, and a trained network takes all of "
            "them at once. Use active_dims for some columns, or batch_shape for a batch of kernels."
        )
