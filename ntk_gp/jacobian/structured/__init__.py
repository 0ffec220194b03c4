"""The structured engine: exact Jacobian products and Gram matrices at the speed of plain matrix products.

=====================  =============================================================================================
:mod:`.record`         what a network does with its parameters, call by call, and the gradients at each result
:mod:`.layout`         which dimension of a recorded tensor runs over the points
:mod:`.passes`         recorded calls, by their rules, to blocks of the Jacobian
:mod:`.rowwise`        what autograd's graph says about rows that stay apart
:mod:`.verification`   comparisons of what was recorded with autograd
:mod:`.plan`           what is found out once, at a few inputs
:mod:`.captured`       one recording at given inputs, as the plan says, put to the test
:mod:`.assembly`       the blocks of several captures put together
:mod:`.gram`           Gram matrices from the blocks
:mod:`.held`           the Jacobian whose blocks are in memory
:mod:`.chunked`        the Jacobian that is captured again for each operation
:mod:`.engine`         decides which of the two, and keeps the plan
=====================  =============================================================================================
"""

from .chunked import ChunkedJacobian
from .engine import StructuredEngine
from .held import StructuredJacobian

__all__ = ["ChunkedJacobian", "StructuredEngine", "StructuredJacobian"]
