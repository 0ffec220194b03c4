"""Every notebook runs from top to bottom, in its quick version: `make notebooks QUICK=1`.

In this process, cell by cell as a kernel would: starting one for each notebook and importing everything there takes
most of the time.
"""

import importlib.util
import os
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cpu_only

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


@pytest.fixture
def run_cells(monkeypatch):
    """What runs the code cells of a notebook in its folder, and returns the data of what they displayed.

    Whatever they set for the whole process is set back.
    """
    publisher = pytest.importorskip("IPython.core.displaypub", reason="the extra 'notebooks' is not installed")
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Shell(InteractiveShell):
        def enable_gui(self, gui=None):
            """Figures are shown inline, by no toolkit."""

    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(sys, "path", [str(NOTEBOOKS), *sys.path])
    monkeypatch.setattr(sys, "displayhook", sys.displayhook)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    main = types.ModuleType("the_notebook")
    monkeypatch.setitem(sys.modules, main.__name__, main)
    backend, dtype, threads = mpl.get_backend(), torch.get_default_dtype(), torch.get_num_threads()
    config = Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}})
    shell = Shell.instance(config=config, display_pub_class=publisher.CapturingDisplayPublisher, user_module=main)

    def run(notebook) -> list[dict]:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source, store_history=False).raise_error()
        return [each["data"] for each in shell.display_pub.outputs]

    with warnings.catch_warnings(), mpl.rc_context(), torch.random.fork_rng(devices=[]):
        yield run
    plt.close("all")
    shell.run_line_magic("matplotlib", backend)  # otherwise the next shell's figures are no images
    Shell.clear_instance()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, run_cells, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the extra 'notebooks' is not installed")
    monkeypatch.setenv("QUICK", "1")
    before = path.read_bytes()
    try:
        displayed = run_cells(nbformat.read(path, as_version=4))
    except FileNotFoundError as error:
        if "The data are not here" not in str(error):
            raise
        pytest.skip(str(error))
    assert path.read_bytes() == before
    assert any("image/png" in data for data in displayed)


@pytest.fixture
def execute():
    """The function that `make notebooks` executes notebooks with."""
    spec = importlib.util.spec_from_file_location("execute", NOTEBOOKS / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


@pytest.mark.parametrize("quick", [True, False])
def test_a_notebook_is_executed_by_a_kernel_of_its_own(quick, tmp_path, monkeypatch, request):
    client = pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("QUICK", "as it was")
    cells = ["import os\nos.environ['QUICK']", "os.getpid(), os.getcwd()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in cells])
    nbformat.write(notebook, tmp_path / "some.ipynb")
    before = (tmp_path / "some.ipynb").read_bytes()
    execute = request.getfixturevalue("execute")
    executed = execute(tmp_path / "some.ipynb", quick)
    first, second = (eval(cell.outputs[0].data["text/plain"]) for cell in executed.cells)
    assert first == ("1" if quick else "") and os.environ["QUICK"] == "as it was"
    assert second[0] != os.getpid() and Path(second[1]) == tmp_path
    assert (tmp_path / "some.ipynb").read_bytes() == before
    notebook.cells[0].source = "1 / 0"
    nbformat.write(notebook, tmp_path / "some.ipynb")
    with pytest.raises(client.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(tmp_path / "some.ipynb", quick)
