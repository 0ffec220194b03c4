"""Every notebook runs from top to bottom (in its quick version), and so does the demo."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture(scope="module")
def execute():
    """The function that `make notebooks` executes notebooks with."""
    spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, request):
    client = pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    execute = request.getfixturevalue("execute")
    before = path.read_bytes()
    try:
        notebook = execute(path, quick=True)
    except client.exceptions.CellExecutionError as error:
        if error.ename != "FileNotFoundError" or "The data are not here" not in error.evalue:
            raise
        pytest.skip(error.evalue)
    assert path.read_bytes() == before
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


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
