"""What the structured engine keeps of each use of a parameter: one small form of Jacobian block per file."""

from .base import Term
from .combined import CombinedTerm
from .convolution import ConvolutionTerm
from .corrected import CorrectedTerm
from .derivatives import DenseDerivative, Derivative, GraphDerivative, LocalDerivative
from .features import FeatureTerm
from .matrix import MatrixTerm
from .merging import merge_terms
from .one_hot import OneHotTerm
from .pulled import ElementwiseTerm, PulledTerm, SharedTerm
from .view import ParameterView

__all__ = [
    "CombinedTerm",
    "ConvolutionTerm",
    "CorrectedTerm",
    "DenseDerivative",
    "Derivative",
    "ElementwiseTerm",
    "FeatureTerm",
    "GraphDerivative",
    "LocalDerivative",
    "MatrixTerm",
    "OneHotTerm",
    "ParameterView",
    "PulledTerm",
    "SharedTerm",
    "Term",
    "merge_terms",
]
