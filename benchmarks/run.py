"""`python -m benchmarks.run QUESTION`: measures, and writes tables and figures to `benchmarks/results`.

Without a question: sets the peers up and runs what the published tables are made of.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from . import peers, report

QUESTIONS = [
    "engines",
    "computed",
    "outputs",
    "posterior",
    "condition",
    "fit",
    "sums",
    "serve",
    "last_layer",
    "uci",
    "large",
    "variational",
    "distributed",
]
DEFAULT = ["engines", "posterior"]


DEFAULTS = {
    "quick": False,
    "threads": None,
    "repeats": None,
    "slowest": 60.0,
    "limit": 900.0,
    "output": None,
    "keep": False,
}


def parser() -> argparse.ArgumentParser:
    # Without defaults here, so that an option may stand before or after the question.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    common.add_argument("--threads", type=int, nargs="+", help="numbers of threads to measure with (default: 1 2)")
    common.add_argument("--repeats", type=int, help="timings of each cell (default: 5)")
    common.add_argument("--slowest", type=float, help="a cell that takes more seconds is timed only once (default: 60)")
    common.add_argument("--limit", type=float, help="a call that takes more seconds is given up (default: 900)")
    common.add_argument("--output", type=Path, help=f"folder of the results (default: {report.RESULTS})")
    common.add_argument("--keep", action="store_true", help="keep earlier results that this run does not measure again")
    top = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__.splitlines()[0], parents=[common])
    choices = top.add_subparsers(dest="question", metavar="QUESTION")
    for name in QUESTIONS:
        question = _question(name)
        sub = choices.add_parser(name, help=question.__doc__.splitlines()[0], parents=[common])
        question.add_arguments(sub)
        sub.set_defaults(run=question.run)
    return top


def _question(name: str):
    return importlib.import_module(f"benchmarks.questions.{name}")


def _with_defaults(given: argparse.Namespace) -> argparse.Namespace:
    arguments = argparse.Namespace(**DEFAULTS | vars(given))
    arguments.threads = arguments.threads or ([1] if arguments.quick else [1, 2])
    arguments.repeats = arguments.repeats or (2 if arguments.quick else 5)
    arguments.output = arguments.output or (report.QUICK_RESULTS if arguments.quick else report.RESULTS)
    return arguments


def main() -> None:
    arguments = parser().parse_args()
    if arguments.question is not None:
        arguments = _with_defaults(arguments)
        arguments.run(arguments)
        print(f"Written to {arguments.output}")
        return
    for name in peers.names():
        peers.setup(name)
    for name in DEFAULT:
        single = parser().parse_args([name], argparse.Namespace(**vars(arguments)))
        single.run(_with_defaults(single))


if __name__ == "__main__":
    main()
