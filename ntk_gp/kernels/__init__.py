"""The kernels that a user puts into a model."""

from .ntk import NTKKernel

__all__ = ["NTKKernel"]
