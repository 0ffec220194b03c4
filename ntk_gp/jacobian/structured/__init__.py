"""The structured engine: exact Jacobian products and Gram matrices at the speed of plain matrix products."""

from .chunked import ChunkedJacobian
from .engine import StructuredEngine
from .held import StructuredJacobian

__all__ = ["ChunkedJacobian", "StructuredEngine", "StructuredJacobian"]
