"""Tries random networks for as long as asked: `python -m tests.fuzz --seconds 300`, or one: `--seed 17 --count 1`.

Whatever goes wrong is printed with its seed, the recipe, and the fewest of its blocks with which it goes wrong still.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections import Counter

import torch

from tests.fuzz.check import Reference, failures
from tests.fuzz.recipe import Recipe, recipe

ENGINES = ("structured", "autodiff")


def found(candidate: Recipe, engine: str) -> list[tuple[str, str]]:
    torch.manual_seed(candidate.seed)
    try:
        reference = Reference(candidate)
    except Exception as error:
        return [("reference", f"{type(error).__name__}: {error}")]
    return list(failures(candidate, reference, engine))


def fewest(candidate: Recipe, engine: str, operation: str) -> list[int]:
    """The places of the blocks that are left when those without which the operation goes wrong too are taken out."""
    kept = list(range(len(candidate.steps)))
    for place in reversed(range(len(candidate.steps))):
        fewer = [other for other in kept if other != place]
        if any(name == operation for name, _ in found(candidate.keeping(fewer), engine)):
            kept = fewer
    return kept


def grouped(wrong: list[tuple[str, str]]) -> list[str]:
    """One line for each message, with the operations that it comes from."""
    operations: dict[str, list[str]] = {}
    for operation, message in wrong:
        operations.setdefault(message.splitlines()[0][:160], []).append(operation)
    return [f"{message}\n      in {', '.join(names)}" for message, names in operations.items()]


def report(candidate: Recipe, engine: str, wrong: list[tuple[str, str]]) -> str:
    """Prints it, and says in short what it is: the blocks it takes, and what happens."""
    places = fewest(candidate, engine, wrong[0][0])
    smallest = candidate.keeping(places)
    print(f"\nseed {candidate.seed}, engine {engine}: {candidate}")
    for line in grouped(wrong):
        print(f"    {line}")
    kept = ",".join(map(str, places))
    print(f"  fewest blocks: {' -> '.join(map(str, smallest.steps)) or 'none'}")
    print(
        f"  again: python -m tests.fuzz --seed {candidate.seed} --count 1 --engine {engine} --keep '{kept}'", flush=True
    )
    blocks = " + ".join(sorted({step.name for step in smallest.steps})) or "no block at all"
    return f"{engine}: {blocks}: {wrong[0][0]}: {wrong[0][1].splitlines()[0][:60]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="when to stop (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--count", type=int, help="how many seeds (default: as many as there is time for)")
    parser.add_argument("--engine", choices=ENGINES, help="one engine (default: both)")
    parser.add_argument("--keep", help="the places of the blocks to keep, such as 0,2 (default: all)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    start, kinds = time.monotonic(), Counter[str]()
    for tried, seed in enumerate(itertools.count(arguments.seed)):
        if tried == arguments.count or time.monotonic() - start > arguments.seconds:
            break
        candidate = recipe(seed)
        if arguments.keep is not None:
            candidate = candidate.keeping([int(place) for place in arguments.keep.split(",") if place])
        for engine in ENGINES if arguments.engine is None else (arguments.engine,):
            if wrong := found(candidate, engine):
                kinds[report(candidate, engine, wrong)] += 1
    print(f"\n{tried} networks from seed {arguments.seed} on, {kinds.total()} failed")
    for kind, count in kinds.most_common():
        print(f"{count:5} {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
