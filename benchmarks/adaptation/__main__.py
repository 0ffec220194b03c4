"""`python -m benchmarks.adaptation {friedman,unrelated,real}`: computes what is missing, and writes the table."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .methods import METHODS, PEERS, available
from .real import Real
from .run import EXPERIMENTS, Plan, estimate, run, run_peers
from .training import BUILD


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser("python -m benchmarks.adaptation", description=__doc__.split(": ", 1)[1])
    options.add_argument("experiment", choices=[*EXPERIMENTS, "report"], help="`report` only writes the table")
    options.add_argument("--quick", action="store_true", help="one small cell for each seed: does everything run?")
    options.add_argument("--processes", type=int, default=1, help="of one thread each (default: %(default)s)")
    options.add_argument(
        "--seeds", type=int, nargs="+", help="of the source networks (default: 0 1 2 3, or 0 1 2 of `real`)"
    )
    options.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    options.add_argument("--again", action="store_true", help="compute these methods also where there are results")
    options.add_argument("--data", help="folder or address of the real data (default: $NTK_GP_DATA or ../shared/data)")
    options.add_argument("--output", type=Path, help="folder of every cell's results (default: build/adaptation)")
    options.add_argument("--results", type=Path, help="folder of the table (default: benchmarks/results)")
    options.add_argument("--estimate", action="store_true", help="only say how long each method and all would take")
    options.add_argument("--no-report", action="store_true", help="write no table")
    return options


def main() -> None:
    arguments = parser().parse_args()
    output = arguments.output or BUILD / ("quick" if arguments.quick else ".")
    if arguments.experiment != "report":
        try:
            _compute(arguments, output)
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
    if not arguments.no_report and not arguments.estimate:
        # Only here: it draws, and the peers' environment has nothing to draw with.
        importlib.import_module("benchmarks.adaptation.report").write(output, arguments.results, arguments.quick)


def _compute(arguments: argparse.Namespace, output: Path) -> None:
    plan = Plan(arguments.experiment, arguments.data, arguments.quick)
    missing = sorted(set(arguments.methods or METHODS) - set(available()) - set(PEERS))
    if missing:
        print(f"Left out, since this ntk_gp does not have what they need: {'; '.join(missing)}", flush=True)
    methods = [name for name in arguments.methods or METHODS if name in available()]
    if arguments.estimate:
        return estimate(plan, arguments.seeds, methods, arguments.processes)
    file = output / f"{arguments.experiment}.jsonl"
    if methods:
        run(plan, arguments.seeds, methods, arguments.processes, file, arguments.again)
    elsewhere = [name for name in arguments.methods or PEERS if name in PEERS and name not in available()]
    if elsewhere:
        run_peers(elsewhere, _passed_on(arguments, output))
    return None


def _passed_on(arguments: argparse.Namespace, output: Path) -> list[str]:
    """The same options, for the peers' environment."""
    options = [arguments.experiment, "--processes", str(arguments.processes), "--output", str(output.absolute())]
    options += ["--quick"] * arguments.quick + ["--again"] * arguments.again
    if arguments.experiment == "real":  # a folder, also where an address was named: there nothing is fetched
        options += ["--data", str(Real(arguments.data).folder.absolute())]
    if arguments.seeds:
        options += ["--seeds", *map(str, arguments.seeds)]
    return options


if __name__ == "__main__":
    main()
