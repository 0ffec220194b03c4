"""Work done in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import gpytorch
import torch
from gpytorch.models import ExactGP
from torch import Tensor

THREADS = 4


def in_threads(work: Callable[[int], None]) -> None:
    """Runs it in several threads, all of which begin at the same moment; raises what one of them raised."""
    barrier, raised = threading.Barrier(THREADS), []

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:  # to be raised where the test sees it
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@contextmanager
def settings_of_gpytorch_restored() -> Iterator[None]:
    """Predictions enter settings of GPyTorch's, which are one for the process: threads restore one another's."""
    before = gpytorch.settings.cg_tolerance._global_value
    yield
    gpytorch.settings.cg_tolerance._global_value = before


def check_predictions(model: ExactGP, points: Sequence[Tensor], check: Callable[[Tensor, Tensor], None]) -> None:
    """That several threads, each with inputs of its own, predict the means that one thread does.

    :param model: In eval mode; its predictions are prepared anew, by whichever thread comes first.
    :param points: Inputs for each of the threads.
    :param check: Of a thread's means and one thread's.
    """
    with torch.no_grad():
        expected = [model(x).mean for x in points]
    model.train()
    model.eval()

    def work(number: int) -> None:
        with torch.no_grad():
            check(model(points[number]).mean, expected[number])

    with settings_of_gpytorch_restored():
        in_threads(work)
