"""The demo runs from top to bottom, in a small version."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from ntk_gp import AdaptedGP

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only]

DEMO = Path(__file__).parents[1] / "notebooks" / "adaptation.py"


def adapted(*data, **options):
    """Two terms in place of five do for the figure, where inputs of the source are passed."""
    return AdaptedGP(*data, **options, terms=("gain", "tangent")) if options else AdaptedGP(*data)


@pytest.fixture
def demo(monkeypatch):
    """Its module, with fewer methods and steps, less to average, and fewer points to draw."""
    pytest.importorskip("matplotlib", reason="the extra 'demo' is not installed").use("Agg")
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    monkeypatch.syspath_prepend(DEMO.parent)
    spec.loader.exec_module(module)
    module.DRAWS, module.GRID = 3, module.GRID[::10]
    module.AdaptedGP = adapted
    tune = module.predict_fine_tuned
    module.predict_fine_tuned = lambda *given, steps: tune(*given, steps=steps // 10)
    for name in ("RBF from scratch (ARD)", "RBF on network and gain", "untrained network's NTK"):
        del module.METHODS[name]
    before = torch.get_default_dtype(), torch.get_num_threads()
    yield module
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.filterwarnings("ignore")  # an average from few draws is rough, and says so
def test_demo_prints_its_tables_and_draws_its_figure(demo, tmp_path, monkeypatch, capsys):
    options = ["--tasks", "1", "--labels", "10", "--steps", "100", "--output", str(tmp_path / "demo.png")]
    monkeypatch.setattr("sys.argv", [str(DEMO), *options])
    demo.main()
    table, looks = capsys.readouterr().out.split("one input")
    (row,) = [line.split() for line in table.splitlines() if "ntk_gp.AdaptedGP" in line]
    error, density = float(row[1]), float(row[4])
    assert 0 < error < 1, "worse than the mean of the task would be"
    assert math.isfinite(density)
    assert looks.count("against an RBF kernel from scratch") == 4
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
