"""The tables: how far each method is behind the best in hindsight, and the recipe beside each of the others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import report
from .methods import METHODS, RECIPE
from .run import EXPERIMENTS, Line, read

NAME = "adaptation"
TIE = 0.01  # nats: a smaller difference is no win

Key = tuple[str, int]  # task and seed

TITLES = {
    "friedman": "Related functions",
    "unrelated": "Unrelated functions",
    "real": "Real data",
}

EXPLANATION = """
Every method predicts densities of observations at the same test points. NLPD is the mean negative log predictive
density, in nats, with the target measured in its own standard deviations; MSE is that of the mean, relative to the
variance of the target. *Regret* is how far a method's NLPD is behind the best of all methods in hindsight, on the same
labels: its mean over tasks and seeds, and the largest. *Recipe − method* is the mean difference in NLPD (negative: the
recipe is better) with its standard error, and on how many tasks and seeds it won, tied (within 0.01) or lost. Seeds of
one real task share data: they are averaged first, and the standard error is over the tasks. RMSE ratio is the
recipe's over the method's, as a geometric mean. Coverage is of ±1.96 standard deviations. What is said to be averaged
is averaged over hyperparameters; the other Gaussian processes have those of the mode.
"""


def _seeds(lines: Iterable[Line]) -> list[str]:
    return [str(seed) for seed in sorted({line["seed"] for line in lines})]


class Scores(NamedTuple):
    """What one method has at one number of labels."""

    lines: dict[Key, Line]

    def values(self, name: str, keys: Iterable[Key] | None = None) -> np.ndarray:
        return np.array([self.lines[key][name] for key in (self.lines if keys is None else keys)])


def write(output: Path, results: Path | None, quick: bool) -> None:
    """Tables, figure and their numbers from what is in the folder of results.

    :param results: Where to write (default: `benchmarks/results`, or where quick runs write).
    """
    lines = {name: read(output / f"{name}.jsonl") for name in EXPERIMENTS}
    lines = {name: some for name, some in lines.items() if some}
    if not lines:
        raise SystemExit(f"There are no results in {output}: run an experiment first.")
    folder = results or (report.QUICK_RESULTS if quick else report.RESULTS)
    rows = [row for name, some in lines.items() for row in summary(name, some)]
    report.write(folder, NAME, {"rows": rows}, markdown(lines, rows))
    _figure(rows, folder / f"{NAME}.png")
    print(f"Written to {folder / NAME}.md")


def summary(experiment: str, lines: Sequence[Line]) -> list[dict]:
    """A row for each number of labels and method, and for all numbers together (n = 0)."""
    rows = []
    for n in [*sorted({line["n"] for line in lines}), 0]:
        some = [line for line in lines if n in (0, line["n"])]
        of = {name: _scores(some, name) for name in METHODS}
        of = {name: scores for name, scores in of.items() if scores.lines}
        best = _best(of.values())
        for name, scores in of.items():
            failed = sum("error" in line for line in some if line["method"] == name)
            rows.append(
                {"experiment": experiment, "n": n, "method": name, "cells": len(scores.lines), "failed": failed}
                | _alone(experiment, scores, best)
                | (_beside(experiment, of[RECIPE], scores) if RECIPE in of else {})
            )
    return rows


def _scores(lines: Iterable[Line], method: str) -> Scores:
    return Scores(
        {
            (line["task"], line["seed"], line["n"]): line
            for line in lines
            if line["method"] == method and "error" not in line
        }
    )


def _best(methods: Iterable[Scores]) -> dict[Key, float]:
    best: dict[Key, float] = defaultdict(lambda: math.inf)
    for scores in methods:
        for key, line in scores.lines.items():
            best[key] = min(best[key], line["nlpd"])
    return best


def _alone(experiment: str, scores: Scores, best: dict[Key, float]) -> dict:
    regret = scores.values("nlpd") - np.array([best[key] for key in scores.lines])
    nlpd, error = _mean_and_error(experiment, list(scores.lines), scores.values("nlpd"))
    return {
        "regret": float(regret.mean()),
        "worst": float(regret.max()),
        "nlpd": nlpd,
        "nlpd_error": error,
        "mse": float(np.median(scores.values("mse"))),
        "coverage": float(scores.values("coverage").mean()),
        "seconds": float(np.median(scores.values("seconds"))),
    }


def _beside(experiment: str, recipe: Scores, other: Scores) -> dict:
    """The recipe less another, where both have results."""
    keys = [key for key in recipe.lines if key in other.lines]
    if not keys or recipe is other:
        return {}
    difference = recipe.values("nlpd", keys) - other.values("nlpd", keys)
    mean, error = _mean_and_error(experiment, keys, difference)
    wins, losses = int((difference < -TIE).sum()), int((difference > TIE).sum())
    ratio = np.log(recipe.values("mse", keys) / other.values("mse", keys)).mean() / 2
    return {
        "difference": mean,
        "difference_error": error,
        "wins": wins,
        "ties": len(keys) - wins - losses,
        "losses": losses,
        "rmse_ratio": float(np.exp(ratio)),
    }


def _mean_and_error(experiment: str, keys: Sequence[tuple], values: np.ndarray) -> tuple[float, float]:
    """The mean over what is independent, and its standard error: real tasks; networks and targets of synthetic ones."""
    groups = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        groups[key[0] if experiment == "real" else key[:2]].append(value)
    means = np.array([np.mean(group) for group in groups.values()])
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return float(means.mean()), float(error)


# ---- Markdown ----


def markdown(lines: dict[str, list[Line]], rows: Sequence[dict]) -> str:
    commands = "\n".join(
        f"    python -m benchmarks.adaptation {name} --processes 2 --seeds {' '.join(_seeds(some))}"
        for name, some in lines.items()
    )
    parts = ["# Adaptation, method by method", commands, EXPLANATION.strip(), report.machine_line()]
    for name in lines:
        own = [row for row in rows if row["experiment"] == name]
        parts.append(f"## {TITLES[name]}")
        parts += [_by_numbers(own, "mse", "Median of the MSE"), _by_numbers(own, "nlpd", "Mean of the NLPD")]
        for n in [*sorted({row["n"] for row in own if row["n"]}), 0]:
            some = [row for row in own if row["n"] == n]
            title = f"n = {n}" if n else "All numbers of labels together"
            cells = max(row["cells"] for row in some)
            parts += [f"### {title} ({cells} {'cells' if cells > 1 else 'cell'})", _by_methods(some)]
        if name == "real":
            parts.append(_by_tasks(lines[name]))
    return "\n\n".join(parts)


def _by_methods(rows: Sequence[dict]) -> str:
    header = ["method", "mean regret", "worst", "recipe − method", "won/tied/lost", "RMSE ratio", "coverage", "time"]
    texts = []
    for row in sorted(rows, key=lambda row: row["regret"]):
        beside = ["", "", ""]
        if "difference" in row:
            beside = [
                f"{row['difference']:+.3f} ± {row['difference_error']:.3f}",
                f"{row['wins']}/{row['ties']}/{row['losses']}",
                f"{row['rmse_ratio']:.3f}",
            ]
        end = [f"{100 * row['coverage']:.0f} %", report.duration(row["seconds"])]
        texts.append([_title(row), f"{row['regret']:.3f}", f"{row['worst']:.2f}", *beside, *end])
    return report.markdown_table(header, texts)


def _by_numbers(rows: Sequence[dict], score: str, title: str) -> str:
    """Methods by numbers of labels, with standard errors where the rows have them."""
    numbers = sorted({row["n"] for row in rows if row["n"]})
    of = {(row["method"], row["n"]): row for row in rows}

    def text(row: dict | None) -> str:
        if row is None:
            return ""
        error = row.get(f"{score}_error")
        return f"{row[score]:.3f}" + ("" if error is None else f" ± {error:.3f}")

    texts = [
        [_bold(name), *(text(of.get((name, n))) for n in numbers)]
        for name in METHODS
        if any((name, n) in of for n in numbers)
    ]
    return f"{title}:\n\n" + report.markdown_table(["", *(f"n = {n}" for n in numbers)], texts)


def _by_tasks(lines: Sequence[Line]) -> str:
    """For each task: the best method on the mean over seeds, and how far the recipe is behind it."""
    nlpd = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if "error" not in line:
            nlpd[line["task"], line["n"]][line["method"]].append(line["nlpd"])
    texts = []
    for (task, n), methods in nlpd.items():
        means = {name: float(np.mean(values)) for name, values in methods.items()}
        ranking = sorted(means, key=means.__getitem__)
        behind = (
            [f"{means[RECIPE] - means[ranking[0]]:.3f}", str(ranking.index(RECIPE) + 1)]
            if RECIPE in means
            else ["", ""]
        )
        unadapted = f"{means['unadapted']:.3f}" if "unadapted" in means else ""
        texts.append([task, str(n), ranking[0], f"{means[ranking[0]]:.3f}", *behind, unadapted])
    header = ["task", "n", "best on average", "its NLPD", "recipe behind it", "recipe's rank", "NLPD, unadapted"]
    return "### Task by task\n\n" + report.markdown_table(header, texts)


def _title(row: dict) -> str:
    return _bold(row["method"]) + (f" ({row['failed']} failed)" if row["failed"] else "")


def _bold(name: str) -> str:
    return f"**{name}**" if name == RECIPE else name


def _figure(rows: Sequence[dict], file: Path) -> None:
    """A panel for each experiment: mean regret of every method, by the number of labels."""
    from matplotlib import pyplot

    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    canvas, panels = pyplot.subplots(1, len(experiments), figsize=(5 * len(experiments), 6.5), squeeze=False)
    for panel, name in zip(panels[0], experiments, strict=True):
        own = [row for row in rows if row["experiment"] == name]
        together = {row["method"]: row["regret"] for row in own if row["n"] == 0}
        order = sorted(together, key=together.__getitem__, reverse=True)
        for n in sorted({row["n"] for row in own if row["n"]}):
            points = [(row["regret"], order.index(row["method"])) for row in own if row["n"] == n]
            panel.plot(*zip(*points, strict=True), "o", alpha=0.8, label=f"n = {n}")
        panel.set_yticks(range(len(order)), order)
        for label in panel.get_yticklabels():
            label.set_weight("bold" if label.get_text() == RECIPE else "normal")
        panel.set_xscale("symlog", linthresh=0.1)
        panel.set_xlim(left=0)
        panel.set(title=TITLES[name], xlabel="mean regret, nats")
        panel.grid(axis="both", alpha=0.25)
        panel.legend(frameon=False)
    canvas.tight_layout()
    canvas.savefig(file, dpi=120)
    pyplot.close(canvas)
