"""Who may take how much of :class:`ntk_gp.settings.memory_budget`: one table, so that it shows what is held at once.

What was computed is kept beside whatever runs. Of the rest, one line takes place at a time:

===================================  ===================================================================
kept between computations            `CACHES`, 1/4; a Jacobian's `FACTORS`, 1/5, are one entry of them
a Jacobian is captured whole         `FACTORS` + 8 `CAPTURE` = 7/10
it is captured chunk by chunk        8 `CAPTURE` + 3 `CHUNK` + `GRAM_BLOCK` = 13/16: of a block of the Gram
                                     matrix, two chunks on the left and one on the right
an operation on a Jacobian           one or two of `BLOCK`, `COLUMNS`, `WHOLE_ROWS`, `INTERMEDIATE`: 1/4
the network at many points           8 `PASS` = 1/2
variances                            `TEST_POINTS`, 1/8, and an operation on a Jacobian
fast variances are prepared          `LANDMARKS` + 4 `TRIANGLE` = 1
conjugate gradients are prepared     8 `PRECONDITIONER` = 1, for what is made of it and room for the rest
factorising                          `SYSTEM` = 1: what does not fit is solved another way
===================================  ===================================================================

Lines of one are compared with the budget as if nothing were kept; their results are kept only if they fit in `CACHES`.
With full caches, the third line may exceed the budget by a sixteenth where autograd takes all that it may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import settings


@dataclass(frozen=True)
class Share:
    """A part of the memory budget.

    :param numerator: Of the fraction that it is.
    :param purpose: What takes it.
    """

    numerator: int
    denominator: int
    purpose: str

    def bytes(self, device: torch.device) -> int:
        """How many that are at the moment, for computations on this device."""
        return settings.memory_budget.bytes(device) * self.numerator // self.denominator


# Kept
CACHES = Share(1, 4, "Jacobians, Gram matrices, solvers and eigendecompositions for the inputs seen last")
FACTORS = Share(1, 5, "the factors of a Jacobian that is held: less than caches may take, so that it is kept there")

# While a Jacobian is captured. Autograd's intermediate results and gradients take up to about eight times what they
# leave, so that with a sixteenth for that they have half of the budget.
CAPTURE = Share(1, 16, "the factors, or what autograd keeps of the network, of all that is captured at once")
CHUNK = Share(1, 16, "the factors of one chunk: as much as is captured at once; one is held while the next is captured")
PASS = Share(1, 16, "what autograd keeps of a pass through the network, which takes up to eight times that")

# Intermediate results of operations on a Jacobian
BLOCK = Share(1, 8, "rows of J, or vectors as long as its rows or columns, that are held at once")
COLUMNS = Share(1, 8, "columns of per-point gradients, of both sides of a Gram matrix")
GRAM_BLOCK = Share(1, 8, "one block of a Gram matrix that is formed chunk by chunk")
WHOLE_ROWS = Share(1, 16, "rows of J in all the parameters that unlike uses share")
INTERMEDIATE = Share(1, 8, "an intermediate result of one term, where it is not caches that limit it")

# Solvers
SYSTEM = Share(1, 1, "all that a factorisation holds at once, or a root that samples are drawn from")
TEST_POINTS = Share(1, 8, "what the test points of one block need")
LANDMARKS = Share(3, 4, "the matrix of landmarks and training rows that fast variances come from")
TRIANGLE = Share(1, 16, "one of the triangular matrices of landmarks")
PRECONDITIONER = Share(1, 8, "the matrix of training rows and the preconditioner's landmarks; several are made of it")
