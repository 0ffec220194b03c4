"""The networks that are adapted: small MLPs, trained on a source and kept on disk."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

BUILD = Path(__file__).resolve().parents[2] / "build" / "adaptation"
WIDTH = 50
STEPS, BATCH = 6000, 256
BETWEEN_LOOKS = 200  # steps between looks at the error on what is held out
VERSION = 1  # to be changed with anything that changes what is trained


class Trained(NamedTuple):
    """A network from standardised inputs to standardised outputs, (m, d) to (m, 1), and what standardises them."""

    network: nn.Sequential
    x_mean: Tensor  # (d,)
    x_scale: Tensor
    y_mean: Tensor  # ()
    y_scale: Tensor
    held_out: float  # mean squared error on a tenth of the source that was not trained on, standardised

    def inputs(self, x: Tensor) -> Tensor:
        return (x - self.x_mean) / self.x_scale

    def outputs(self, y: Tensor) -> Tensor:
        return (y - self.y_mean) / self.y_scale


def make_network(num_inputs: int, seed: int) -> nn.Sequential:
    """Two hidden layers, of tanh for even seeds and SiLU for odd ones, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        activation = nn.SiLU if seed % 2 else nn.Tanh
        layers = [nn.Linear(num_inputs, WIDTH), activation(), nn.Linear(WIDTH, WIDTH), activation()]
        return nn.Sequential(*layers, nn.Linear(WIDTH, 1)).double()


def trained(
    name: str,
    seed: int,
    source: Callable[[], tuple[Tensor, Tensor]],
    steps: int = STEPS,
) -> Trained:
    """The network of this name and seed, from disk or trained on the source, which is asked for only then.

    :param source: Gives inputs (n, d) and targets (n,), as measured.
    """
    folder = BUILD / "networks"
    file = folder / f"{name.replace(' ', '_').replace('/', '-')}-{seed}-{steps}-v{VERSION}.pt"
    if file.exists():
        state = torch.load(file)
        network = make_network(len(state["numbers"][0]), seed)
        network.load_state_dict(state["weights"])
        return Trained(network.eval(), *state["numbers"])
    result = train(*source(), seed, steps)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")  # another process may be writing the same
    torch.save({"weights": result.network.state_dict(), "numbers": list(result[1:])}, unfinished)
    unfinished.replace(file)
    return result


def train(x: Tensor, y: Tensor, seed: int, steps: int = STEPS) -> Trained:
    """Least squares on nine tenths, by Adam with a cosine schedule, stopped where it is best on the last tenth."""
    x_scale, y_scale = x.std(0), y.std()
    if not (x_scale > 0).all() or not y_scale > 0:
        raise ValueError(f"The source has a constant column: standard deviations {x_scale.tolist()} and {y_scale}.")
    network = make_network(x.shape[-1], seed)
    result = Trained(network, x.mean(0), x_scale, y.mean(), y_scale, math.inf)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    x, y = result.inputs(x)[order], result.outputs(y)[order]
    held_out = max(1, len(y) // 10)
    x, y, x_held_out, y_held_out = x[held_out:], y[held_out:], x[:held_out], y[:held_out]
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        rows = torch.randint(len(y), (min(BATCH, len(y)),), generator=generator)
        optimizer.zero_grad()
        (network(x[rows]).squeeze(-1) - y[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
        if step % BETWEEN_LOOKS == 0 or step == steps:
            with torch.no_grad():
                error = float((network(x_held_out).squeeze(-1) - y_held_out).square().mean())
            if error < result.held_out:
                result = result._replace(network=copy.deepcopy(network), held_out=error)
    return result._replace(network=result.network.eval())
