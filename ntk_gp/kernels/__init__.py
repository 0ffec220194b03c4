"""The kernels that a user puts into a model."""

from .approximations import CosineNTKKernel, RandomProjectionNTKKernel
from .features import FeatureKernel
from .gain import GainKernel
from .ntk import NTKKernel
from .tangent import TangentMaternKernel, TangentRBFKernel

__all__ = [
    "CosineNTKKernel",
    "FeatureKernel",
    "GainKernel",
    "NTKKernel",
    "RandomProjectionNTKKernel",
    "TangentMaternKernel",
    "TangentRBFKernel",
]
