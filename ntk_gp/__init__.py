"""Trained PyTorch networks as Gaussian processes, adapted to a new domain in closed form; an extension of GPyTorch."""

from . import settings
from .kernels import NTKKernel
from .means import NetworkMean
from .operators import JacobianLinearOperator, NTKLinearOperator

__version__ = "0.1.0"

__all__ = ["JacobianLinearOperator", "NTKKernel", "NTKLinearOperator", "NetworkMean", "settings"]
