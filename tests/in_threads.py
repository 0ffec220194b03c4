"""Work done in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gpytorch

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
