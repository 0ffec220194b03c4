"""Predictions averaged over hyperparameters, and models compared by their evidence."""

from .average import Averaged, averaged
from .compare import ComparedModel, Comparison, compare
from .mixture import Mixture

__all__ = ["Averaged", "ComparedModel", "Comparison", "Mixture", "averaged", "compare"]
