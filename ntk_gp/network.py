"""The network to be linearised: a frozen copy of the user's module, its parameters chosen, grouped and flattened."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from . import settings

ParameterSelection = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None

ALL_OUTPUTS = "all"

_T = TypeVar("_T", bound=Tensor)

_MIXES_ROWS = (
    "A row's output changes with the other rows of the batch, so the network is not a function of one input. Expected "
    "a network that treats rows independently in eval mode: give batch normalisation running statistics "
    "(track_running_stats=True), or freeze whatever mixes rows."
)

_serial_numbers = itertools.count(1)


class FrozenNetwork(nn.Module):
    r"""A snapshot of a network at its present weights :math:`w_0`, in eval mode, that owns its tensors as buffers.

    Nothing is shared with the network it came from: neither sees a change made to the other. There are no
    `nn.Parameter` s in it, so optimisers leave it alone; `.to()`, `state_dict`, `load_state_dict`, pickle and deepcopy
    work as for any module, and the state's keys are the network's own names below `tensors.`.

    It computes in the dtype and on the device of the inputs, whatever its buffers have: converted tensors are made once
    per dtype and device and kept.

    :param network: The trained network. Called with one tensor; its output's first dimension is the inputs'.
    :param parameters: Which parameters take part in the linearisation: those with `requires_grad=True` (default), those
        whose name matches a shell pattern or one of several (`"head.*"`), or those for which a predicate
        `f(name, parameter)` is true.
    :param input_shape: The shape of one input as the network wants it, e.g. `(3, 32, 32)`. Flat inputs of width
        d = 3·32·32 are reshaped to it.
    :param output: Index of the one output to take, `"all"` for all C of them, or None where the network has just one.
    :param group_by: Maps a parameter's name to the label of its group (for a prior variance per group). One group by
        default.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        parameters: ParameterSelection = None,
        input_shape: tuple[int, ...] | None = None,
        output: int | str | None = None,
        group_by: Callable[[str], str] | None = None,
    ):
        super().__init__()
        self._options: dict[str, Any] = {
            "parameters": parameters,
            "input_shape": input_shape,
            "output": output,
            "group_by": group_by,
        }
        _check_output_argument(output)
        self.input_shape = None if input_shape is None else tuple(int(size) for size in input_shape)
        self.output = output
        network = _unwrap(network)
        named: dict[str, nn.Parameter] = dict(_named(network.named_parameters(remove_duplicate=False)))
        if not named:
            raise ValueError(
                f"{type(network).__name__} has no parameters, so there is nothing to linearise it in. "
                "Pass the trained torch.nn.Module itself."
            )
        for name, parameter in named.items():
            _check_parameter(name, parameter)
        canonical = _canonical_names(network)
        selected = _select(named, parameters)
        self.parameter_names = tuple(dict.fromkeys(canonical[name] for name in named if name in selected))
        labels = [group_by(name) if group_by is not None else "all" for name in self.parameter_names]
        self.group_names = tuple(dict.fromkeys(labels))
        self.group_indices = tuple(self.group_names.index(label) for label in labels)
        self.tensors = _buffer_tree(network, set(canonical.values()))
        self._aliases = canonical
        self._skeleton = [_skeleton(network)]  # in a list, so that its mode and dtype are never changed from outside
        self._functions: dict = {}
        self._checked: set = set()
        self._seen: list[tuple[weakref.ref, int]] = []
        self._serial = 0

    def renewed(self, network: nn.Module) -> FrozenNetwork:
        """A snapshot of another network, or of this one's new weights, with the same options."""
        return FrozenNetwork(network, **self._options)

    @property
    def num_groups(self) -> int:
        """G, the number of parameter groups."""
        return len(self.group_names)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters as they are kept, single precision at least."""
        return torch.promote_types(self.get_buffer(f"tensors.{self.parameter_names[0]}").dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """The device of the parameters as they are kept."""
        return self.get_buffer(f"tensors.{self.parameter_names[0]}").device

    def fingerprint(self) -> int:
        """A number that no other state of a snapshot has: new after `.to`, `load_state_dict`, in-place edits."""
        tensors = list(self.tensors.buffers())
        unchanged = len(tensors) == len(self._seen) and all(
            reference() is tensor and version == tensor._version
            for tensor, (reference, version) in zip(tensors, self._seen, strict=True)
        )
        if not unchanged:
            self._seen = [(weakref.ref(tensor), tensor._version) for tensor in tensors]
            self._serial = next(_serial_numbers)
        return self._serial

    def function(self, dtype: torch.dtype, device: torch.device) -> NetworkFunction:
        """The network as a pure function of its parameters in this dtype and on this device, made once and kept."""
        fingerprint = self.fingerprint()
        key = (dtype, device)
        if key not in self._functions or self._functions[key][0] != fingerprint:
            self._functions[key] = (fingerprint, self._convert(dtype, device))
        return self._functions[key][1]

    def _convert(self, dtype: torch.dtype, device: torch.device) -> NetworkFunction:
        with torch.inference_mode(False), torch.no_grad():
            tensors = {
                name.removeprefix("tensors."): buffer.to(device, dtype if buffer.is_floating_point() else None)
                for name, buffer in self.named_buffers()
            }
            # A network may write to its buffers when it is called: those writes must not reach the snapshot.
            for name in tensors.keys() - set(self.parameter_names):
                tensors[name] = tensors[name].clone()
        return NetworkFunction(self, _convert_skeleton(self._skeleton[0], dtype, device), tensors)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) at the frozen weights: (*batch, n, d) to (*batch, n), or (*batch, n, C) with `output="all"`."""
        check_finite(x)
        self.check(x)
        function = self.function(x.dtype, x.device)
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] == 0:
            out = flat.new_zeros(0, function.num_outputs)
        else:
            with function.tracing():
                out = function(function.parameters, normal_tensor(flat))
        shape = x.shape[:-1] if self.output != ALL_OUTPUTS else (*x.shape[:-1], function.num_outputs)
        return out.reshape(shape)

    def num_outputs(self, x: Tensor) -> int:
        """C, the number of outputs that take part, at inputs of this width, dtype and device."""
        if self.output != ALL_OUTPUTS:
            return 1
        self.check(x)
        return self.function(x.dtype, x.device).num_outputs

    def check(self, x: Tensor) -> None:
        """Raises where the network cannot be linearised at inputs like `x`.

        The width, dtype and outputs are looked at once per width, dtype and device; that no row's output depends on the
        other rows, once there are two rows to try it with.
        """
        several = x.shape[:-1].numel() > 1
        key = (x.shape[-1], x.dtype, x.device, several, self.fingerprint())
        if key in self._checked:
            return
        self._check_width(x)
        check_finite(x)
        function = self.function(x.dtype, x.device)
        with torch.inference_mode(False), _preserved_random_state(x.device):
            rows = normal_tensor(x.detach()).reshape(-1, x.shape[-1])[:4].clone()
            if rows.shape[0] == 0:
                rows = x.new_zeros(1, x.shape[-1])
            function.probe(rows)
            if several:
                self._check_rows_are_independent(rows)
        self._checked.add(key)

    def _check_width(self, x: Tensor) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"Expected inputs of a floating-point dtype, got {x.dtype}. Cast them, e.g. with x.float(); a network "
                "that wants integers can cast them back in its forward."
            )
        if self.input_shape is not None and x.shape[-1] != math.prod(self.input_shape):
            raise ValueError(
                f"Got inputs of width {x.shape[-1]} (shape {tuple(x.shape)}), but input_shape={self.input_shape} needs "
                f"{math.prod(self.input_shape)} features. Flatten each input to one row, or change input_shape."
            )

    def _check_rows_are_independent(self, rows: Tensor) -> None:
        try:  # in float64, where a true dependence stands out from rounding
            function, rows64 = self._convert(torch.float64, rows.device), rows.double()
            together, again, apart = _evaluate_together_and_apart(function, rows64)
        except (RuntimeError, TypeError):  # a dtype fixed inside the network, or a device without float64
            together, again, apart = _evaluate_together_and_apart(self.function(rows.dtype, rows.device), rows)
        tolerance = 1e-5 * max(float(together.abs().max()), 1e-30)
        if not torch.allclose(together, again, rtol=0.0, atol=tolerance):
            raise ValueError(
                "The network gives different outputs for the same inputs, so it has no Jacobian. It is already in eval "
                "mode: look for random numbers in its forward, such as torch.nn.functional.dropout without "
                "training=self.training."
            )
        if not torch.allclose(together, apart, rtol=0.0, atol=tolerance):
            raise ValueError(_MIXES_ROWS)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_functions": {}, "_checked": set(), "_seen": [], "_serial": 0}

    def __deepcopy__(self, memo: dict) -> FrozenNetwork:
        """Shares the tensors, which are never written to: `.to()` and `load_state_dict` put new ones in their place.

        GPyTorch deep-copies kernels to index their batches, and models to add fantasies.
        """
        new = copy.copy(self)
        memo[id(self)] = new
        known = {"_functions": dict(self._functions), "_checked": set(self._checked), "_seen": list(self._seen)}
        new.__dict__.update(known, _modules=dict(self._modules), _serial=self._serial)
        new.tensors = self.tensors.shared_copy()
        return new


class _Tensors(nn.Module):
    """A node of the tree that mirrors the network; loading replaces its buffers, never overwrites them."""

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.clone()
        super()._load_from_state_dict(*args, **kwargs)

    def shared_copy(self) -> _Tensors:
        """A tree of its own with the same tensors."""
        new = copy.copy(self)
        children = {name: node.shared_copy() for name, node in self._modules.items() if isinstance(node, _Tensors)}
        new.__dict__.update(_buffers=dict(self._buffers), _modules=children)
        return new


class NetworkFunction:
    """The network as a pure function :math:`f(w, x)`, its tensors in one dtype and on one device.

    Parameter vectors are flat: the selected parameters in the order of `parameters`, each flattened, P numbers in all.

    :param network: The frozen network this is taken from.
    :param skeleton: The module with every tensor of its own on the meta device: one that the call fails to replace
        raises, and is never silently stale.
    :param tensors: Every tensor of the snapshot by its canonical name.
    """

    def __init__(self, network: FrozenNetwork, skeleton: nn.Module, tensors: dict[str, Tensor]):
        self.skeleton = skeleton
        self.parameters: dict[str, Tensor] = {name: tensors[name] for name in network.parameter_names}
        self.constants = {name: tensor for name, tensor in tensors.items() if name not in self.parameters}
        self.num_groups = network.num_groups
        self.group_indices = network.group_indices
        self.input_shape = network.input_shape
        self.output = network.output
        self.num_network_outputs: int | None = None
        self.bytes_per_point = 0
        self._aliases = network._aliases
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in skeleton.modules())

    def __call__(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f(w, x): (n, d) to (n, C). Call it inside :meth:`tracing`."""
        out = self._call(parameters, x).reshape(x.shape[0], -1)
        return out[:, self.output].unsqueeze(-1) if isinstance(self.output, int) else out

    def _call(self, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        tensors = {
            name: parameters[owner] if owner in parameters else self.constants[owner]
            for name, owner in self._aliases.items()
        }
        if self.input_shape is not None:
            x = x.reshape(x.shape[0], *self.input_shape)
        return functional_call(self.skeleton, tensors, (x,), tie_weights=False)

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of every selected parameter."""
        return tuple(tensor.numel() for tensor in self.parameters.values())

    @property
    def num_outputs(self) -> int:
        """C, the number of outputs that take part; known once :meth:`probe` has run."""
        if self.num_network_outputs is None:
            raise RuntimeError("The network has not been evaluated yet: call FrozenNetwork.check(x) first.")
        return self.num_network_outputs if self.output == ALL_OUTPUTS else 1

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def restrict(self, names: Iterable[str]) -> NetworkFunction:
        """The same function, with only these of the selected parameters as its parameters."""
        restricted = copy.copy(self)
        groups = dict(zip(self.parameters, self.group_indices, strict=True))
        restricted.parameters = {name: self.parameters[name] for name in names}
        restricted.constants = {**self.constants, **self.parameters}
        restricted.group_indices = tuple(groups[name] for name in restricted.parameters)
        restricted.__dict__.pop("sizes", None)
        return restricted

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """(..., P) to one (..., *shape) view per parameter."""
        pieces = flat.split(self.sizes, dim=-1)
        return {
            name: piece.reshape((*flat.shape[:-1], *tensor.shape))
            for (name, tensor), piece in zip(self.parameters.items(), pieces, strict=True)
        }

    def flatten(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`split`: one (..., *shape) tensor per parameter to (..., P)."""
        return torch.cat(
            [
                pieces[name].reshape(*pieces[name].shape[: pieces[name].dim() - tensor.dim()], tensor.numel())
                for name, tensor in self.parameters.items()
            ],
            dim=-1,
        )

    def expand_weights(self, weights: Tensor) -> Tensor:
        """One variance per group, (..., G), to one per parameter, (..., P) (a view where there is one group)."""
        if self.num_groups == 1:
            return weights.expand(*weights.shape[:-1], self.num_parameters)
        sizes = torch.tensor(self.sizes, device=weights.device)
        groups = torch.tensor(self.group_indices, device=weights.device).repeat_interleave(sizes)
        return weights[..., groups]

    @contextmanager
    def tracing(self, input_gradients: bool = False) -> Iterator[None]:
        """Whatever the user's mode, backends that can be differentiated twice, in full precision, outside autocast.

        Fused attention has no forward-mode derivative and no second one; mkldnn's and cuDNN's recurrent kernels lack
        them too, so those are switched off for networks that have such layers.

        :param input_gradients: The Jacobian will be differentiated with respect to the inputs.
        """
        fastpath = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(full_precision(self.device))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")  # nobody asked for it
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            if self.device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=not self._recurrent, allow_tf32=settings.allow_tf32.on(), deterministic=True
                    )
                )
            if input_gradients:
                stack.enter_context(_ElementaryOperations())
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(fastpath)

    def probe(self, rows: Tensor) -> None:
        """Evaluates the network at a few rows and raises where the result cannot be linearised."""
        parameters = {name: tensor.detach().requires_grad_() for name, tensor in self.parameters.items()}
        saved = _SavedBytes(parameters.values())
        with self.tracing(), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            out = self._checked_call(parameters, rows)
        self.bytes_per_point = max(saved.total // rows.shape[0], rows.shape[1] * rows.element_size())
        size = out.reshape(rows.shape[0], -1).shape[1]
        if isinstance(self.output, int) and not -size <= self.output < size:
            raise ValueError(f"output={self.output} is out of range: the network has {size} outputs, 0 to {size - 1}.")
        if self.output is None and size != 1:
            raise ValueError(
                f"The network has {size} outputs for each input (shape {tuple(out.shape)} for {rows.shape[0]} inputs), "
                f"but one was expected. Choose it with output=k, or take all of them with output='{ALL_OUTPUTS}' "
                "(and a multitask model)."
            )
        if not out.requires_grad:
            raise ValueError(
                f"The network's output (dtype {out.dtype}) does not depend differentiably on any of the selected "
                f"parameters ({', '.join(list(self.parameters)[:3])}, …). Return a floating-point tensor that is "
                "computed from them, without detach(), argmax or no_grad."
            )
        if out.dtype != rows.dtype:
            raise TypeError(
                f"The network returned {out.dtype} for inputs of {rows.dtype}. Its tensors were converted to the "
                "inputs' dtype, so its forward must have a dtype of its own: remove that cast."
            )
        if not torch.isfinite(out).all():
            raise ValueError(
                "The network's output is NaN or infinite at finite inputs. Check its weights, and the scale of the "
                "inputs."
            )
        self.num_network_outputs = size

    def _checked_call(self, parameters: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        try:
            out = self._call(parameters, rows)
        except Exception as error:
            shape = tuple(rows.shape[1:]) if self.input_shape is None else self.input_shape
            raise ValueError(
                f"The network cannot be evaluated at inputs of shape (n, {', '.join(map(str, shape))}), dtype "
                f"{rows.dtype}: {error} Give it the features it was trained with, or input_shape= to reshape each flat "
                "row."
            ) from error
        if not isinstance(out, Tensor):
            raise TypeError(
                f"The network returned a {type(out).__name__}, but a tensor was expected. Wrap it in a module whose "
                "forward returns the one tensor to linearise."
            )
        if (
            out.numel() == 0
            or (out.dim() > 0 and out.shape[0] != rows.shape[0])
            or (out.dim() == 0 and rows.shape[0] > 1)
        ):
            raise ValueError(
                f"The network returned shape {tuple(out.shape)} for {rows.shape[0]} inputs; expected "
                f"({rows.shape[0]},) or ({rows.shape[0]}, C), one row for each input."
            )
        return out


class _ElementaryOperations(TorchFunctionMode):
    """Some fused operations as compositions of elementary ones, which can be differentiated any number of times.

    Layer and instance norm lose terms, without a word, when their first derivative in forward mode or under vmap is
    differentiated once more (https://github.com/pytorch/pytorch/issues/196700,
    https://github.com/pytorch/pytorch/issues/196699); the others have no such derivative and raise.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        elementary = _ELEMENTARY.get(function, function)
        return elementary(*args, **(kwargs or {}))


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    out = _standardise(input, tuple(range(-len(normalized_shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if not use_input_stats:
        return nn.functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    out = _standardise(input, tuple(range(2, input.dim())), eps)
    channels = (-1, *[1] * (input.dim() - 2))
    out = out if weight is None else out * weight.view(channels)
    return out if bias is None else out + bias.view(channels)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return (input + 3.0).clamp(0.0, 6.0) / 6.0


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


_ELEMENTARY: dict[Callable, Callable] = {
    nn.functional.glu: _glu,
    nn.functional.hardsigmoid: _hardsigmoid,
    torch.cdist: _cdist,
    nn.functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    nn.functional.instance_norm: _instance_norm,
    torch.instance_norm: _instance_norm,
}


class _SavedBytes:
    """Adds up what autograd keeps of a forward pass, parameters apart: the memory that one chunk of inputs needs."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in parameters}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


def check_finite(x: Tensor) -> None:
    """Raises where the inputs are NaN or infinite."""
    finite = torch.isfinite(x)
    if not finite.all():
        bad = (~finite).any(-1).nonzero()[:3].tolist()
        raise ValueError(
            f"Inputs of shape {tuple(x.shape)} have NaN or infinite features, first in rows {bad}. Remove or impute "
            "them."
        )


def full_precision(device: torch.device) -> torch.autocast:
    """A context outside the user's autocast, which would round the factors of products to half precision."""
    return torch.autocast(device.type, enabled=False)


def normal_tensor(x: Tensor) -> Tensor:
    """`x`, as a tensor that autograd can record even if it was made under `torch.inference_mode`."""
    if not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def _check_output_argument(output: int | str | None) -> None:
    if output is None or output == ALL_OUTPUTS or (isinstance(output, int) and not isinstance(output, bool)):
        return
    raise TypeError(f"output must be an index, '{ALL_OUTPUTS}' or None, got {output!r}.")


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name} of the network is uninitialised. Run the network once before linearising it."
        )
    if parameter.is_complex():
        raise TypeError(
            f"Parameter {name} of the network is complex ({parameter.dtype}); only real ones are supported."
        )


def _unwrap(network: nn.Module) -> nn.Module:
    """The eager module inside `torch.compile`, `DataParallel` and the like."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"Expected the trained network as a torch.nn.Module, got {type(network).__name__}.")
    while True:
        if _is_compiled(network):
            network = network.get_submodule("_orig_mod")
        elif isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(network, torch.jit.ScriptModule):
            raise TypeError("A TorchScript module cannot be linearised. Pass the original Python module.")
        else:
            return network


def _is_compiled(module: nn.Module) -> bool:
    """Whether this is `torch.compile` 's wrapper (told by its attribute: importing its class takes a second)."""
    return "_orig_mod" in module._modules


def _canonical_names(network: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer, tied ones included, to the first name of the same tensor."""
    first: dict[int, str] = {}
    names = {}
    for tensors in (network.named_parameters(remove_duplicate=False), network.named_buffers(remove_duplicate=False)):
        for name, tensor in _named(tensors):
            names[name] = first.setdefault(id(tensor), name)
    return names


def _named(tensors: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    """The same names that the eager network has, where `torch.compile` has wrapped a part of it."""
    for name, tensor in tensors:
        yield name.replace("_orig_mod.", ""), tensor


def _select(named: Mapping[str, nn.Parameter], selection: ParameterSelection) -> set[str]:
    if selection is None:
        chosen = {name for name, parameter in named.items() if parameter.requires_grad}
        wanted = "requires_grad=True"
    elif callable(selection):
        chosen = {name for name, parameter in named.items() if selection(name, parameter)}
        wanted = f"the predicate {getattr(selection, '__name__', selection)}"
    else:
        patterns = [selection] if isinstance(selection, str) else list(selection)
        chosen = {name for name in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
        wanted = f"parameters={patterns}"
        unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in named)]
        if chosen and unmatched:
            raise ValueError(f"The patterns {unmatched} match no parameter. The network has: {', '.join(named)}.")
    chosen = {name for name in chosen if named[name].is_floating_point() and named[name].numel()}
    if not chosen:
        raise ValueError(f"No parameter of the network was selected by {wanted}. It has: {', '.join(named)}.")
    return chosen


def _buffer_tree(network: nn.Module, names: set[str]) -> _Tensors:
    """A tree of bare modules that mirrors the network and holds a copy of each named tensor as a buffer."""
    root = _Tensors()
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in _named((*network.named_parameters(), *network.named_buffers())):
            if name not in names:
                continue
            *path, leaf = name.split(".")
            module: nn.Module = root
            for part in path:
                if part not in module._modules:
                    module._modules[part] = _Tensors()
                module = module.get_submodule(part)
            # Written directly: register_buffer refuses names that nn.Module uses itself, and a network may have them.
            module._buffers[leaf] = tensor.detach().clone()
    return root


def _skeleton(network: nn.Module) -> nn.Module:
    """A copy of the network in eval mode, without weights (they are on the meta device) and without backward hooks."""
    memo: dict[int, object] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = torch.empty_like(buffer, device="meta", requires_grad=False)
        for value in vars(module).values():  # deepcopy refuses tensors that are results of a computation
            if isinstance(value, Tensor):
                memo[id(value)] = normal_tensor(value.detach()).clone()
    try:
        copied = copy.deepcopy(network, memo)
    except Exception as error:
        raise TypeError(
            f"The network ({type(network).__name__}) cannot be copied: {error} Everything it holds must support "
            "copy.deepcopy."
        ) from error
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if child is not None and _is_compiled(child):
                module._modules[name] = child.get_submodule("_orig_mod")
    for module in copied.modules():
        module._compiled_call_impl = None
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
    return copied.eval()


def _plain_tensors(skeleton: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in skeleton.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.device.type != "meta":
                yield module, name, value


def _convert_skeleton(skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The skeleton with the tensors that are neither parameters nor buffers in this dtype and on this device."""
    if not any(True for _ in _plain_tensors(skeleton)):
        return skeleton
    skeleton = copy.deepcopy(skeleton)
    for module, name, value in list(_plain_tensors(skeleton)):
        setattr(module, name, value.to(device, dtype if value.is_floating_point() else None))
    return skeleton


def _evaluate_together_and_apart(function: NetworkFunction, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs for all rows, for all once more, and for the first by itself and then the rest."""
    with function.tracing(), torch.no_grad():
        together, again = function(function.parameters, rows), function(function.parameters, rows)
        try:
            apart = torch.cat([function(function.parameters, rows[:1]), function(function.parameters, rows[1:])])
        except Exception as error:
            raise ValueError(f"{_MIXES_ROWS} (A row by itself raised: {error})") from error
    return together, again, apart


@contextmanager
def _preserved_random_state(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
