"""What GPyTorch reads off a kernel's parameters, for kernels made of neural tangent kernels, which may have none.

A kernel matrix of such a kernel has the dtype of the inputs, as the matrix itself does once it is evaluated; a sum or a
product has the dtype and device of its neural tangent kernel.
"""

from __future__ import annotations

import functools
from typing import Any

from gpytorch.kernels import Kernel
from gpytorch.lazy import LazyEvaluatedKernelTensor

from .kernels import NTKKernel, contains_ntk

_PROPERTIES = ((LazyEvaluatedKernelTensor, "dtype"), (Kernel, "dtype"), (Kernel, "device"))


def install() -> None:
    """Puts the properties below in the place of GPyTorch's; once."""
    for owner, name in _PROPERTIES:
        default = owner.__dict__[name]
        if not hasattr(default.fget, "default"):
            setattr(owner, name, _of_inputs(default) if owner is LazyEvaluatedKernelTensor else _of_ntk(default, name))


def uninstall() -> None:
    """Puts GPyTorch's own back."""
    for owner, name in _PROPERTIES:
        setattr(owner, name, getattr(owner.__dict__[name].fget, "default", owner.__dict__[name]))


def _of_inputs(default: property) -> property:
    assert default.fget is not None

    @functools.wraps(default.fget)
    def read(matrix: LazyEvaluatedKernelTensor) -> Any:
        return matrix.x1.dtype if contains_ntk(matrix.kernel) else default.__get__(matrix)

    read.default = default  # type: ignore[attr-defined]
    return property(read)


def _of_ntk(default: property, name: str) -> property:
    assert default.fget is not None

    @functools.wraps(default.fget)
    def read(kernel: Kernel) -> Any:
        if next(kernel.parameters(), None) is None:
            for module in kernel.modules():
                if isinstance(module, NTKKernel):
                    return getattr(module, name)
        return default.__get__(kernel)

    read.default = default  # type: ignore[attr-defined]
    return property(read)
