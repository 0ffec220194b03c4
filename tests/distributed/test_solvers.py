"""Whatever is computed by ranks together is what one process computes, and the same bits on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

import ntk_gp
from ntk_gp.jacobian import linearization
from tests.adapted import LARGE, SMALL
from tests.distributed import problems
from tests.distributed.harness import Ranks
from tests.distributed.problems import Results

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def differences(engine: str | None, compute: Callable[[], Results], tolerance: float, **settings: object) -> list[str]:
    """What is not the same by this process alone and by all ranks, or not the same bits on all of them."""
    if engine is not None:
        linearization.default_engine = engine
    found = []
    with ntk_gp.settings.solver(settings.get("solver")), ntk_gp.settings.memory_budget(settings.get("budget")):
        alone = compute()
        with ntk_gp.settings.distributed(timeout=20) as group:
            before = group.traffic.total()
            together = compute()
            assert group.traffic.total() > before
            for name, value in together.items():
                try:
                    group.agree(name, value.detach())
                except RuntimeError as error:
                    found.append(str(error))
    for name, value in together.items():
        scale = float(alone[name].abs().max())
        error = float((value - alone[name]).abs().max()) / scale
        if not error <= tolerance:
            found.append(f"{name}: {error:.1e}")
    return found


def check(started: Ranks, request: pytest.FixtureRequest, compute: Callable, tolerance=1e-10, **settings) -> None:
    engine = request.config.getoption("--engine")
    assert started.run(partial(differences, engine, compute, tolerance, **settings)) == [[]] * started.size


def of_kernel(kernel: str, n: int, dtype: torch.dtype = torch.float64) -> Results:
    return problems.everything(problems.model_of(kernel, n, dtype))


@pytest.mark.parametrize("n", [SMALL + 1, LARGE])
@pytest.mark.parametrize("kernel", problems.KERNELS)
def test_kernels(two, request, kernel, n):
    check(two, request, partial(of_kernel, kernel, n))


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("solver", ["function_space", "weight_space"])
@pytest.mark.parametrize("kernel", ["scaled", "layers", "gain"])
def test_solvers(two, request, kernel, solver, n):
    check(two, request, partial(of_kernel, kernel, n), solver=solver)


def iterated(n: int) -> Results:
    with ntk_gp.settings.solve_tolerance(1e-13):
        return problems.everything(problems.model_of("layers", n))


def test_iteration(two, request):
    check(two, request, partial(iterated, LARGE), solver="iterative", tolerance=1e-9)


def test_float32(two, request):
    check(two, request, partial(of_kernel, "scaled", LARGE, torch.float32), tolerance=1e-4)


def of_batches() -> Results:
    return problems.everything(problems.batched())


def of_outputs(last_layer: bool) -> Results:
    return problems.everything(problems.multitask(last_layer))


def test_batches(two, request):
    check(two, request, of_batches)


@pytest.mark.parametrize("last_layer", [False, True])
def test_outputs(two, request, last_layer):
    check(two, request, partial(of_outputs, last_layer))


def fast(n: int) -> Results:
    return problems.predictions(problems.model_of("scaled", n), fast=True)


def test_fast_variances(two, request):
    check(two, request, partial(fast, LARGE), tolerance=1e-8)  # landmarks magnify rounding


def test_little_memory(two, request):
    """Factors are captured chunk by chunk, by each rank its own."""
    check(two, request, partial(of_kernel, "scaled", LARGE), budget=200_000)
