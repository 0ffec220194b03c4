"""The solvers that there are: a new one is a file beside this one, and a line here.

=================  =============================  =====================================  ======================
name               factorises                     flops                                  float64 numbers held
=================  =============================  =====================================  ======================
`function_space`   K + D, N×N                     the Gram matrix (by the engine), N³/3  1.5 N²
`weight_space`     I + Φᵀ D⁻¹ Φ, P×P              N P² (rows of J, and their products)   2 P²
`iterative`        nothing: conjugate gradients   4 N P for each step and column         N · landmarks
=================  =============================  =====================================  ======================
"""

from __future__ import annotations

from .. import settings
from .base import Solver
from .function_space import FunctionSpaceSolver
from .iterative import IterativeSolver
from .weight_space import WeightSpaceSolver

# Of two that cost the same, the first is taken.
SOLVERS: tuple[type[Solver], ...] = (FunctionSpaceSolver, WeightSpaceSolver, IterativeSolver)

settings.solver.names = tuple(kind.name for kind in SOLVERS)
