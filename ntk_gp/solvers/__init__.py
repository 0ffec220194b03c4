"""Ways to solve with K + D, and the choice between them."""

from .base import Solver
from .choice import choose_solver, solver_class
from .love import FastVariance, LanczosVariance, LandmarkVariance, VarianceReport, choose_fast_variance
from .spectrum import Spectrum
from .system import System

__all__ = [
    "FastVariance",
    "LanczosVariance",
    "LandmarkVariance",
    "Solver",
    "Spectrum",
    "System",
    "VarianceReport",
    "choose_fast_variance",
    "choose_solver",
    "solver_class",
]
