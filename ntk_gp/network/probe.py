"""Trying a network at a few rows: whether it can be linearised there, and what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .function import Findings, NetworkFunction, versions
from .graph import leaves_below
from .inputs import Inputs
from .returned import described


def probe(function: NetworkFunction, rows: Tensor) -> Findings:
    """Evaluates a network at a few rows (m, d) and tells what it is like; the function learns it.

    :raises ValueError: Where the result cannot be linearised, or says that calls depend on one another.
    :raises TypeError: Where it is no tensor, or of less precision than the inputs.
    """
    parameters = {name: tensor.detach().clone().requires_grad_() for name, tensor in function.parameters.items()}
    tensors = {name: tensor.clone() for name, tensor in function.constants.items()} | parameters
    before = versions(tensors)
    with function.tracing(), torch.enable_grad():
        out, saved_bytes = _measured_call(function, tensors, parameters.values(), rows)
    unreached, runs_again = _unreached_twice(function, parameters, out, rows)
    # A counter in a buffer, embeddings that are renormalised as they are used: each call gets its own.
    counts = zip(tensors, versions(tensors), before, strict=True)
    written = frozenset(name for name, now, then in counts if now != then)
    _check_output(function, out, rows)
    size = out.reshape(rows.shape[0], -1).shape[1]
    findings = Findings(
        num_outputs=function.outputs.count(size),
        network_outputs=size,
        bytes_per_point=max(saved_bytes // rows.shape[0], rows.shape[1] * rows.element_size()),
        unreached=unreached,
        written=written,
        runs_again=runs_again,
    )
    function.learn(findings)
    return findings


def _check_output(function: NetworkFunction, out: Tensor, rows: Tensor) -> None:
    function.outputs.check(out.reshape(rows.shape[0], -1).shape[1], out.shape)
    if not out.requires_grad:
        raise ValueError(
            f"The network's output (dtype {out.dtype}) does not depend differentiably on any of the selected "
            f"parameters ({', '.join(list(function.parameters)[:3])}, …). Return a floating-point tensor that is "
            "computed from them, without detach(), argmax or no_grad."
        )
    if _is_less_precise(out.dtype, function.inner_dtype or rows.dtype):
        raise TypeError(
            f"The network returned {out.dtype} for inputs of {rows.dtype}. Its tensors were converted to the "
            "inputs' dtype, so its forward must have a dtype of its own: remove that cast."
        )
    if not torch.isfinite(out).all():
        raise ValueError(
            "The network's output is NaN or infinite at finite inputs. Check its weights, and the scale of the inputs."
        )


def _measured_call(
    function: NetworkFunction, tensors: Mapping[str, Tensor], parameters: Iterable[Tensor], rows: Tensor
) -> tuple[Tensor, int]:
    """The network's output at a few rows, and the bytes that autograd keeps of the pass."""
    saved = _SavedBytes(parameters)
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            return _checked_call(function, tensors, rows), saved.total
    except ValueError as error:
        if "saved tensor hooks" not in str(error):
            raise
    with _ResultBytes() as results:  # a network that uses torch.func itself, which has no such hooks
        return _checked_call(function, tensors, rows), results.total


def _missing_attributes(function: NetworkFunction) -> str:
    left_out = function.specification.left_out
    if not left_out:
        return ""
    return (
        f" Its attributes {', '.join(left_out)} were computed from its parameters at an earlier call and "
        "left out; it may have missed them."
    )


def _unreached_twice(
    function: NetworkFunction, parameters: Mapping[str, Tensor], out: Tensor, rows: Tensor
) -> tuple[frozenset[str], bool]:
    """The parameters that an output does not depend on, and whether backward passes run parts of the module again.

    Raises where a second call depends on others than a first.

    A weight that is computed once and kept where no copy of the module reaches would make it a constant.
    """
    again = {name: tensor.detach().clone().requires_grad_() for name, tensor in function.parameters.items()}
    constants = {name: tensor.clone() for name, tensor in function.constants.items()}
    with function.tracing(), torch.enable_grad():
        x = rows.detach().clone().requires_grad_()
        out_again = function.call_with({**constants, **again}, x)
        leaves = leaves_below(out_again)
    runs_again = not _can_be_differentiated(out_again, {**again, "inputs": x})
    first, second = _unreached(parameters, leaves_below(out)), _unreached(again, leaves)
    if first != second or any(id(tensor) in leaves for tensor in parameters.values()):
        raise ValueError(
            "The network keeps something that it computed from its parameters for later calls, in a global "
            "variable or the like, so that a second output depends on others than the first "
            f"({', '.join(sorted(first ^ second))}). Compute it anew in each call of forward."
        )
    return first, runs_again


def _checked_call(function: NetworkFunction, tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    try:
        out = function.call_with(tensors, rows)
    except Exception as error:
        inputs = function.specification.inputs
        raise ValueError(
            f"The network cannot be evaluated at inputs of shape {_shape_of(inputs, rows)}, dtype "
            f"{rows.dtype}: {error} Give it the features it was trained with, or input_shape= to reshape each flat "
            f"row.{_missing_attributes(function)}"
        ) from error
    if not isinstance(out, Tensor):
        raise TypeError(
            f"The network returned {described(out)}, but a tensor was expected. Say which one to linearise: output= "
            "takes a name, a position as in (0, 'all'), or a function of what is returned."
        )
    if out.numel() == 0 or (out.dim() > 0 and out.shape[0] != rows.shape[0]) or (out.dim() == 0 and rows.shape[0] > 1):
        raise ValueError(
            f"The network returned shape {tuple(out.shape)} for {rows.shape[0]} inputs; expected "
            f"({rows.shape[0]},) or ({rows.shape[0]}, C), one row for each input."
        )
    return out


def _shape_of(inputs: Inputs, rows: Tensor) -> str:
    if isinstance(inputs.shape, dict):
        return str(inputs.shape)
    return f"(n, {', '.join(map(str, inputs.shape or tuple(rows.shape[1:])))})"


class _SavedBytes:
    """Adds up what autograd keeps of a forward pass, parameters apart: the memory that one chunk of inputs needs."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.seen = {_memory(tensor)[0] for tensor in parameters}
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        address, nbytes = _memory(tensor)
        if address not in self.seen:
            self.seen.add(address)
            self.total += nbytes
        return tensor.detach()  # a result that held itself, by its graph, would never be freed

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor


class _ResultBytes(TorchFunctionMode):
    """Adds up the results of all the functions that are called: more than what autograd keeps."""

    total = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.total += _memory(result)[1] if isinstance(result, Tensor) else 0
        return result


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's memory is, and how many bytes."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # sparse, or inside a transform: there is no storage to look at
        return id(tensor), tensor.numel() * tensor.element_size()


def _can_be_differentiated(out: Tensor, parameters: Mapping[str, Tensor]) -> bool:
    """Whether a backward pass works once the module that has run is no longer there."""
    try:
        torch.autograd.grad(out.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
    except Exception:
        return False
    return True


def _unreached(parameters: Mapping[str, Tensor], leaves: set[int]) -> frozenset[str]:
    return frozenset(name for name, tensor in parameters.items() if id(tensor) not in leaves)


def _is_less_precise(dtype: torch.dtype, than: torch.dtype) -> bool:
    return torch.promote_types(dtype, than) != dtype
