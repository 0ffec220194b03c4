"""What do weights that are computed from parameters cost, beside a plain network's?"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.network import FrozenNetwork

from .. import report

WIDTH, RANK = 200, 8


class Adapted(nn.Linear):
    """A layer with a low-rank update, merged in each call or beside the layer."""

    def __init__(self, merged: bool):
        super().__init__(WIDTH, WIDTH)
        self.merged = merged
        self.up, self.down = (nn.Parameter(0.05 * torch.randn(shape)) for shape in ((WIDTH, RANK), (RANK, WIDTH)))

    def forward(self, input: Tensor) -> Tensor:
        if self.merged:
            return F.linear(input, self.weight + self.up @ self.down, self.bias)
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


class Positive(nn.Linear):
    """A layer whose weights are positive."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, F.softplus(self.weight) / WIDTH, self.bias)


def _plain() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


def _only_updates(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith(("up", "down"))


def _images(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = wrap(nn.Conv2d(1, 16, 3)), nn.Tanh(), wrap(nn.Conv2d(16, 32, 3, stride=2)), nn.Tanh()
    return nn.Sequential(nn.Unflatten(1, (1, 12, 12)), *layers, nn.Flatten(), nn.Linear(512, 1))


def _mlp(layer: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), layer(), nn.Tanh(), layer(), nn.Tanh(), nn.Linear(WIDTH, 1))


# A network, the one it is compared with, how it is made, and which of its parameters are selected.
CASES: dict[str, tuple[str, Callable[[], nn.Module], Callable | None]] = {
    "plain": ("plain", lambda: _mlp(_plain), None),
    "weight norm": ("plain", lambda: _mlp(lambda: parametrizations.weight_norm(_plain())), None),
    "spectral norm": ("plain", lambda: _mlp(lambda: parametrizations.spectral_norm(_plain())), None),
    "update, beside": ("plain", lambda: _mlp(lambda: Adapted(merged=False)), None),
    "update, merged": ("plain", lambda: _mlp(lambda: Adapted(merged=True)), None),
    "update alone, beside": ("plain", lambda: _mlp(lambda: Adapted(merged=False)), _only_updates),
    "update alone, merged": ("plain", lambda: _mlp(lambda: Adapted(merged=True)), _only_updates),
    "softplus": ("plain", lambda: _mlp(lambda: Positive(WIDTH, WIDTH)), None),
    "convolutions": ("convolutions", lambda: _images(lambda layer: layer), None),
    "convolutions, weight norm": ("convolutions", lambda: _images(parametrizations.weight_norm), None),
    "convolutions, spectral norm": ("convolutions", lambda: _images(parametrizations.spectral_norm), None),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=int, nargs="+", help="numbers of inputs (default: 500 1000)")


def run(arguments: argparse.Namespace) -> None:
    """Each network in turn, in this process, in float32: capture and Gram matrix together, and products."""
    torch.set_num_threads(max(arguments.threads))
    rows = report.earlier(arguments, "computed")["rows"]
    for n in arguments.points or ([100] if arguments.quick else [500, 1000]):
        found = {name: _measure(*case[1:], n, arguments.repeats) for name, case in CASES.items()}
        for name, (beside, *_) in CASES.items():
            gram, products = (mine / its for mine, its in zip(found[name], found[beside], strict=True))
            row = {"network": name, "n": n, "seconds": found[name][0], "gram": gram, "products": products}
            print(f"{name}, n = {n}: {1e3 * found[name][0]:.0f} ms, {gram:.2f}, products {products:.2f}")
            rows = [old for old in rows if (old["network"], old["n"]) != (name, n)] + [row]
    report.write(arguments.output, "computed", {"rows": rows}, _markdown(rows))


def _measure(build: Callable[[], nn.Module], parameters: Callable | None, n: int, repeats: int) -> tuple[float, float]:
    """The shortest times of a Gram matrix, capture included, and of Jᵀ v and J u for 20 vectors."""
    torch.manual_seed(0)
    network = build().eval()
    x = torch.randn(1, n, 144 if isinstance(network[0], nn.Unflatten) else 8)
    engine = StructuredEngine(FrozenNetwork(network, parameters=parameters))
    engine.linearize(x)  # what is found out once
    grams, products = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        jacobian = engine.linearize(x)
        gram = jacobian.gram(jacobian, torch.ones(1, 1))
        middle = time.perf_counter()
        jacobian.jvp(jacobian.vjp(gram[:, :20]))
        grams.append(middle - start)
        products.append(time.perf_counter() - middle)
    return min(grams), min(products)


def _markdown(rows: list[dict]) -> str:
    header = ["network", "n", "Gram matrix", "times the plain network's", "products, times the plain network's"]
    lines = [
        [
            row["network"],
            f"{row['n']:,}",
            f"{1e3 * row['seconds']:.0f} ms",
            f"{row['gram']:.2f}",
            f"{row['products']:.2f}",
        ]
        for row in rows
    ]
    legend = f"MLPs of width {WIDTH}, updates of rank {RANK}; Gram matrices with the capture, in float32."
    return "\n\n".join(["# Computed weights", report.machine_line(), legend, report.markdown_table(header, lines)])
