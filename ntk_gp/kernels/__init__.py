"""The kernels that a user puts into a model."""

from .gain import GainKernel
from .ntk import NTKKernel

__all__ = ["GainKernel", "NTKKernel"]
