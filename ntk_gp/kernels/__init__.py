"""The kernels that a user puts into a model."""

from .features import FeatureKernel
from .ntk import NTKKernel
from .tangent import TangentMaternKernel, TangentRBFKernel

__all__ = ["FeatureKernel", "NTKKernel", "TangentMaternKernel", "TangentRBFKernel"]
