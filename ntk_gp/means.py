"""The network as a prior mean."""

from __future__ import annotations

import torch
from gpytorch.means import Mean
from torch import Tensor, nn

from .network import FrozenNetwork, InputDtype, InputShape, Output, values_along
from .replacements.full_rate import FullRateLayers


class NetworkMean(Mean):
    r"""The trained network itself as a GP's mean function, :math:`m(x) = f(x; w_0)`.

    It keeps a frozen copy in eval mode, without parameters to train; the network that was passed is neither changed nor
    looked at again (see :class:`ntk_gp.network.FrozenNetwork`).

    :param network: The trained network.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: Index of the output to take; `"all"`, or a list of indices, for a multitask mean of shape
        (*batch, n, C); or `"batch"` for a mean of each output, (*batch, C, n), at inputs (n, d), (*batch, 1, n, d), or
        (*batch, C, n, d) where each output has its own; and the way to it, as for :class:`~ntk_gp.NTKKernel`.
    :param active_dims: The columns of the inputs that the network sees, as in kernels.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> NetworkMean(network)(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        active_dims: tuple[int, ...] | Tensor | None = None,
    ):
        super().__init__()
        self.network = FrozenNetwork(
            network, parameters="*", input_shape=input_shape, input_dtype=input_dtype, output=output
        )
        self.active_dims: Tensor | None
        self.register_buffer("active_dims", None if active_dims is None else torch.as_tensor(active_dims).long())
        self._prefix: _Prefix | None = None

    def linearize(self, network: nn.Module) -> None:
        """Takes a new snapshot, of this network, with the same options."""
        self.network = self.network.renewed(network)

    def __call__(self, x: Tensor) -> Tensor:
        given = self.network.flattened if self.active_dims is None else self.network.carried
        return super().__call__(given(x))

    def forward(self, x: Tensor) -> Tensor:
        """f(x): (*batch, n, d) to (*batch, n); (*batch, n, C) with `output="all"` or a list, and (*batch, C, n) with
        `output="batch"`."""
        if self.active_dims is not None:
            x = x.index_select(-1, self.active_dims)
        x = x.unsqueeze(-1) if x.dim() == 1 else x
        return self.network(x) if x.requires_grad else self._evaluate(x)

    def _evaluate(self, x: Tensor) -> Tensor:
        """f(x), reusing what the last inputs began with: GPyTorch puts the training inputs before every test input."""
        x = self.network.outputs.unrepeated(x)
        state = self.network.fingerprint(thorough=True)
        prefix = self._prefix  # other threads may put another in its place
        known = 0 if prefix is None else prefix.length_in(x, state)
        new = x[..., known:, :]
        if prefix is not None and known == x.shape[-2]:
            values = prefix.values[:0]  # the network, which need not have been tried, is not asked for nothing
        else:
            along = values_along(self.network, new)
            values = self.network.values(new, state, FullRateLayers()) if along is None else along
        if prefix is not None and known:
            begin = prefix.values[:known]
            new_values = values.reshape(*new.shape[:-1], values.shape[-1])
            values = torch.cat([begin.expand(*x.shape[:-2], *begin.shape), new_values], dim=-2).flatten(0, -2)
        shaped = self.network.outputs.shaped(values, x.shape[:-1])
        if x.dim() > 2 or (prefix is not None and known == len(x)):  # what follows all of these may be asked for next
            return shaped
        # What began both the last inputs and these is likely to begin the next; without much of that, start over.
        kept = known if 2 * known >= len(x) else len(x)
        if prefix is None or kept != len(prefix.x) or kept != known:
            self._prefix = _Prefix(x[:kept].clone(), values[:kept].clone(), state)
        return shaped

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_prefix": None}


class _Prefix:
    """The network's values, (n, C), at inputs seen before, (n, d), and the state of the network that they belong to."""

    def __init__(self, x: Tensor, values: Tensor, state: int):
        self.x = x
        self.values = values
        self.state = state

    def length_in(self, x: Tensor, state: int) -> int:
        """How many first rows of x, in each of its batches, these are."""
        old = self.x
        if state != self.state or (x.dtype, x.device, x.shape[-1]) != (old.dtype, old.device, old.shape[-1]):
            return 0
        length = min(x.shape[-2], len(old))
        if torch.equal(x[..., :length, :], old[:length].expand(*x.shape[:-2], length, -1)):
            return length
        different = (x[..., :length, :] != old[:length]).any(-1).reshape(x.shape[:-2].numel(), length)
        first = different.any(0).nonzero()
        return length if len(first) == 0 else int(first[0])
