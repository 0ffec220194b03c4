"""The structured engine: exact Jacobian products and Gram matrices at the speed of plain matrix products."""

from .engine import StructuredEngine
from .jacobian import ChunkedJacobian, StructuredJacobian

__all__ = ["ChunkedJacobian", "StructuredEngine", "StructuredJacobian"]
