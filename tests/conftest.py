from collections.abc import Iterator

import gpytorch
import pytest
import torch


@pytest.fixture(autouse=True)
def gpytorch_settings() -> Iterator[None]:
    """GPyTorch's own defaults (importing BoTorch changes them for the whole process), and the same random numbers."""
    torch.manual_seed(0)
    with (
        gpytorch.settings.fast_computations(True, True, True),
        gpytorch.settings.max_cholesky_size(800),
        gpytorch.settings.max_eager_kernel_size(512),
    ):
        yield
