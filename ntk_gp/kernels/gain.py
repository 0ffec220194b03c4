"""The gain: a factor of the trained network, and an offset, that are not known exactly."""

from __future__ import annotations

from typing import Any

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from linear_operator.operators import LinearOperator, LowRankRootLinearOperator, MatmulLinearOperator
from torch import Size, Tensor, nn

from ..bridge.recognised import KnownFeaturesKernel
from ..jacobian.columns import Column, Ones, Values, features
from ..network import InputDtype, InputShape, NetworkFunction, Output, normal_tensor
from .base import NetworkKernel, refuse_last_dim_is_batch, with_graphs_wanted


class GainKernel(NetworkKernel, KnownFeaturesKernel):
    r"""A trained network's gain and offset, integrated out.

    .. math::

        k(\boldsymbol x, \boldsymbol x') = s_a f(\boldsymbol x) f(\boldsymbol x')^\top + s_b

    It is the covariance of :math:`a f(\boldsymbol x) + b` with :math:`a \sim N(1, s_a)` and :math:`b \sim N(0, s_b)`,
    for each output by itself: in a new domain, a network is often right up to its scale and level. Beside
    :class:`~ntk_gp.means.NetworkMean` and an :class:`~ntk_gp.NTKKernel`,
    `NTKKernel(network) + GainKernel(network)` is one linear model in P + 2C weights: it is solved, fitted, served and
    sampled as the neural tangent kernel alone is, also with GPyTorch's ConstantKernel and LinearKernel in the sum, each
    in a :class:`~gpytorch.kernels.ScaleKernel` or not. In other sums and products it is exact as any kernel is.

    The kernel owns a frozen copy of the network, as NTKKernel does. Costs a pass through the network at each new
    input; its matrix has rank 2C, and is as low a rank as that where it stands alone.

    :param network: The trained network.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: Index of the output to take of a network with several; `"all"`, or a list of indices, for a kernel of
        size (n·C)×(n·C), point-major and output-minor, zero between outputs; `"batch"` for a kernel of each output,
        (C, n, n); and the way to it, as in :class:`~ntk_gp.NTKKernel`.
    :param gain_variance_prior: Prior over :math:`s_a`.
    :param gain_variance_constraint: Constraint on :math:`s_a`. (Default:
        :class:`~gpytorch.constraints.Positive`.)
    :param offset_variance_prior: Prior over :math:`s_b`, in units of the targets squared.
    :param offset_variance_constraint: Constraint on :math:`s_b`. (Default: `Positive`.)
    :param batch_shape: The batch shape of the kernel, which ends in C with `output="batch"`.
    :param active_dims: The columns of the inputs that the network sees.

    :ivar torch.Tensor gain_variance: :math:`s_a`, (*batch_shape, 1, 1), without a unit.
    :ivar torch.Tensor offset_variance: :math:`s_b`, (*batch_shape, 1, 1).

    :raises ValueError: As :class:`~ntk_gp.NTKKernel`.

    Example:
        >>> from ntk_gp import NTKKernel
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> covar_module = NTKKernel(network) + GainKernel(network)
        >>> covar_module(torch.randn(5, 2)).shape
        torch.Size([5, 5])
    """

    raw_gain_variance: nn.Parameter
    raw_gain_variance_constraint: Interval
    raw_offset_variance: nn.Parameter
    raw_offset_variance_constraint: Interval

    def __init__(
        self,
        network: nn.Module,
        *,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        gain_variance_prior: Prior | None = None,
        gain_variance_constraint: Interval | None = None,
        offset_variance_prior: Prior | None = None,
        offset_variance_constraint: Interval | None = None,
        batch_shape: Size | None = None,
        active_dims: tuple[int, ...] | None = None,
    ):
        options = {"parameters": "*", "input_shape": input_shape, "input_dtype": input_dtype, "output": output}
        super().__init__(network, None, options, batch_shape=batch_shape, active_dims=active_dims)
        gain, offset = (_get_gain_variance, _set_gain_variance), (_get_offset_variance, _set_offset_variance)
        self._register_variance("gain_variance", gain, gain_variance_prior, gain_variance_constraint)
        self._register_variance("offset_variance", offset, offset_variance_prior, offset_variance_constraint)

    @property
    def gain_variance(self) -> Tensor:
        return self.raw_gain_variance_constraint.transform(self.raw_gain_variance)

    @gain_variance.setter
    def gain_variance(self, value: float | Tensor) -> None:
        _set_gain_variance(self, value)

    @property
    def offset_variance(self) -> Tensor:
        return self.raw_offset_variance_constraint.transform(self.raw_offset_variance)

    @offset_variance.setter
    def offset_variance(self, value: float | Tensor) -> None:
        _set_offset_variance(self, value)

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> LinearOperator | Tensor:
        x1, x2 = self._carried(x1, x2)
        x1, x2 = with_graphs_wanted(x1, x2)  # the matrix may be evaluated where gradients are on
        refuse_last_dim_is_batch(last_dim_is_batch and self.network.outputs.is_batch)
        if last_dim_is_batch:
            x1, x2 = (x.transpose(-1, -2).unsqueeze(-1) for x in (x1, x2))
        x1, x2, function = self._rows(x1, x2)
        columns, variances = zip(*self._columns(x1, function), strict=True)
        if last_dim_is_batch:
            variances = tuple(variance.unsqueeze(-3) for variance in variances)
        same = x2 is x1 or (x1.shape == x2.shape and not _needs_gradient(x1, x2) and torch.equal(x1, x2))
        left = self._features(columns, x1)
        right = left if same else self._features(columns, x2)
        outputs = left.shape[-1] // 2
        by_column = torch.cat([variance.expand(*variance.shape[:-1], outputs) for variance in variances], dim=-1)
        shape = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2], by_column.shape[:-2])
        if diag:
            return (left * right * by_column).sum(-1).expand(*shape, left.shape[-2])
        left = left.expand(*shape, *left.shape[-2:])
        if same:
            return self._square(left, by_column)
        return MatmulLinearOperator(left * by_column, right.expand(*shape, *right.shape[-2:]).mT)

    @staticmethod
    def _square(left: Tensor, by_column: Tensor) -> LinearOperator:
        """Ψ S Ψᵀ, as a root where S has one that can be differentiated."""
        if left.shape[-1] < left.shape[-2] and bool((by_column > 0).all()):
            return LowRankRootLinearOperator(left * by_column.sqrt())
        return MatmulLinearOperator(left * by_column, left.mT)

    def features(self, x: Tensor) -> Tensor:
        """f(x) and 1, for each output by itself: (*batch, n, d) to (*batch, n·C, 2C), or to (*batch, C, n, 2) with
        `output="batch"`."""
        x = self._active(x)
        rows, _, function = self._rows(x, x)
        return self._features(tuple(column for column, _ in self._columns(rows, function)), rows)

    def known_features(self, x1: Tensor, x2: Tensor) -> list[tuple[Column, Tensor]]:
        rows, _, function = self._rows(x1, x2)
        return self._columns(rows, function)

    def _columns(self, rows: Tensor, function: NetworkFunction) -> list[tuple[Column, Tensor]]:
        """The features of rows that were looked at, and their variances."""
        variances = [v.to(rows.device, rows.dtype) for v in (self.gain_variance, self.offset_variance)]
        if not torch.is_grad_enabled():
            variances = [variance.detach() for variance in variances]
        outputs, network = function.num_outputs, self._linearization.network
        return [(Values(outputs, network), variances[0]), (Ones(outputs), variances[1])]

    def _features(self, columns: tuple[Column, ...], x: Tensor) -> Tensor:
        """Ψ(x), (*batch, n·C, 2C); kept for the inputs seen last."""
        flat = x.reshape(-1, *x.shape[-2:])
        if torch.is_grad_enabled() and x.requires_grad:
            out = features(columns, flat)
        else:
            with torch.inference_mode(False), torch.no_grad():
                key = tuple(column.key for column in columns)
                given = normal_tensor(flat.detach())
                out = self._linearization.keep(f"features {key}", (given,), lambda x: features(columns, x))
        return out.reshape(*x.shape[:-2], *out.shape[-2:])


def _needs_gradient(*inputs: Tensor) -> bool:
    """Each of them may have one of its own, however equal they are."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _get_gain_variance(kernel: GainKernel) -> Tensor:
    return kernel.gain_variance


def _set_gain_variance(kernel: GainKernel, value: float | Tensor) -> None:
    _set(kernel, "raw_gain_variance", value)


def _get_offset_variance(kernel: GainKernel) -> Tensor:
    return kernel.offset_variance


def _set_offset_variance(kernel: GainKernel, value: float | Tensor) -> None:
    _set(kernel, "raw_offset_variance", value)


def _set(kernel: GainKernel, raw_name: str, value: float | Tensor) -> None:
    raw = getattr(kernel, raw_name)
    value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
    if value.dim() and value.shape == kernel.batch_shape:
        value = value[..., None, None]
    kernel.initialize(**{raw_name: kernel.constraint_for_parameter_name(raw_name).inverse_transform(value)})
