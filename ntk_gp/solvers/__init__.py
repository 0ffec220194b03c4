"""Ways to solve with K + D, and the choice between them."""

from .base import PosteriorCovariance, Solver
from .choice import choose_solver, solver_class
from .love import FastVariance, LanczosVariance, LandmarkVariance, VarianceReport, choose_fast_variance
from .report import SolverCandidate, SolverReport, report_on
from .spectrum import Spectrum
from .system import System
from .table import SOLVERS

__all__ = [
    "SOLVERS",
    "FastVariance",
    "LanczosVariance",
    "LandmarkVariance",
    "PosteriorCovariance",
    "Solver",
    "SolverCandidate",
    "SolverReport",
    "Spectrum",
    "System",
    "VarianceReport",
    "choose_fast_variance",
    "choose_solver",
    "report_on",
    "solver_class",
]
