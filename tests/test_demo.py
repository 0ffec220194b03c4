"""The demo runs from top to bottom, in a small version."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only]

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def test_demo_prints_its_tables_and_draws_its_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'demo' is not installed")
    options = ["--tasks", "1", "--labels", "10", "--steps", "200", "--output", tmp_path / "demo.png"]
    command = [sys.executable, NOTEBOOKS / "adaptation.py", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    table, looks = result.stdout.split("one input")
    (row,) = [line.split() for line in table.splitlines() if "ntk_gp.AdaptedGP" in line]
    error, density = float(row[1]), float(row[4])
    assert 0 < error < 1, "worse than the mean of the task would be"
    assert math.isfinite(density)
    assert looks.count("against an RBF kernel from scratch") == 4
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
