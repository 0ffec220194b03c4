"""Does a prediction cost more when the model has seen more data?"""

from __future__ import annotations

import argparse

from .. import problems, report
from ..harness import Operation, Timing, measure
from .posterior import NETWORK, OURS

SIZES = (1000, 20_000)
QUICK_SIZES = (100, 400)
NUM_TEST = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", help=f"numbers of training inputs (default: {SIZES})")


def run(arguments: argparse.Namespace) -> None:
    """The mean at 1,000 inputs, new ones every time, after caching; beside a forward pass of the network there.

    And the adapted network at one input, beside the same written by hand with `torch.func`.
    """
    operations = [
        Operation("mean", "serve", {"noise": problems.NOISE}),
        Operation("forward pass", "forward_pass"),
        Operation("adapted network", "adapted", {"noise": problems.NOISE}),
        Operation("by hand", "adapted_by_hand", {"noise": problems.NOISE}),
    ]
    rows, lines = [], []
    for threads in arguments.threads:
        smallest = None
        for n in arguments.sizes or (QUICK_SIZES if arguments.quick else SIZES):
            case = problems.Case(NETWORK, n, NUM_TEST)
            timing = Timing(threads, 4 * arguments.repeats, arguments.slowest, arguments.limit)
            measured = measure([OURS], case.description(), case.arrays(), operations, timing)
            rows += [{"network": NETWORK, "n": n, **row} for row in measured]
            mean, forward, one, by_hand = (report.median(row, OURS.title) for row in measured)
            smallest = smallest or mean
            ratios = [f"{mean / other:.2f}" if mean and other else "" for other in (smallest, forward)]
            times = [report.duration(mean), report.duration(forward)]
            ratios += [report.duration(one), f"{one / by_hand:.2f}" if one and by_hand else ""]
            remark = report.remarks(measured[0]["cells"][0])
            lines.append([f"{n:,}", str(threads), *times, *ratios, remark])
    header = ["n", "threads", f"mean at {NUM_TEST:,}", "forward pass", "of the smallest n", "in forward passes"]
    header += ["adapted, at 1", "of by hand", ""]
    title = f"# Serving after caching, network {NETWORK}"
    markdown = f"{title}\n\n{report.machine_line()}\n\n{report.markdown_table(header, lines)}"
    report.write(arguments.output, "serve", {"rows": rows}, markdown)
