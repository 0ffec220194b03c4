"""Executes the notebooks beside this file, from top to bottom; run it with `make notebooks`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

FOLDER = Path(__file__).parent


def execute(path: Path, quick: bool = False) -> nbformat.NotebookNode:
    """The notebook, with the outputs of this run; with `quick`, of a small version of its experiment (QUICK=1).

    :raises nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    before = os.environ.get("QUICK")
    os.environ["QUICK"] = "1" if quick else ""
    try:
        client = NotebookClient(
            notebook, timeout=None, record_timing=False, resources={"metadata": {"path": path.parent}}
        )
        return client.execute()
    finally:
        os.environ.pop("QUICK") if before is None else os.environ.update(QUICK=before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks to execute, such as 01_sine_transfer (default: all)")
    parser.add_argument("--quick", action="store_true", help="small versions, which leave the files as they are")
    arguments = parser.parse_args()
    paths = [FOLDER / f"{name}.ipynb" for name in arguments.names] or sorted(FOLDER.glob("*.ipynb"))
    for path in tqdm(paths, desc="notebooks"):
        notebook = execute(path, arguments.quick)
        if not arguments.quick:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
