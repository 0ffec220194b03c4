"""Cells and tasks, which every experiment consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .training import Trained

QUICK_STEPS = 200  # of training


class Cell(NamedTuple):
    """What is computed at once: methods on one task with n labels."""

    task: str
    seed: int  # of the source network, and of all that is drawn
    n: int


class Task(NamedTuple):
    """A network and data to adapt it to, in units of the source: its mean and standard deviation are 0 and 1.

    The first n of the pool are the labels of a cell, so that more labels contain fewer.
    """

    network: nn.Sequential
    held_out: float  # the network's mean squared error in its source
    x: Tensor  # (pool, d)
    y: Tensor  # (pool,)
    x_test: Tensor  # (m, d)
    y_test: Tensor  # (m,)
    truth: Tensor  # (m,): y_test without noise, where that is known


class Experiment(Protocol):
    """A family of tasks."""

    seeds: Sequence[int]  # by default

    def cells(self, seeds: Sequence[int], quick: bool) -> list[Cell]: ...

    def source(self, name: str) -> str:
        """The name of the network of a task; tasks may share it."""
        ...

    def train(self, name: str, seed: int, quick: bool) -> Trained: ...

    def task(self, name: str, seed: int, quick: bool) -> Task: ...


def standardised(
    trained: Trained, pool: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], truth: Tensor | None = None
) -> Task:
    """A task from data as they were measured."""
    x_test, y_test = trained.inputs(test[0]), trained.outputs(test[1])
    truth = y_test if truth is None else trained.outputs(truth)
    return Task(
        trained.network, trained.held_out, trained.inputs(pool[0]), trained.outputs(pool[1]), x_test, y_test, truth
    )


def generator(*seeds: int) -> torch.Generator:
    """Random numbers of their own for several seeds together."""
    (state,) = np.random.SeedSequence(seeds).generate_state(1)
    return torch.Generator().manual_seed(int(state))
