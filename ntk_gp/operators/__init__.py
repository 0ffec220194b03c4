"""Lazy matrices on the Jacobian: `linear_operator` subclasses."""

from .jacobian_linear_operator import JacobianLinearOperator
from .ntk_added_diag_linear_operator import NTKAddedDiagLinearOperator
from .ntk_linear_operator import NTKLinearOperator

__all__ = ["JacobianLinearOperator", "NTKAddedDiagLinearOperator", "NTKLinearOperator"]
