"""How functions use their parameters: one small rule per kind of layer, and the way to register one's own."""

from ..terms import ConvolutionTerm, FeatureTerm, MatrixTerm, OneHotTerm, ParameterView, Term
from . import (  # noqa: F401
    activation,
    attention,
    bilinear,
    convolution,
    elementwise,
    embedding,
    linear,
    normalisation,
    parametrised,
)
from .registry import (
    UnsupportedUse,
    Use,
    find,
    mark_as_own,
    register_decomposition,
    register_rule,
    version,
)

mark_as_own()

__all__ = [
    "ConvolutionTerm",
    "FeatureTerm",
    "MatrixTerm",
    "OneHotTerm",
    "ParameterView",
    "Term",
    "UnsupportedUse",
    "Use",
    "find",
    "register_decomposition",
    "register_rule",
    "version",
]
