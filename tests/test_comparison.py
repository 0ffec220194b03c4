"""What the notebooks with real data share: finding files, marking the best, scores of methods beside each other."""

import importlib.util
import math
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.adaptation.predictions import Gaussian
from benchmarks.adaptation.tasks import Task

pytest.importorskip("pandas", reason="the extra 'notebooks' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'notebooks' is not installed")
pytestmark = pytest.mark.engine_independent

_SPEC = importlib.util.spec_from_file_location("comparison", Path(__file__).parents[1] / "notebooks" / "comparison.py")
comparison = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(comparison)

M = 40


def task(seed: int) -> Task:
    """With the network 0 and targets of mean 0 and mean square 1."""
    draws = torch.Generator().manual_seed(seed)
    x, x_test = (torch.randn(m, 2, generator=draws, dtype=torch.float64) for m in (8, M))
    y_test = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(M // 2)
    return Task(torch.nn.Sequential(torch.nn.Linear(2, 1)).double(), 0.0, x, x[:, 0], x_test, y_test, y_test)


def constant(mean: float, variance: float):
    def predict(network, x, y, x_test) -> Gaussian:
        warnings.warn(f"{len(x)} labels: few", RuntimeWarning, stacklevel=1)
        return Gaussian(torch.full((M,), mean, dtype=torch.float64), torch.full((M,), variance, dtype=torch.float64))

    return predict


@pytest.fixture
def results():
    methods = {"exact": constant(0.0, 1.0), "off": constant(0.5, 1.0), "sure": constant(0.0, 0.01)}
    return comparison.compare({"one": task, "two": task}, [3, 4], [4, 8], methods)


def test_scores_are_closed_forms(results, capsys):
    assert len(results) == 2 * 2 * 2 * 3
    rows = results[(results["task"] == "two") & (results["seed"] == 4) & (results["n"] == 8)].set_index("method")
    normal = 0.5 * math.log(2 * math.pi)
    assert rows["mse"].tolist() == pytest.approx([1.0, 1.25, 1.0], abs=1e-12)
    assert rows["nlpd"].tolist() == pytest.approx(
        [normal + 0.5, normal + 0.5 * 1.25, normal + math.log(0.1) + 50], abs=1e-12
    )
    assert rows["coverage"].tolist() == [1.0, 1.0, 0.0]
    assert (rows["seconds"] >= 0).all()


def test_warnings_are_counted(capsys):
    comparison.compare({"one": task}, [3, 4], [4, 8], {"exact": constant(0.0, 1.0)})
    told = capsys.readouterr().out
    assert told.startswith("4 warnings")
    assert "2 × exact — 4 labels" in told and "2 × exact — 8 labels" in told


def test_the_same_seed_gives_the_same_to_a_method_that_draws():
    def drawn(network, x, y, x_test) -> Gaussian:
        return Gaussian(torch.randn(M, dtype=torch.float64), torch.ones(M, dtype=torch.float64))

    first, again = (comparison.compare({"one": task}, [0], [4], {"drawn": drawn})["mse"].item() for _ in range(2))
    assert first == again


def test_the_table_marks_the_best_and_what_is_tied_with_it_seed_by_seed():
    rows = {"best": [0.0, 10.0, 20.0], "tied": [1.0, 9.0, 21.0], "behind": [1.0, 11.1, 21.0]}
    lines = [
        {"task": "one", "seed": seed, "n": 5, "method": name, "nlpd": value, "coverage": value / 100}
        for name, values in rows.items()
        for seed, value in enumerate(values)
    ]
    results = comparison.pd.DataFrame(lines)
    head, _, *body = comparison.table(results, "nlpd").splitlines()
    assert "mean over 3 seeds ± standard error" in head
    # Standard errors of the means are 5.8, but those of the differences from the best are 0.67 and 0.03.
    assert [line.split() for line in body] == [
        ["best", "10.000", "±", "5.774*"],
        ["tied", "10.333", "±", "5.812·"],
        ["behind", "11.033", "±", "5.774"],
    ]
    assert not any(mark in comparison.table(results, "coverage") for mark in (comparison.BEST, comparison.TIED))
    (single,) = comparison.table(results[results["seed"] == 0], "nlpd").splitlines()[2:3]
    assert single.split() == ["best", "0.000*"]


def test_everything_is_shown_and_drawn(results, capsys):
    comparison.show(results)
    shown = capsys.readouterr().out
    assert all(title in shown for title, *_ in comparison.METRICS.values()) and "==== two" in shown
    figure = comparison.figure(results)
    assert [len(axis.get_legend_handles_labels()[1]) for axis in figure.axes] == [3] * 6
    comparison.plt.close(figure)


def test_the_methods_are_those_of_the_benchmark():
    assert comparison.RECIPE in comparison.METHODS
    assert all(callable(predict) for predict in comparison.METHODS.values())
    assert comparison.METHODS["NTK"] is comparison.BENCHMARKED["NTK, averaged"].predict
