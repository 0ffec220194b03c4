"""The linearised network while it is trained on squared loss: gradient flow and gradient descent, in closed form."""

from .rates import largest_stable_rate
from .training import GradientDescent, GradientFlow, LinearizedTraining

__all__ = ["GradientDescent", "GradientFlow", "LinearizedTraining", "largest_stable_rate"]
