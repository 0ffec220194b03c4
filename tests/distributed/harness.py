"""Processes of one gloo group on this machine, started once and given one function after another."""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 60.0  # that a rank may take to answer

# A server that has imported torch once, and has used neither its threads nor autograd's, forks ranks in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
# The others are what autograd imports when it is first used, and in forward mode.
_CONTEXT.set_forkserver_preload(
    ["ntk_gp", "torch.fx.experimental.symbolic_shapes", "torch._decomp.decompositions_for_jvp"]
)


class Ranks:
    """Processes that do the same at the same time.

    :param size: How many.
    :param folder: Where they find one another.
    """

    def __init__(self, size: int, folder: str):
        self.size = size
        pairs = [_CONTEXT.Pipe() for _ in range(size)]
        self._ends = [here for here, _ in pairs]
        store = (Path(folder) / "store").as_uri()
        self.processes = [
            _CONTEXT.Process(target=_serve, args=(end, rank, size, store), daemon=True)
            for rank, (_, end) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, end in pairs:
            end.close()

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """What a function of some module returns on each rank.

        :raises AssertionError: With the traceback of the first rank that raised.
        """
        self.start(function, *args)
        answers = [self.answer(rank) for rank in range(self.size)]
        for rank, (is_fine, answer) in enumerate(answers):
            if not is_fine:
                raise AssertionError(f"On rank {rank}:\n{answer}")
        return [answer for _, answer in answers]

    def start(self, function: Callable, *args: Any) -> None:
        """Has each rank call it; :meth:`answer` has what comes of that."""
        for end in self._ends:
            end.send((function, args))

    def answer(self, rank: int) -> tuple[bool, Any]:
        """Whether it returned, and what; or the traceback."""
        if not self._ends[rank].poll(_SECONDS):
            return False, f"no answer in {_SECONDS:g} s"
        return self._ends[rank].recv()

    def close(self) -> None:
        for end in self._ends:
            end.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


@contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """So many processes, while the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(size, folder)
        try:
            yield started
        finally:
            started.close()


def _serve(end: Connection, rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    gc.freeze()  # what was imported stays: garbage is collected for each kernel, and need not be looked for in it
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            break
        torch.manual_seed(0)  # whatever the last one has left behind
        try:
            end.send((True, function(*args)))
        except Exception:
            end.send((False, traceback.format_exc()))
    dist.destroy_process_group()
