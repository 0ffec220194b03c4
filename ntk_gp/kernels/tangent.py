"""Stationary kernels in the metric of the network's tangent kernel."""

from __future__ import annotations

import math

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from torch import Size, Tensor, nn

from ..jacobian.distances import squared_distances
from ..network import InputDtype, InputShape, Output, ParameterSelection
from ..operators.ntk_stationary_linear_operator import NTKStationaryLinearOperator
from .base import detached, refuse_last_dim_is_batch
from .metric import MetricKernel


class StationaryTangentKernel(MetricKernel):
    """k(d² / ℓ²), d the distance in the network's metric; what both kernels below are."""

    raw_lengthscale: nn.Parameter
    has_lengthscale = True
    nu = math.inf

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        engine: str | None = None,
        lengthscale_prior: Prior | None = None,
        lengthscale_constraint: Interval | None = None,
        batch_shape: Size | None = None,
        active_dims: tuple[int, ...] | None = None,
    ):
        super().__init__(
            network,
            engine,
            {
                "parameters": parameters,
                "input_shape": input_shape,
                "input_dtype": input_dtype,
                "output": output,
                "group_by": None,
            },
            lengthscale_prior=lengthscale_prior,
            lengthscale_constraint=lengthscale_constraint,
            batch_shape=batch_shape,
            active_dims=active_dims,
        )
        self.raw_lengthscale = nn.Parameter(self.raw_lengthscale.detach().to(self.network.device, self.network.dtype))

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params
    ) -> NTKStationaryLinearOperator | Tensor:
        refuse_last_dim_is_batch(last_dim_is_batch)
        x1, x2 = self._carried(x1, x2)
        lengthscale = self.lengthscale.to(x1.device)
        if not torch.is_grad_enabled():  # the matrix may be evaluated where gradients are on
            lengthscale, x1, x2 = lengthscale.detach(), *detached(x1, x2)
        x1, x2, function = self._rows(x1, x2)
        kernel_matrix = NTKStationaryLinearOperator(
            x1, x2, lengthscale, nu=self.nu, linearization=self._linearization, function=function
        )
        return kernel_matrix._diagonal() if diag else kernel_matrix

    def _distances(self, x: Tensor) -> Tensor:
        rows = self._rows(x, x)[0].detach()
        distances = squared_distances(self._linearization, rows.reshape(-1, *rows.shape[-2:])).flatten(0, 1)
        above = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        return distances[:, above].sqrt()


class TangentMaternKernel(StationaryTangentKernel):
    r"""A Matérn kernel in the metric of a trained network's tangent kernel.

    .. math::

        k(\boldsymbol x, \boldsymbol x') = M_\nu \bigl( d(\boldsymbol x, \boldsymbol x') / \ell \bigr), \qquad
        d^2(\boldsymbol x, \boldsymbol x') = \lVert \boldsymbol J(\boldsymbol x) - \boldsymbol J(\boldsymbol x')
        \rVert^2 = \Theta(\boldsymbol x, \boldsymbol x) + \Theta(\boldsymbol x', \boldsymbol x')
        - 2 \Theta(\boldsymbol x, \boldsymbol x')

    where :math:`\Theta` is the :class:`~ntk_gp.NTKKernel` of the network with prior variances of one. That is linear in
    its features, and cannot follow what lies outside of their span; this kernel can, and calls alike what the network
    tells apart by the same parameters. Its variance is one: put it in a :class:`~gpytorch.kernels.ScaleKernel`, and add
    it to the tangent kernel. :meth:`~ntk_gp.kernels.metric.MetricKernel.median_distance` tells the size of its
    lengthscale.

    It shares Jacobians and Gram matrices with other kernels made of the same network with the same options. Distances
    are computed in float64 from the Gram matrix, and kept for the inputs seen last within
    :class:`ntk_gp.settings.memory_budget`: a step of fitting is a few passes over N² numbers. They are known to about
    1e-8 of :math:`\Theta^{1/2}`, and are zero where two inputs are equal.

    :param network: The trained network, see :class:`~ntk_gp.NTKKernel`.
    :param nu: The smoothness: 0.5, 1.5 or 2.5.
    :param parameters: The parameters whose gradients are compared, see :class:`~ntk_gp.NTKKernel`.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: Index of the output to take, or `"all"`: each output then has distances of its own and no covariance
        with the others, point-major and output-minor, as in :class:`~ntk_gp.NTKKernel`.
    :param engine: See :class:`~ntk_gp.NTKKernel`.
    :param lengthscale_prior: Prior over the lengthscale, which is in units of d.
    :param lengthscale_constraint: Constraint on it. (Default: :class:`~gpytorch.constraints.Positive`.)
    :param batch_shape: The batch shape of the kernel.
    :param active_dims: The columns of the inputs that the network sees.

    :ivar torch.Tensor lengthscale: (*batch_shape, 1, 1).

    :raises ValueError: For another `nu`, and where :class:`~ntk_gp.NTKKernel` does.

    Example:
        >>> import gpytorch
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> x = torch.randn(5, 2)
        >>> kernel = TangentMaternKernel(network, nu=1.5)
        >>> kernel.lengthscale = kernel.median_distance(x)
        >>> gpytorch.kernels.ScaleKernel(kernel)(x).shape
        torch.Size([5, 5])
    """

    def __init__(
        self,
        network: nn.Module,
        nu: float = 1.5,
        *,
        parameters: ParameterSelection = None,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        engine: str | None = None,
        lengthscale_prior: Prior | None = None,
        lengthscale_constraint: Interval | None = None,
        batch_shape: Size | None = None,
        active_dims: tuple[int, ...] | None = None,
    ):
        if nu not in (0.5, 1.5, 2.5):
            raise ValueError(
                f"nu must be 0.5, 1.5 or 2.5, got {nu!r}. TangentRBFKernel is the limit of ever larger ones."
            )
        super().__init__(
            network,
            parameters=parameters,
            input_shape=input_shape,
            input_dtype=input_dtype,
            output=output,
            engine=engine,
            lengthscale_prior=lengthscale_prior,
            lengthscale_constraint=lengthscale_constraint,
            batch_shape=batch_shape,
            active_dims=active_dims,
        )
        self.nu = float(nu)


class TangentRBFKernel(StationaryTangentKernel):
    r"""The squared exponential kernel in the metric of a trained network's tangent kernel,
    :math:`\exp(-d^2(\boldsymbol x, \boldsymbol x') / 2 \ell^2)`.

    All else is as in :class:`TangentMaternKernel`.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> TangentRBFKernel(network)(torch.randn(5, 2)).shape
        torch.Size([5, 5])
    """
