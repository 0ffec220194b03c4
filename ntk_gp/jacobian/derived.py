"""Linearizations made of another one, which keeps what they compute."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .base import Jacobian
from .linearization import Linearization


class DerivedLinearization(Linearization):
    """One that holds nothing itself: what is kept, the base keeps, also in pickles and copies.

    :ivar base: The other one.
    """

    base: Linearization

    @property
    @abstractmethod
    def label(self) -> str:
        """Tells what is kept for this one apart from what is kept for the base."""

    @property
    def solvers(self) -> list:
        return self.base.solvers

    def add_solver(self, solver: Any) -> None:
        self.base.add_solver(solver)

    def clear(self) -> None:
        self.base.clear()

    def keep(
        self, kind: str, tensors: tuple[Tensor, ...], compute: Callable[..., Any], network_state: int | None = None
    ) -> Any:
        return self.base.keep(f"{kind} {self.label}", tensors, compute, network_state)

    def kept(self, kind: str, tensors: tuple[Tensor, ...]) -> Any:
        return self.base.kept(f"{kind} {self.label}", tensors)

    def unit_grams(self, jacobian1: Jacobian, jacobian2: Jacobian) -> None:
        """None: they are not kept, a product makes them at once."""
        return None

    def __getstate__(self) -> dict:
        return self.__dict__

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
