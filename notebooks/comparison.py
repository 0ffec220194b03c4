"""What the notebooks with real data share: their files, and methods beside each other over seeds and numbers of labels.

The methods are those of `benchmarks/adaptation`, imported from there: a network, labels and test inputs to densities of
observations. Gaussian processes are averaged over their hyperparameters, which is the better half of that table.
"""

from __future__ import annotations

import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the benchmarks are no part of what is installed

from benchmarks.adaptation.methods import METHODS as BENCHMARKED
from benchmarks.adaptation.methods import RECIPE, Predict
from benchmarks.adaptation.predictions import scores
from benchmarks.adaptation.tasks import Task
from benchmarks.data import folder_with as folder_with

AVERAGED = ", averaged"
NAMES = ("last layer", "Matérn", "RBF on features", "Matérn, inputs + features", "NTK", "NTK + Matérn")
METHODS: dict[str, Predict] = {
    **{name: BENCHMARKED[name].predict for name in ("unadapted", "fine-tuning", "fine-tuning, last layer")},
    **{name: BENCHMARKED[name + AVERAGED].predict for name in (*NAMES, "RBF-ARD, no network")},
    RECIPE: BENCHMARKED[RECIPE].predict,
}

BEST, TIED = "*", "·"
# Title, factor, digits, and whether the lowest is the best.
METRICS = {
    "mse": ("MSE, relative to the variance of the target", 1, 3, True),
    "nlpd": ("NLPD, of observations, the target's standard deviation being 1", 1, 3, True),
    "coverage": ("coverage, % of the observations within ±1.96 standard deviations", 100, 0, False),
    "seconds": ("processor seconds, of adapting and predicting", 1, 2, False),
}


def compare(
    tasks: Mapping[str, Callable[[int], Task]],
    seeds: Sequence[int],
    labels: Sequence[int],
    methods: Mapping[str, Predict] = METHODS,
) -> pd.DataFrame:
    """Scores and seconds, a row for each task, seed, number of labels and method.

    :param tasks: By name, what makes the task of a seed. The first n of its pool are the labels.
    :return: Columns task, seed, n, method, and :data:`METRICS`.
    """
    lines, told = [], Counter()
    progress = tqdm(total=len(tasks) * len(seeds) * len(labels) * len(methods), mininterval=60, maxinterval=120)
    for task_name, seed in product(tasks, seeds):
        task = tasks[task_name](seed)
        for n, name in product(labels, methods):
            cell = {"task": task_name, "seed": seed, "n": n, "method": name}
            torch.manual_seed(zlib.crc32(repr(cell).encode()))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warnings.simplefilter("ignore", DeprecationWarning)  # of how others call others
                lines.append(cell | _evaluate(task, n, methods[name]))
            told.update((name, str(each.message).split(":")[0][:90]) for each in caught)
            progress.update()
    progress.close()
    print(f"{told.total()} warnings", *(f"{count} × {' — '.join(what)}" for what, count in told.items()), sep="\n  ")
    return pd.DataFrame(lines)


def _evaluate(task: Task, n: int, predict: Predict) -> dict[str, float]:
    start = time.process_time()
    prediction = predict(task.network, task.x[:n], task.y[:n], task.x_test)
    seconds = time.process_time() - start  # what else the machine does makes no difference
    return {**scores(prediction, task.y_test, task.truth), "seconds": seconds}


def show(results: pd.DataFrame) -> None:
    """Prints the tables of all metrics, of each task."""
    for task, some in results.groupby("task", sort=False):
        print(f"==== {task}; {BEST} the best, {TIED} behind it by at most the standard error of the difference ====\n")
        print(*(table(some, metric) for metric in METRICS), sep="\n\n", end="\n\n")


def table(results: pd.DataFrame, metric: str) -> str:
    """Mean over seeds ± standard error of one task, methods by numbers of labels.

    Marked are the best, and those whose difference from it, seed by seed, is at most the standard error of its mean.
    """
    title, factor, digits, is_marked = METRICS[metric]
    seeds = results["seed"].nunique()
    columns = {}
    for n, some in results.groupby("n"):
        values = factor * some.pivot(index="seed", columns="method", values=metric)[some["method"].unique()]
        marks = _marks(values) if is_marked else dict.fromkeys(values, " ")
        columns[f"n = {n}"] = [
            f"{mean:.{digits}f}" + ("" if np.isnan(error) else f" ± {error:.{digits}f}") + marks[name]
            for name, mean, error in zip(values, values.mean(), values.sem(), strict=True)
        ]
    head = f"{title}: mean over {seeds} {'seeds ± standard error' if seeds > 1 else 'seed'}"
    return f"{head}\n{pd.DataFrame(columns, index=list(values)).to_string()}"


def _marks(values: pd.DataFrame) -> dict[str, str]:
    """A mark for each column; the rows are seeds."""
    best = values.mean().idxmin()
    behind = values.sub(values[best], axis=0)
    is_tied = behind.mean() <= behind.sem().fillna(0)
    return {name: BEST if name == best else TIED if is_tied[name] else " " for name in values}


def figure(results: pd.DataFrame, metrics: Sequence[str] = ("mse", "nlpd", "coverage")) -> plt.Figure:
    """Metrics against the number of labels: a row for each task, a line for each method."""
    tasks = results["task"].unique()
    size = (4.2 * len(metrics), 3.6 * len(tasks) + 0.9)
    fig, axes = plt.subplots(len(tasks), len(metrics), figsize=size, squeeze=False, layout="constrained")
    for row, task in zip(axes, tasks, strict=True):
        for axis, metric in zip(row, metrics, strict=True):
            title, factor, *_ = METRICS[metric]
            for k, (name, some) in enumerate(results[results["task"] == task].groupby("method", sort=False)):
                each = factor * some.groupby("n")[metric].agg(["mean", "sem"])
                style = {"color": "k", "lw": 2.5} if name == RECIPE else {"color": f"C{k % 10}", "ls": "-:"[k // 10]}
                axis.errorbar(each.index, each["mean"], each["sem"], marker="o", ms=3, capsize=2, label=name, **style)
            axis.set(xscale="log", xlabel="labels", ylabel=title.split(",")[0], title=task)
            axis.set_xticks(each.index, [f"{n}" for n in each.index])
            axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return fig
