"""The kernels that a user puts into a model."""

from .features import FeatureKernel
from .gain import GainKernel
from .ntk import NTKKernel
from .tangent import TangentMaternKernel, TangentRBFKernel

__all__ = ["FeatureKernel", "GainKernel", "NTKKernel", "TangentMaternKernel", "TangentRBFKernel"]
