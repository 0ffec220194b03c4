"""What the structured engine keeps of each use of a parameter: one small form of Jacobian block per file."""

from .base import Term
from .combined import CombinedTerm, merge_terms
from .convolution import ConvolutionTerm
from .features import FeatureTerm
from .matrix import MatrixTerm
from .one_hot import OneHotTerm
from .view import ParameterView

__all__ = [
    "CombinedTerm",
    "ConvolutionTerm",
    "FeatureTerm",
    "MatrixTerm",
    "OneHotTerm",
    "ParameterView",
    "Term",
    "merge_terms",
]
