"""Whatever is computed by ranks together is what one process computes, and the same bits on all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import ntk_gp
from ntk_gp import NTKKernel
from ntk_gp.solvers import System
from ntk_gp.solvers.orthogonal import weight_space_factor
from tests.adapted import LARGE, SMALL, data, network
from tests.distributed import problems
from tests.distributed.harness import Ranks
from tests.distributed.problems import Results

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case]  # both engines in test_ranks.py


def differences(compute: Callable[[], Results], tolerance: float, **settings: Any) -> list[str]:
    """What is not the same by this process alone and by all ranks, or not the same bits on all of them."""
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


def check(started: Ranks, compute: Callable[[], Results], tolerance: float = 1e-10, **settings: Any) -> None:
    assert started.run(partial(differences, compute, tolerance, **settings)) == [[]] * started.size


def of_kernel(kernel: str, n: int, dtype: torch.dtype = torch.float64) -> Results:
    return problems.everything(problems.model_of(kernel, n, dtype))


# In function space, where there are fewer points than parameters, and in weight space.
@pytest.mark.parametrize(("kernel", "n"), [*((kernel, SMALL + 1) for kernel in problems.KERNELS), ("gain", LARGE)])
def test_kernels(two, kernel, n):
    check(two, partial(of_kernel, kernel, n))


# That which would not be chosen.
@pytest.mark.parametrize(("solver", "n"), [("function_space", LARGE), ("weight_space", SMALL)])
@pytest.mark.parametrize("kernel", ["layers", "gain"])
def test_forced(two, kernel, solver, n):
    check(two, partial(of_kernel, kernel, n), solver=solver)


def iterated(n: int) -> Results:
    with ntk_gp.settings.solve_tolerance(1e-13):
        return problems.everything(problems.model_of("layers", n))


def test_iteration(two):
    check(two, partial(iterated, LARGE), solver="iterative", tolerance=1e-9)


def test_float32(two):
    check(two, partial(of_kernel, "scaled", LARGE, torch.float32), tolerance=1e-4)


def of_batches() -> Results:
    return problems.everything(problems.batched())


def of_outputs(last_layer: bool) -> Results:
    return problems.everything(problems.multitask(last_layer))


def test_batches(two):
    check(two, of_batches)


@pytest.mark.parametrize("last_layer", [False, True])
def test_outputs(two, last_layer):
    check(two, partial(of_outputs, last_layer))


def orthogonalised(n: int) -> Results:
    """Each rank orthogonalises its own features, and then what is left of all."""
    (x, y), linearization = data(n), NTKKernel(network())._linearization
    variance, noise = (torch.full((1, size), 0.1, dtype=torch.float64) for size in (1, n))
    system = System(linearization, x.unsqueeze(0), variance, noise)
    factor, rotated = weight_space_factor(system, y.reshape(1, -1, 1))
    return {"factor": factor, "rotated": rotated}


@pytest.mark.parametrize("n", [SMALL + 1, LARGE])
def test_orthogonalised(two, n):
    check(two, partial(orthogonalised, n))


def fast(n: int) -> Results:
    return problems.predictions(problems.model_of("scaled", n), fast=True)


def test_fast_variances(two):
    check(two, partial(fast, LARGE), tolerance=1e-8)  # landmarks magnify rounding


def test_little_memory(two):
    """Factors are captured chunk by chunk, by each rank its own."""
    check(two, partial(of_kernel, "scaled", LARGE), budget=200_000)
