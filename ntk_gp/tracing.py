"""Functions with derivatives inside, for `torch.export`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._compat import active_function_modes, without_innermost_mode


def traced_through(function: Callable[..., tuple[Tensor, ...]], *args: Tensor) -> tuple[Tensor, ...]:
    """The function of these tensors while `torch.export` records: what it records has no derivatives left to take.

    The function is traced by itself first. The exporter looks on from above autograd, and would record the calls that
    take derivatives as they are: nothing that a program saved for another process, or an ONNX graph, can hold.

    :raises RuntimeError: If the derivatives cannot be traced.
    """
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx  # takes a while to import

    with ExitStack() as stack:
        for _ in active_function_modes():
            stack.enter_context(without_innermost_mode())
        stack.enter_context(disable_proxy_modes_tracing())
        try:
            with _DetachNoticed() as own:
                graph = make_fx(function)(*args)
        except Exception as error:
            raise RuntimeError(
                f"The network cannot be exported: its derivative cannot be traced ({error}). Serve the module as it "
                "is (torch.save, or its state_dict), or write the part of the network that is named there differently."
            ) from error
    if own.noticed:
        warnings.warn(
            "The network calls detach(). The exported program's values are right; its gradients with respect to the "
            "inputs are as if it did not.",
            UserWarning,
            stacklevel=2,
        )
    # Autograd keeps what it needs later as detached tensors: gradients of the program would end there.
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph(*args)


class _DetachNoticed(TorchFunctionMode):
    """Notices whether detach() is called on anything but parameters."""

    noticed = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.detach, torch.detach):
            self.noticed = True
        return function(*args, **(kwargs or {}))


def linearize_by_autograd(
    at: Callable[[dict[str, Tensor]], Tensor], parameters: dict[str, Tensor], tangents: dict[str, Tensor], *_: Any
) -> tuple[Tensor, Tensor]:
    """f, (m, C), and J w, (k, m, C), for tangents {name: (k, *shape)}, as the transpose of the transpose.

    By plain autograd: dual numbers and the wrappers of `torch.func` ask for sizes as numbers, and so fix the number of
    inputs that a graph is good for.
    """
    number = next(iter(tangents.values())).shape[0]
    with torch.enable_grad():
        with torch.DisableTorchFunction():  # these are ours
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        values = at(leaves)
        cotangent = torch.zeros_like(values).requires_grad_()
        gradients = torch.autograd.grad(values, list(leaves.values()), cotangent, create_graph=True, allow_unused=True)
        reached = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        products = [
            torch.autograd.grad(
                list(reached.values()), cotangent, [tangents[name][i] for name in reached], create_graph=True
            )[0]
            for i in range(number)
        ]
    return values, torch.stack(products)
