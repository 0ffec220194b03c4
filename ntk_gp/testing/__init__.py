"""Checks that raise AssertionError, for rules and solvers of your own: the same that the package's own have to pass.

They need torch only, no test framework. References are by plain autograd on the network itself and dense algebra in
float64; nothing of what is checked takes part in them.

===========================  =========================================================================================
:func:`check_rule`           every product of the structured engine with a network's Jacobian, and what serves whom
:func:`check_solver`         every method of a solver, over systems of several shapes
:func:`explicit_jacobian`    J(x) by plain autograd, one output of one point at a time
:class:`SolverProblem`       a system K + D with everything about it in dense form
===========================  =========================================================================================
"""

from .explicit import explicit_jacobian
from .problems import SolverProblem
from .rules import check_rule
from .solvers import check_solver

__all__ = ["SolverProblem", "check_rule", "check_solver", "explicit_jacobian"]
