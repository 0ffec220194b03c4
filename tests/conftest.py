import gc
import random
import runpy
import sys
import unittest
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpytorch
import hypothesis
import pytest
import torch

from ntk_gp import settings
from ntk_gp.jacobian import linearization
from ntk_gp.stock import stock

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("ntk_gp", deadline=None)
hypothesis.settings.load_profile("ntk_gp")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=("structured", "autodiff"),
        help="the Jacobian engine wherever a test names none; tests that name theirs are left out",
    )
    parser.addoption(
        "--sample",
        action="store_true",
        help="in half the time: no tests marked thorough, and a third of the cases of those that have four or more",
    )
    parser.addoption(
        "--device",
        default="cpu",
        help="where tensors are made, such as cuda; tests that are about the CPU are left out, and all are skipped if "
        "there is no such device",
    )


def pytest_configure(config: pytest.Config) -> None:
    engine = config.getoption("--engine")
    if engine is not None:
        linearization.default_engine = engine
    if _device(config) != "cpu" and _is_available(_device(config)):
        torch.set_default_device(_device(config))  # of what modules of tests make when they are imported, too
        torch.Generator = _Generator
    if not torch.cuda.is_available():  # torch.manual_seed would note the stack for when it is, thousands of times
        torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None


def pytest_unconfigure(config: pytest.Config) -> None:
    if _device(config) != "cpu":
        torch.set_default_device(None)
        torch.Generator = _Generator.__base__


class _Generator(torch.Generator):
    """One for tensors where they are made: PyTorch's own are for the CPU if none is named."""

    def __new__(cls, device: Any = None) -> "_Generator":
        return super().__new__(cls, device=torch.get_default_device() if device is None else device)


def _device(config: pytest.Config) -> str:
    """What tests run on."""
    return config.getoption("--device")


def _is_available(device: str) -> bool:
    try:
        return torch.get_device_module(device).is_available()
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {device}: {error}") from error


def pytest_collection_finish() -> None:
    """What was imported stays until the end: the garbage collector need not go through it after each test."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With an engine forced, tests that name theirs would be run once more for nothing; on another device than the CPU,
    those that are about the CPU; and a sample of them may be enough."""
    if config.getoption("--sample"):
        _leave_out(config, items, lambda item: item.get_closest_marker("thorough") is not None)
        left_out = _other_cases(config, items)
        _leave_out(config, items, lambda item: item.nodeid in left_out)
    if config.getoption("--engine") is not None:
        _leave_out(config, items, _names_engine)
    device = _device(config)
    if device == "cpu":
        return
    _leave_out(config, items, lambda item: item.get_closest_marker("cpu_only") is not None)
    if not _is_available(device):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"--device {device}: there is none"))


def _other_cases(config: pytest.Config, items: list[pytest.Item]) -> set[str]:
    """Two thirds of the cases of each test that has four or more, of the tests of a suite of linear_operator's or
    GPyTorch's, and of those marked costly in a file, drawn from the seed."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("every_case") is None:
            cases[_group(item)].append(item.nodeid)
    draw = random.Random(str(config.getoption("randomly_seed", None)))
    return {
        name
        for test in sorted(cases)
        if len(cases[test]) >= 4
        for name in draw.sample(sorted(cases[test]), 2 * len(cases[test]) // 3)
    }


def _group(item: pytest.Item) -> str:
    """What a sample takes a third of."""
    if item.get_closest_marker("costly") is not None:
        return item.location[0]
    is_suite = isinstance(item, pytest.Function) and issubclass(item.cls or object, unittest.TestCase)
    return item.parent.nodeid if is_suite else item.nodeid.partition("[")[0]


def _leave_out(config: pytest.Config, items: list[pytest.Item], which: Callable[[pytest.Item], bool]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if which(item)])
    items[:] = [item for item in items if not which(item)]


def _names_engine(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    by_parameter = callspec is not None and "engine" in callspec.params
    return by_parameter or any(item.get_closest_marker(name) for name in ("names_engine", "engine_independent"))


_SETTINGS = {
    f"{module.__name__}.{name}": setting
    for module in (gpytorch.settings, settings)
    for name, setting in vars(module).items()
    if isinstance(setting, type)
}
_STATES = ("_state", "_global_value", "_global_float_value", "_global_double_value", "_global_half_value")


def _default_device() -> torch.device:
    try:
        return torch.get_default_device()
    except AttributeError:  # torch 2.8, once one was set and taken back
        return torch.device("cpu")


def _state_of_the_process() -> dict[str, Any]:
    """What a test could leave behind for those after it."""
    states = {
        f"{name}.{state}": getattr(setting, state)
        for name, setting in _SETTINGS.items()
        for state in _STATES
        if hasattr(setting, state)
    }
    return {
        **states,
        "default dtype": torch.get_default_dtype(),
        "default device": _default_device(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "float32 products": torch.get_float32_matmul_precision(),
        "attention's fast path": torch.backends.mha.get_fastpath_enabled(),
        "oneDNN": torch._C._get_mkldnn_enabled(),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that changes the process fails itself, not those that happen to come after it."""
    before, had_botorch = _state_of_the_process(), "botorch" in sys.modules
    yield
    after = _state_of_the_process()
    if "botorch" in sys.modules and not had_botorch:  # importing it sets some of GPyTorch's settings
        before |= {name: value for name, value in after.items() if name.startswith("gpytorch.settings")}
    assert {name: value for name, value in after.items() if value != before[name]} == {}


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


@pytest.fixture
def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Runs code of a page as a script in an empty folder. It may set the default dtype for its reader."""

    def run(code: str) -> None:
        script = tmp_path / "script.py"
        script.write_text(code, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(script))

    before = torch.get_default_dtype()
    yield run
    torch.set_default_dtype(before)
