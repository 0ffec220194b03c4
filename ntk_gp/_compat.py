"""Every private name of torch, gpytorch and linear_operator that this package uses, under a name of its own.

A name is private if it begins with one underscore. None is used anywhere else (`tests/test_package.py` looks), and each
has a test of what it is used for (`tests/test_compat.py`): what a new version has changed shows there first. Unless it
says otherwise, a name is there since the oldest versions that are supported: torch 2.3, gpytorch 1.15.2,
linear_operator 0.6.1.

Not private in this sense is what a class leaves to its subclasses. These are the methods of linear_operator's
`LinearOperator` and `BlockLinearOperator` (`_matmul`, `_size` and `_transpose_nonbatch`, which they ask for;
`_getitem`, `_diagonal`, `_solve` and so on, which their documentation says to override for speed): a subclass overrides
them, and calls them on any operator that it is made of, as linear_operator's own do. And what a class of this package
overrides and then calls on `self` or `super()`: `_apply` and `_load_from_state_dict` of `nn.Module`, and what
GPyTorch's settings are made of (`_default`, `_global_value`, `_set_value`). *Attributes* that other packages define are
private, also to subclasses.

Most of what follows are aliases, as quick as what they stand for. A variable of a module, which changes, is read by
`functools.partial`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.likelihoods import gaussian_likelihood
from linear_operator.functions import _inv_quad_logdet
from torch import Tensor, nn, overrides
from torch.autograd import forward_ad

# Transforms, modes and dual numbers.

innermost_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
"""The transform of `torch.func` that the caller is in, or None. `torch._C._functorch.peek_interpreter_stack`; without
it, `torch._C._functorch.maybe_current_level`."""

is_transform_wrapper: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a tensor stands for others in a transform of `torch.func`. `torch._C._functorch.is_functorch_wrapped_tensor`;
without it, see whether `torch.func.debug_unwrap` gives another tensor."""

set_vmap_warns_of_loops: Callable[[bool], None] = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
"""Whether `vmap` warns of operators that it loops over. `torch._C._functorch._set_vmap_fallback_warning_enabled`;
without it, leave the warnings be."""

dual_level_number: Callable[[], int] = partial(vars(forward_ad).__getitem__, "_current_level")
"""The innermost level of forward-mode differentiation that is open, -1 for none.
`torch.autograd.forward_ad._current_level`; without it, `forward_ad.make_dual` raises where none is open."""

active_function_modes: Callable[[], list] = overrides._get_current_function_mode_stack
"""The modes that see calls of torch's functions, outermost first. `torch.overrides._get_current_function_mode_stack`;
without it, enter :data:`without_innermost_mode` until it raises."""

without_innermost_mode: Callable[[], Any] = overrides._pop_mode_temporarily
"""A context in which the innermost of these modes is gone. `torch.overrides._pop_mode_temporarily`; without it,
refuse to export under a mode."""

is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any kind of device. `torch._C._is_any_autocast_enabled`; without it, ask
`torch.is_autocast_enabled(device_type)`, which takes one since torch 2.4, for each."""


# Switches of the whole process. The properties of torch.backends read and write the same; after
# torch.backends.disable_global_flags() they refuse to be written.

is_onednn_enabled: Callable[[], bool] = torch._C._get_mkldnn_enabled
"""`torch._C._get_mkldnn_enabled`; without it, `torch.backends.mkldnn.enabled`."""

set_onednn_enabled: Callable[[bool], None] = torch._C._set_mkldnn_enabled
"""`torch._C._set_mkldnn_enabled`; without it, write `torch.backends.mkldnn.enabled`."""

is_cudnn_enabled: Callable[[], bool] = torch._C._get_cudnn_enabled
"""`torch._C._get_cudnn_enabled`; without it, `torch.backends.cudnn.enabled`."""

set_cudnn_enabled: Callable[[bool], None] = torch._C._set_cudnn_enabled
"""`torch._C._set_cudnn_enabled`; without it, write `torch.backends.cudnn.enabled`."""

is_cudnn_deterministic: Callable[[], bool] = torch._C._get_cudnn_deterministic
"""`torch._C._get_cudnn_deterministic`; without it, `torch.backends.cudnn.deterministic`."""

set_cudnn_deterministic: Callable[[bool], None] = torch._C._set_cudnn_deterministic
"""`torch._C._set_cudnn_deterministic`; without it, write `torch.backends.cudnn.deterministic`."""

is_cudnn_tf32_allowed: Callable[[], bool] = torch._C._get_cudnn_allow_tf32
"""`torch._C._get_cudnn_allow_tf32`; without it, `torch.backends.cudnn.allow_tf32`."""

set_cudnn_tf32_allowed: Callable[[bool], None] = torch._C._set_cudnn_allow_tf32
"""`torch._C._set_cudnn_allow_tf32`; without it, write `torch.backends.cudnn.allow_tf32`."""


def _attention_switches() -> dict[str, tuple[Callable[[], bool], Callable[[bool], None]]]:
    public = torch.backends.cuda
    switches: dict[str, tuple[Callable[[], bool], Callable[[bool], None]]] = {
        "flash": (public.flash_sdp_enabled, public.enable_flash_sdp),
        "mem_efficient": (public.mem_efficient_sdp_enabled, public.enable_mem_efficient_sdp),
        "math": (public.math_sdp_enabled, public.enable_math_sdp),
    }
    for name in ("cudnn", "overrideable"):
        if hasattr(torch._C, f"_get_{name}_sdp_enabled") and hasattr(torch._C, f"_set_sdp_use_{name}"):
            switches[name] = getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}")
    return switches


attention_switches = _attention_switches()
"""Each implementation of attention, with what tells whether it may be used and what sets that. Three of them are
public; `torch._C._get_NAME_sdp_enabled` and `_set_sdp_use_NAME` for cuDNN's (later public as well) and for that of
other devices ("overrideable", which never was), which not all supported versions have; without them, that one is not
switched off."""


# Operators.


def _no_onednn(*_: Any) -> Tensor:
    raise AttributeError("This build of torch has no product by oneDNN.")


onednn_linear: Callable[..., Tensor] = getattr(torch.ops.mkldnn, "_linear_pointwise", _no_onednn)
"""`(x, weight, bias, "none", [], "")` to x Wᵀ + b by oneDNN. `torch.ops.mkldnn._linear_pointwise`, where torch is built
with oneDNN; without it, the first product finds out, and products are PyTorch's, which are slower."""

view_as_own: Callable[..., Tensor] = torch.ops.aten._unsafe_view
"""A tensor in another shape, for autograd no view: it may be changed in place, and its base is not looked at any more.
`torch.ops.aten._unsafe_view`; without it, `reshape` and `clone`."""

norm_of_each: Callable[..., Any] = torch._foreach_norm
"""The 2-norm of each tensor in a list, at once. `torch._foreach_norm`; without it, `torch.linalg.vector_norm` one by
one."""

weight_norm: Callable[..., Tensor] = torch._weight_norm
"""What layers with `torch.nn.utils.weight_norm` call. `torch._weight_norm`; without it, whole rows of the Jacobian in
their parameters are needed."""


# Tensors.

version_of = attrgetter("_version")
"""How often a tensor was changed in place, as far as torch knows. `Tensor._version`; without it, contents must be
compared."""

base_of = attrgetter("_base")
"""The tensor that a differentiable view is a view of, or None. `Tensor._base`; without it, a parameter's views are
found by `untyped_storage().data_ptr()`."""

is_view: Callable[[Tensor], bool] = Tensor._is_view
"""Whether a tensor is a differentiable view. `Tensor._is_view`; without it, whether it has a :data:`base_of`."""

sparse_values: Callable[[Tensor], Tensor] = Tensor._values
"""What a sparse tensor holds, coalesced or not, as it is in memory. `Tensor._values`; without it,
`coalesce().values()`, a copy."""

sparse_indices: Callable[[Tensor], Tensor] = Tensor._indices
"""Where it holds that. `Tensor._indices`; without it, `coalesce().indices()`, a copy."""


# Autograd's graph.

input_metadata = attrgetter("_input_metadata")
"""The shape, dtype and device of each gradient that a node takes. `Node._input_metadata`; without it, no graph says
that rows stay apart, and all are compared."""

backward_class = attrgetter("_backward_cls")
"""The class of an `autograd.Function`'s nodes. `Function._backward_cls`; without it, `type(result.grad_fn)`."""


# What a node keeps for its derivative, as torch's notes on autograd tell; named as in its `derivatives.yaml`. Without a
# name, take nodes of that kind for unknown ones: rows are compared then, or forward mode is tried.

saved_dim = attrgetter("_saved_dim")
"""The dimension, or dimensions, that a node works along; negative ones as unsigned numbers of 64 bits.
`Node._saved_dim`; without it, see above."""

saved_dim0, saved_dim1 = attrgetter("_saved_dim0"), attrgetter("_saved_dim1")
"""The dimensions that a transposition exchanges, likewise. `Node._saved_dim0` and `_saved_dim1`; without them, see
above."""

saved_start, saved_step = attrgetter("_saved_start"), attrgetter("_saved_step")
"""Where a slice begins, negative from the end, and by how many it goes on. `Node._saved_start` and `_saved_step`;
without them, take slices for what they are slices of."""

saved_normalized_shape = attrgetter("_saved_normalized_shape")
"""The shape of what a layer norm normalises. `Node._saved_normalized_shape`; without it, see above."""

saved_padding_idx = attrgetter("_saved_padding_idx")
"""The row of an embedding that has no derivative. `Node._saved_padding_idx`; without it, see above."""


# Modules. Their public methods leave out what is None, and what is there twice; and refuse names that are attributes.

PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
"""Where a module keeps these, in its `__dict__`. Without them, copies of modules must be made by its public methods."""

parameters_in = attrgetter(PARAMETERS)
"""The dictionary of a module's own parameters. `nn.Module._parameters`; without it,
`named_parameters(recurse=False)`."""

own_batch_shape = attrgetter("_batch_shape")
"""The batch shape of a kernel itself, without those of kernels in it. `Kernel._batch_shape`; without it, leave
`Kernel.batch_shape` to GPyTorch, which is slower."""

buffers_in = attrgetter(BUFFERS)
"""The dictionary of its own buffers. `nn.Module._buffers`; without it, `named_buffers(recurse=False)`."""

children_in = attrgetter(CHILDREN)
"""The dictionary of its own modules. `nn.Module._modules`; without it, `named_children()`."""

COMPILED = "_orig_mod"
"""The name under which what `torch.compile` makes of a module keeps that module. `OptimizedModule._orig_mod`; without
it, see whether a module is a `torch._dynamo.OptimizedModule`, the import of which takes a second."""


def leave_only_forward(module: nn.Module) -> None:
    """Forgets what `module.compile()` made of a module's call, and its backward hooks: `nn.Module._compiled_call_impl`,
    `_backward_hooks` and `_backward_pre_hooks`. Without one of these, copy the module before there are any."""
    module._compiled_call_impl = None
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()


# Distributions.


def check_sample(distribution: torch.distributions.Distribution, value: Tensor) -> None:
    """Raises for a value that is none of the distribution's, where it was made to look: `Distribution._validate_args`
    and `_validate_sample`. Without them, leave it to the shapes of what is computed."""
    if distribution._validate_args:
        distribution._validate_sample(value)


transforms_of = attrgetter("_transform", "_inv_transform")
"""What a constraint makes a parameter of its raw one by, and back. `Interval._transform` and `_inv_transform`; without
them, take parameters one by one in `averaging/coordinates.py`."""

is_interleaved = attrgetter("_interleaved")
"""Whether a multitask distribution's covariance has tasks within points. `MultitaskMultivariateNormal._interleaved`, as
its constructor names it; without it, compare `distribution[..., 0].lazy_covariance_matrix` with the whole's."""


GaussianLikelihoodBase = gaussian_likelihood._GaussianLikelihoodBase
"""What GPyTorch's Gaussian likelihoods of any noise have in common.
`gpytorch.likelihoods.gaussian_likelihood._GaussianLikelihoodBase`; without it, subclass `GaussianLikelihood`."""


# Settings of GPyTorch's, to be subclassed.

FeatureFlag = gpytorch_settings._feature_flag
"""A setting that is on or off. `gpytorch.settings._feature_flag`; without it, write the context manager out."""

ValueSetting = gpytorch_settings._value_context
"""A setting with a value. `gpytorch.settings._value_context`; without it, write the context manager out."""


# Linear operators.

arguments_of = attrgetter("_args")
"""What an operator was made with, in order. `LinearOperator._args`; without it, the leaves of `representation()`."""

OPTIONS = "_nondifferentiable_kwargs"
"""Where a linear operator keeps what it was made with by name and is no tensor, in its `__dict__`. Without it, kernel
matrices are pickled together with the function that they were evaluated with."""

keyword_arguments_of: Callable[[Any], Mapping[str, Any]] = attrgetter("_kwargs")
"""What it was made with by name. `LinearOperator._kwargs`; without it, the leaves of `representation()`."""

without_diagonal = attrgetter("_linear_op")
"""The matrix that an `AddedDiagLinearOperator` adds a diagonal one to. `AddedDiagLinearOperator._linear_op`; without
it, that of its public `linear_ops` which is not diagonal."""

added_diagonal = attrgetter("_diag_tensor")
"""The diagonal matrix that it adds. `AddedDiagLinearOperator._diag_tensor`; without it, that of its public `linear_ops`
which is diagonal."""

constant_in = attrgetter("_constant")
"""What a `ConstantMulLinearOperator` multiplies by, (*batch). `ConstantMulLinearOperator._constant`; without it, its
public `expanded_constant[..., 0, 0]`."""

InvQuadLogdet = _inv_quad_logdet.InvQuadLogdet
"""The function with derivatives that estimates yᵀA⁻¹y and log |A| by iteration. In the private module
`linear_operator.functions._inv_quad_logdet`; without it, the estimate is `LinearOperator.inv_quad_logdet` alone."""
