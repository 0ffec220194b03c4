"""Parameters that say when one engine is enough."""

from typing import Any

import pytest


def beyond(n: int) -> Any:
    """More points than the 800 from which GPyTorch iterates: that is about the matrix, whichever engine has made it."""
    return pytest.param(n, marks=pytest.mark.engine_independent)
