"""Every notebook runs from top to bottom, in its quick version: `make notebooks QUICK=1`."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only

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
