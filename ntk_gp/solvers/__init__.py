"""Ways to solve with K + D, and the choice between them."""

from .choice import choose_solver, solver_class
from .love import LanczosVariance
from .spectrum import Spectrum
from .system import System

__all__ = ["LanczosVariance", "Solver", "Spectrum", "System", "choose_solver", "solver_class"]

from .base import Solver
