"""Random networks, what is selected of them, and their inputs: all that follows from one seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.fuzz.blocks import BLOCKS, TOKENS, VOCABULARY, WIDTH, Block


@dataclass(frozen=True)
class Step:
    """One block of a network, how it is put in, and whether tanh comes next."""

    block: str
    wrapper: str
    tanh: bool
    seed: int

    @property
    def name(self) -> str:
        return self.block if self.wrapper == "plain" else f"{self.wrapper}({self.block})"

    def __str__(self) -> str:
        return self.name + (", tanh" if self.tanh else "")


@dataclass(frozen=True)
class Recipe:
    """A network and a problem for it.

    :param outputs: C of the network.
    :param output: As in `NTKKernel`.
    :param selection: How parameters are chosen, a key of `SELECTIONS`.
    :param inputs: What the rows are like, a key of `INPUTS`.
    :param training: How many rows are training inputs; the rest is for tests.
    :param batch: Whether there are two batches of inputs.
    :param groups: As `variance_groups` in `NTKKernel`.
    :param mode: In which mode the network is handed over, "train" or "eval"; what is meant is the latter.
    """

    seed: int
    steps: tuple[Step, ...]
    outputs: int
    output: int | str | None
    selection: str
    inputs: str
    training: int
    batch: bool
    dtype: torch.dtype
    groups: str | None
    mode: str

    def __str__(self) -> str:
        options = {name: value for name, value in vars(self).items() if name not in ("seed", "steps")}
        return " -> ".join(map(str, self.steps)) + "\n  " + ", ".join(f"{k}={v}" for k, v in options.items())

    @property
    def may_refuse(self) -> bool:
        return any(BLOCKS[step.block].may_refuse for step in self.steps)

    @property
    def single(self) -> bool:
        """Whether some of it is float32 whatever the inputs are."""
        return any(BLOCKS[step.block].single for step in self.steps)

    @property
    def has_slope(self) -> bool:
        """Whether finite differences in x say what its derivative is, and it is not refused, as of checkpoints."""
        exact = self.dtype == torch.float64 and not self.single
        return exact and not any(BLOCKS[step.block].detached or step.wrapper == "checkpointed" for step in self.steps)

    def keeping(self, places: list[int]) -> Recipe:
        """With only these of the blocks."""
        return replace(self, steps=tuple(self.steps[place] for place in places))

    def network(self) -> nn.Module:
        """Made anew, in float64, with weights that are float32 numbers; in train mode."""
        with torch.random.fork_rng(devices=[]):
            return Network(self)

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs (*batch, n, WIDTH), float64 but of float32 numbers, and standard normal numbers, (*batch, n, C)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2,) if self.batch else ()
        x = torch.stack([INPUTS[self.inputs](self.training + 4, generator) for _ in range(2)])
        x = x if self.batch else x[0]
        normal = torch.randn(*shape, self.training, self.outputs, generator=generator, dtype=torch.float64)
        return x.float().double(), normal


class Network(nn.Module):
    """The blocks of a recipe one after the other, and a linear layer."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.steps = recipe.steps
        blocks = []
        for step in recipe.steps:
            torch.manual_seed(step.seed)
            blocks.append(Block(step.block))
        torch.manual_seed(recipe.seed)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, recipe.outputs)
        self.double()
        chosen = SELECTIONS[recipe.selection]
        for place, (name, parameter) in enumerate(self.named_parameters()):
            wanted = name.startswith("head") or chosen(name, place)
            parameter.requires_grad_(wanted and not parameter.is_complex())

    def forward(self, x: Tensor) -> Tensor:
        h, x = x, x.clone()
        for step, block in zip(self.steps, self.blocks, strict=True):
            h = WRAPPERS[step.wrapper](block, h, x)
            h = torch.tanh(h) if step.tanh else h
        return self.head(h)


WRAPPERS: dict[str, Callable[[Block, Tensor, Tensor], Tensor]] = {
    "plain": lambda block, h, x: block(h, x),
    "residual": lambda block, h, x: h + block(h, x),
    "twice": lambda block, h, x: block(torch.tanh(block(h, x)), x),
    "checkpointed": lambda block, h, x: checkpoint(block, h, x, use_reentrant=False),
}

SELECTIONS: dict[str, Callable[[str, int], bool]] = {
    "all": lambda name, place: True,
    "weights": lambda name, place: not name.endswith("bias"),
    "biases": lambda name, place: name.endswith("bias"),
    "every second": lambda name, place: place % 2 == 0,
    "last": lambda name, place: False,
}


def _plain(n: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(n, WIDTH, generator=generator)
    x[:, -TOKENS:] = torch.randint(VOCABULARY, (n, TOKENS), generator=generator).float()
    return x


def _late(n: int, generator: torch.Generator) -> Tensor:
    """Ten rows of one region and token, and only then others."""
    x = _plain(n, generator)
    x[:10, 0] = -x[:10, 0].abs()
    x[:10, -TOKENS:] = 1.0
    x[10:, 0] = x[10:, 0].abs() * torch.tensor([1.0, -1.0]).repeat(n)[: max(0, n - 10)]
    return x


def _replicated(n: int, generator: torch.Generator) -> Tensor:
    x = _plain(n, generator)
    x[:9] = x[:1]
    return x


def _twins(n: int, generator: torch.Generator) -> Tensor:
    """Each row is there twice, far apart."""
    x = _plain(n, generator)
    x[n - n // 2 :] = x[: n // 2]
    return x


INPUTS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "plain": _plain,
    "late": _late,
    "replicated": _replicated,
    "twins": _twins,
}


def recipe(seed: int) -> Recipe:
    """The recipe of a seed: as many seeds in a row as there are blocks have each of them."""
    draw = random.Random(seed)
    names = [list(BLOCKS)[seed % len(BLOCKS)], *draw.choices(list(BLOCKS), k=draw.choice([0, 1, 1, 2, 3]))]
    draw.shuffle(names)
    outputs = draw.choice([1, 1, 2, 3])
    return Recipe(
        seed=seed,
        steps=tuple(_step(name, place, draw) for place, name in enumerate(_in_order(names))),
        outputs=outputs,
        output=draw.choice(["all", "all", outputs - 1, None]) if outputs == 1 else draw.choice(["all", outputs - 1]),
        selection=draw.choice(["all", "all", "all", *SELECTIONS]),
        inputs=draw.choice(["late", *INPUTS]),
        training=draw.choice([1, 12, 14, 17]),
        batch=draw.random() < 0.15,
        dtype=draw.choice([torch.float64, torch.float64, torch.float32]),
        groups=draw.choice([None, None, "layer", "parameter"]),
        mode=draw.choice(["eval", "eval", "train"]),
    )


def _in_order(names: list[str]) -> list[str]:
    """At most one block that writes into the inputs, at the beginning."""
    first = [name for name in names if BLOCKS[name].first]
    return [*first[:1], *(name for name in names if not BLOCKS[name].first)]


def _step(name: str, place: int, draw: random.Random) -> Step:
    wrappers = [wrapper for wrapper in WRAPPERS if wrapper != "checkpointed" or not BLOCKS[name].once]
    wrapper = "plain" if BLOCKS[name].first else draw.choice(["plain", "plain", "plain", *wrappers])
    return Step(name, wrapper, draw.random() < 0.5, draw.randrange(10**6))
