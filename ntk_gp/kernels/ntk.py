"""The neural tangent kernel."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpytorch.constraints import Interval
from gpytorch.priors import Prior
from torch import Size, Tensor, nn

from .._compat import parameters_in
from ..jacobian.shared import linearization_of
from ..network import InputDtype, InputShape, Output, ParameterSelection
from ..operators import JacobianLinearOperator, NTKLinearOperator
from ..operators._batches import flatten_batch
from .base import NetworkKernel, detached, refuse_last_dim_is_batch
from .normalization import Normalization


class NTKKernel(NetworkKernel):
    r"""The empirical neural tangent kernel of a trained network.

    .. math::

        k(\boldsymbol x, \boldsymbol x') = \boldsymbol J(\boldsymbol x) \boldsymbol\Sigma
        \boldsymbol J(\boldsymbol x')^\top, \qquad
        \boldsymbol J(\boldsymbol x) = \partial f(\boldsymbol x; \boldsymbol w) / \partial \boldsymbol w
        \text{ at the trained weights}

    A Gaussian process with this kernel and :class:`~ntk_gp.means.NetworkMean` is Bayesian linear regression on the
    network's Jacobian, with prior :math:`\boldsymbol w - \boldsymbol w_0 \sim N(0, \boldsymbol\Sigma)` (Maddox, Tang,
    Moreno, Wilson and Damianou, "Fast Adaptation with Linearized Neural Networks", AISTATS 2021). Without
    `variance_groups`, :math:`\boldsymbol\Sigma = \boldsymbol I`; put it in a :class:`~gpytorch.kernels.ScaleKernel` to
    learn its scale.

    The kernel owns a frozen copy of the network, in eval mode, as buffers: the network passed is never changed, and
    later changes of it have no effect here. Computation happens in the dtype and on the device of the inputs. Results
    for the inputs seen last are reused while the network stays the same, within :class:`ntk_gp.settings.memory_budget`.

    :param network: The trained network: a module that maps (n, d) inputs, or (n, *input_shape), to n outputs or n×C,
        each row from its own input alone.
    :param parameters: The parameters to linearise in: those with `requires_grad=True` (default), those whose name
        matches one of some shell patterns, e.g. `["head.*", "*lora*"]`, or those for which `f(name, parameter)` is
        true. Three strings, alone or among patterns, stand for sets, whatever the network's parameters are called:
        `"last_layer"`, the layer with a weight that is called last (at the first inputs); `"norm"`, the affine
        parameters of normalisations; and `"bias"`, all biases. What is left out costs nothing.
    :param input_shape: The shape of one input as the network wants it, e.g. `(3, 32, 32)`: inputs are n×3072 then. Of
        a network with several arguments, the shape of each by its name, e.g. `{"ids": (128,), "mask": (128,)}`:
        :func:`~ntk_gp.pack` puts them side by side in rows.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, such as `torch.long`; of
        several arguments, by name. Inputs may be integers then; they are carried exactly, or refused.
    :param output: Index of the output to take of a network with several, or `"all"` for a multitask kernel of size
        (n·C)×(n·C), point-major and output-minor, for an interleaved
        :class:`~gpytorch.distributions.MultitaskMultivariateNormal`. Where the network returns more than one tensor,
        the name (key or attribute) of the one to linearise, or a function of what it returns; where that tensor has
        several columns, or is at some position, a tuple whose last element says which: `("logits", "all")`, `(0, 3)`.
    :param variance_groups: Gives each group of parameters a prior variance of its own, to be learned: `"layer"`,
        `"parameter"`, a function from a parameter's name to its group's, or a dictionary from patterns (and sets, as
        for `parameters`) to groups, e.g. `{"norm": "norm", "conv*": "conv"}`: the first pattern that matches decides,
        and what none matches is the group `"other"`. :func:`~ntk_gp.scale_to_data` lets them start at equal shares.
    :param variance_prior: Prior over these variances.
    :param variance_constraint: Constraint on these variances. (Default: :class:`~gpytorch.constraints.Positive`.)
    :param engine: `"structured"` (default) uses the recorded uses of each parameter, and autodiff for those that no
        rule covers (:meth:`engine_report` tells); `"autodiff"` uses `torch.func` throughout.
    :param normalize: True divides the kernel by its mean diagonal, with prior variances of one, at the inputs that it
        sees first, so that its variance there is about that of a :class:`~gpytorch.kernels.ScaleKernel` around it. The
        constant is a buffer, `normalization.value`, in the state of the model, and stays what it is until
        :meth:`normalize_at` or :meth:`linearize` is called. A number divides it by that number.
    :param batch_shape: The batch shape of the kernel.
    :param active_dims: The columns of the inputs that the network sees.

    :ivar torch.Tensor variance: The prior variances, (*batch_shape, 1, G); all one without `variance_groups`. Not
        divided by anything.

    :raises TypeError: For the base class's options for lengthscales, such as `ard_num_dims`: the network scales its own
        inputs.
    :raises ValueError: If the network has no parameters, the selection matches none, or (at the first inputs) the
        network cannot be evaluated there, mixes the rows of a batch, or has several outputs and none was chosen.

    Example:
        >>> import gpytorch
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> covar_module = gpytorch.kernels.ScaleKernel(NTKKernel(network))
        >>> covar_module(torch.randn(5, 2)).shape
        torch.Size([5, 5])
    """

    is_linear_in_weights = True
    raw_variance: nn.Parameter
    raw_variance_constraint: Interval

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        input_shape: InputShape = None,
        input_dtype: InputDtype = None,
        output: Output = None,
        variance_groups: str | Callable[[str], str] | Mapping[str, str] | None = None,
        variance_prior: Prior | None = None,
        variance_constraint: Interval | None = None,
        engine: str | None = None,
        normalize: bool | float = False,
        batch_shape: Size | None = None,
        active_dims: tuple[int, ...] | None = None,
        **kwargs,
    ):
        _check_no_lengthscale(kwargs)
        _refuse_in_botorch()
        selection = {"parameters": parameters, "input_shape": input_shape, "input_dtype": input_dtype, "output": output}
        options = {**selection, "group_by": group_function(variance_groups)}
        super().__init__(network, engine, options, batch_shape=batch_shape, active_dims=active_dims, **kwargs)
        self.normalization: Normalization | None = None
        if normalize is not False:
            self.normalization = Normalization(normalize, self.network.dtype, self.network.device)
        if variance_groups is None:
            if variance_prior is not None or variance_constraint is not None:
                raise ValueError("variance_prior and variance_constraint need variance_groups, such as 'layer'.")
            return
        groups = self.network.num_groups
        self._register_variance("variance", (_get_variance, _set_variance), variance_prior, variance_constraint, groups)

    @property
    def variance(self) -> Tensor:
        if "raw_variance" in parameters_in(self):
            return self.raw_variance_constraint.transform(self.raw_variance)
        return torch.ones(*self.batch_shape, 1, 1, dtype=self.network.dtype, device=self.network.device)

    @variance.setter
    def variance(self, value: float | Tensor) -> None:
        _set_variance(self, value)

    def linearize(self, network: nn.Module) -> None:
        """Takes a new snapshot, of this network, with the same options, and drops everything computed from the last.

        A model's prediction caches are its own: call `model.train()` and `model.eval()` after this. If the kernel is
        divided by its mean diagonal, that is the one at the next inputs.
        """
        renewed = linearization_of(network, self._engine, **self.network.options)
        groups = renewed.network.group_names
        if "raw_variance" in parameters_in(self) and groups != self.network.group_names:
            raise ValueError(
                f"The network's variance groups are {groups}, this kernel's {self.network.group_names}. "
                "Make a new kernel for a network of another form."
            )
        self._take(renewed)
        if self.normalization is not None:
            self.normalization.forget()

    def jacobian(self, x: Tensor) -> JacobianLinearOperator:
        """J(x) as a lazy matrix, (*batch, n·C, P), without the prior variances; columns in the order of
        `kernel.network.parameter_names`, each parameter flattened."""
        x = self.network.flattened(x)
        rows, _, _ = self._rows(x, x)
        return JacobianLinearOperator(rows, linearization=self._linearization)

    def engine_report(self, x: Tensor) -> list[dict[str, object]]:
        """Tells for each parameter how its part of the Jacobian at x is served, and what that costs.

        :param x: Inputs, (n, d).
        :return: One dictionary for each parameter: its name (`parameter`), the rules that serve it or `"autodiff"`
            (`served_by`), the `bytes` of its factors at these inputs, and the flops for one entry of a Gram matrix
            (`gram_flops`).
        """
        x = self.network.flattened(x).detach()
        rows, _, _ = self._rows(*[x.reshape(-1, x.shape[-1])] * 2)
        return self._linearization.jacobian(flatten_batch(rows)).report()

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params
    ) -> NTKLinearOperator | Tensor:
        _refuse_in_botorch()  # which may have been imported since
        x1, x2 = self._carried(x1, x2)
        if "raw_variance" in parameters_in(self):
            variance = self.variance.to(x1.device, x1.dtype)
        else:
            variance = x1.new_ones(*self.batch_shape, 1, 1)
        if not torch.is_grad_enabled():  # the matrix may be evaluated where gradients are on
            variance = variance.detach()
            if x1.requires_grad or x2.requires_grad:
                x1, x2 = detached(x1, x2)
        refuse_last_dim_is_batch(last_dim_is_batch and self.network.outputs.is_batch)
        if last_dim_is_batch:
            x1, x2 = (x.transpose(-1, -2).unsqueeze(-1) for x in (x1, x2))
            variance = variance.unsqueeze(-3)
        x1, x2, function = self._rows(x1, x2)
        if self.normalization is not None and x1.numel():
            variance = variance / self.normalization.at(lambda: self._mean_diagonal(x1)).to(variance)
        kernel_matrix = NTKLinearOperator(x1, x2, variance, linearization=self._linearization, function=function)
        return kernel_matrix._diagonal() if diag else kernel_matrix

    def normalize_at(self, x: Tensor) -> None:
        """From now on, divides the kernel by its mean diagonal at these inputs, (*batch, n, d); `normalize=True` alone
        takes the first ones.

        :raises RuntimeError: For a kernel that is not normalised.
        :raises ValueError: If that mean is zero.
        """
        if self.normalization is None:
            raise RuntimeError("This kernel is not normalised: make it with normalize=True.")
        x = self._active(x)
        rows, _, _ = self._rows(x, x)
        self.normalization.settle(self._mean_diagonal(rows))

    def _mean_diagonal(self, rows: Tensor) -> float:
        """That of the kernel at these with prior variances of one."""
        jacobian = self._linearization.jacobian(flatten_batch(rows.detach()))
        ones = jacobian.x.new_ones(1, self.network.num_groups)
        with torch.no_grad():
            return float(self._linearization.diagonal(jacobian, jacobian, ones).double().mean())

    def _with_batches(self, *args: Any) -> NTKKernel:
        new = super()._with_batches(*args)
        new.normalization = self.normalization  # one for all of its batches
        return new


# What the base class takes for kernels with a lengthscale, and would drop without a word here.
_OF_LENGTHSCALES = ("ard_num_dims", "lengthscale_prior", "lengthscale_constraint", "param_transform")


def _refuse_feature_maps(kernel: NTKKernel, *_: Any, **__: Any) -> None:
    raise NotImplementedError(
        "botorch.sampling.pathwise has no feature map for an NTKKernel, and needs none: "
        "ntk_gp.draw_functions(model, k) draws exact posterior functions, prior=True prior ones."
    )


def _refuse_in_botorch() -> None:
    """Says so in BoTorch's table of feature maps, where that is imported; its own error names no way out."""
    generators = sys.modules.get("botorch.sampling.pathwise.features.generators")
    if generators is not None and (NTKKernel,) not in generators.GenKernelFeatures.funcs:
        generators.GenKernelFeatures.register(NTKKernel)(_refuse_feature_maps)


def _check_no_lengthscale(arguments: dict[str, Any]) -> None:
    given = {name for name, value in arguments.items() if value is not None}
    if given & set(_OF_LENGTHSCALES):
        raise TypeError(
            f"NTKKernel has no lengthscales, so {', '.join(sorted(given & set(_OF_LENGTHSCALES)))} would have no "
            "effect: the trained network scales its own inputs. Prior variances are learned with variance_groups, "
            "variance_prior and variance_constraint, one for all by a ScaleKernel."
        )
    if arguments.keys() - set(_OF_LENGTHSCALES):
        raise TypeError(
            f"NTKKernel has no option {', '.join(sorted(arguments.keys() - set(_OF_LENGTHSCALES)))}; its options are "
            "parameters, input_shape, input_dtype, output, variance_groups, variance_prior, variance_constraint, "
            "engine, normalize, batch_shape and active_dims."
        )


def group_function(
    variance_groups: str | Callable[[str], str] | Mapping[str, str] | None,
) -> Callable[[str], str] | Mapping[str, str] | None:
    if isinstance(variance_groups, Mapping):
        _check_groups(variance_groups)
        return dict(variance_groups)
    if variance_groups is None or callable(variance_groups):
        return variance_groups
    if variance_groups == "layer":
        return _layer_of
    if variance_groups == "parameter":
        return str
    raise ValueError(
        "variance_groups must be 'layer', 'parameter', a function of a name, or a dictionary from patterns to groups, "
        f"got {variance_groups!r}."
    )


def _check_groups(groups: Mapping[str, str]) -> None:
    if groups and all(isinstance(name, str) for item in groups.items() for name in item):
        return
    raise TypeError(
        f"variance_groups must map patterns to the names of groups, strings to strings, got {groups!r}. Several "
        'patterns may have one group: {"conv*": "conv", "stem.*": "conv"}.'
    )


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def _get_variance(kernel: NTKKernel) -> Tensor:
    return kernel.variance


def _set_variance(kernel: NTKKernel, value: float | Tensor) -> None:
    if "raw_variance" not in parameters_in(kernel):
        raise RuntimeError("This kernel has no variances of its own: pass variance_groups, or use a ScaleKernel.")
    value = torch.as_tensor(value, device=kernel.raw_variance.device).to(kernel.raw_variance)
    kernel.initialize(raw_variance=kernel.raw_variance_constraint.inverse_transform(value))
