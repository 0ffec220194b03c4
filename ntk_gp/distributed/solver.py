"""What solvers with a factor over ranks have in common."""

from __future__ import annotations

from typing import Any

from ..solvers.base import Solver
from ..solvers.system import System
from .group import Group, OneProcess
from .shards import RowsOfRanks


class SolverOverRanks(Solver):
    """A base, before the solver that takes the same way in one process; `factors` is what ranks have in parts."""

    @classmethod
    def obstacle(cls, system: System) -> str | None:
        if system.jacobian.shards.is_whole:
            return "is for rows that are sharded over ranks, within ntk_gp.settings.distributed"
        return super().obstacle(system)

    def __getstate__(self) -> dict[str, Any]:
        """Without the factor, of which other processes have their rows: it is made again where it is asked for."""
        return {name: value for name, value in self.__dict__.items() if name != "factors"}

    def extended(self, system: System) -> None:
        """None: with more points, other ranks have them."""
        return None


def group_of(system: System) -> Group:
    """The ranks; this process alone, where what was made by ranks has come to it."""
    shards = system.jacobian.shards
    return shards.group if isinstance(shards, RowsOfRanks) else OneProcess(system.x.device)
