"""The solvers that there are: a new one is a file beside this one, and a line here.

==========================  =======================  ====================================  =========================
name                        factorises               flops                                 float64 numbers held
==========================  =======================  ====================================  =========================
`function_space`            K + D, N×N               Gram matrix (by the engine), N³/3     1.5 N²
`weight_space`              I + Φᵀ D⁻¹ Φ, P×P        N P² (rows of J, and their products)  2 P²
`iterative`                 nothing                  4 N P for each step and column        N · landmarks
`distributed`               K + D, over R ranks      as `function_space`, shared           0.5 N²/R for each rank
`distributed_weight_space`  I + Φᵀ D⁻¹ Φ, over them  as `weight_space`, shared             0.5 P²/R for each rank
==========================  =======================  ====================================  =========================
"""

from __future__ import annotations

from .. import settings
from ..distributed.function_space import DistributedFunctionSpaceSolver
from ..distributed.weight_space import DistributedWeightSpaceSolver
from .base import Solver
from .function_space import FunctionSpaceSolver
from .iterative import IterativeSolver
from .system import System
from .weight_space import WeightSpaceSolver

# Of two that cost the same, the first is taken.
SOLVERS: tuple[type[Solver], ...] = (FunctionSpaceSolver, WeightSpaceSolver, IterativeSolver)

# Those that only serve rows which are sharded over ranks.
OVER_RANKS: tuple[type[Solver], ...] = (DistributedFunctionSpaceSolver, DistributedWeightSpaceSolver)

settings.solver.names = tuple(kind.name for kind in (*SOLVERS, *OVER_RANKS))


def solvers_for(system: System) -> tuple[type[Solver], ...]:
    """All that are considered."""
    return SOLVERS if system.jacobian.shards.is_whole else (*SOLVERS, *OVER_RANKS)
