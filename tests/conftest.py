from collections.abc import Iterator

import gpytorch
import hypothesis
import pytest
import torch

from ntk_gp import NTKKernel
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.stock import stock

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("ntk_gp", deadline=None)
hypothesis.settings.load_profile("ntk_gp")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=("auto", "structured", "autodiff"),
        default="auto",
        help="the Jacobian engine wherever a test names none (default: auto)",
    )


def pytest_configure(config: pytest.Config) -> None:
    engine = config.getoption("--engine")
    NTKKernel.__init__.__kwdefaults__["engine"] = engine
    Linearization.__init__.__defaults__ = (engine,)


@pytest.fixture(autouse=True)
def gpytorch_settings() -> Iterator[None]:
    """GPyTorch's own defaults (importing BoTorch changes them for the whole process), and the same random numbers."""
    torch.manual_seed(0)
    with (
        gpytorch.settings.fast_computations(True, True, True),
        gpytorch.settings.max_cholesky_size(stock(800)),
        gpytorch.settings.max_eager_kernel_size(512),
    ):
        yield
