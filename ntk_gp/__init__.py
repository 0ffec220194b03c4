"""Trained PyTorch networks as Gaussian processes, adapted to a new domain in closed form; an extension of GPyTorch."""

from . import bridge, plots, settings, similarity
from .adapted import AdaptedGP
from .averaging import averaged, compare
from .classification import LaplaceGP, LaplaceMarginalLogLikelihood, LogisticLikelihood
from .dynamics import GradientDescent, GradientFlow, largest_stable_rate
from .explain import solver_report
from .jacobian.rules import register_rule
from .kernels import FeatureKernel, GainKernel, NTKKernel, TangentMaternKernel, TangentRBFKernel
from .likelihoods import FixedNoiseMultitaskGaussianLikelihood
from .means import NetworkMean
from .network import pack
from .operators import JacobianLinearOperator, NTKLinearOperator
from .priors import register_log_prior, scale_to_data
from .sampling import LinearizedFunctions, LinearizedNetwork, adapted_network, draw_functions

__version__ = "0.1.0"

bridge.install()

__all__ = [
    "AdaptedGP",
    "FeatureKernel",
    "FixedNoiseMultitaskGaussianLikelihood",
    "GainKernel",
    "GradientDescent",
    "GradientFlow",
    "JacobianLinearOperator",
    "LaplaceGP",
    "LaplaceMarginalLogLikelihood",
    "LinearizedFunctions",
    "LinearizedNetwork",
    "LogisticLikelihood",
    "NTKKernel",
    "NTKLinearOperator",
    "NetworkMean",
    "TangentMaternKernel",
    "TangentRBFKernel",
    "adapted_network",
    "averaged",
    "compare",
    "draw_functions",
    "largest_stable_rate",
    "pack",
    "plots",
    "register_log_prior",
    "register_rule",
    "scale_to_data",
    "settings",
    "similarity",
    "solver_report",
]
