"""The suite on the oldest and the newest versions that pyproject.toml allows: `make test-versions`.

For each cell a virtual environment is made in build/versions, kept for the next time, and the suite runs there. The
oldest versions are the lower bounds in pyproject.toml, on the oldest Python that it allows; the newest are whatever pip
finds for the newest Python here that has a torch. A cell whose Python is not here, or whose packages cannot be
installed, is skipped, and said so at the end. On Linux, torch brings its CUDA libraries: several GB for each cell.

    python -m tests.versions                       every cell
    python -m tests.versions oldest                one
    python -m tests.versions oldest -- -k solvers  with arguments for pytest
    python -m tests.versions oldest --set torch==2.7.0   to look for a bound
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "versions"
CELLS = ("oldest", "newest")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Notebooks and pages are built with the versions that CI pins; what they show depends on those.
LEFT_OUT = (
    "tests/test_notebooks.py",
    "tests/test_demo.py",
    "tests/test_docs.py",
    "tests/test_readme.py",
    "tests/test_benchmarks.py",
)
PLAIN = r"^([A-Za-z0-9_.-]+)>=([0-9.]+)$"


class Skipped(Exception):
    """A cell that cannot be had here."""


def requirements() -> list[str]:
    """What the package and its suite need, as pyproject.toml says: of the extras only progress bars; not what lints."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = {
        name: re.findall(r'"([^"]+)"', body) for name, body in re.findall(r"^(\w+) = \[(.*?)\]$", text, re.M | re.S)
    }
    needed = [*lists["dependencies"], *(line for line in lists["demo"] if line.startswith("tqdm")), *lists["test"]]
    return [line for line in needed if not line.startswith(("ntk_gp", "ruff", "mypy"))]


def oldest(requirement: str) -> str:
    """The lower bound as the only version."""
    return re.sub(PLAIN, r"\1==\2", requirement)


def python_of(cell: str) -> list[str]:
    """Interpreters to try, the one that the cell is about first."""
    wanted = PYTHONS[:1] if cell == "oldest" else PYTHONS[::-1]
    found = [path for version in wanted for path in interpreters(version)]
    if not found:
        raise Skipped(f"there is no Python {' or '.join(wanted)} here")
    return found


def interpreters(version: str) -> list[str]:
    """Those on the path, and pyenv's."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(root.glob(f"{version}.*/bin/python")))]
    return [path for path in candidates if path and works(path, version)][:1]


def works(path: str, version: str) -> bool:
    """Whether it is that Python: pyenv's shims exist for versions that are not chosen, too."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    result = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout.strip() == version


def environment(cell: str, pinned: list[str]) -> Path:
    """The Python of the cell's virtual environment, made if it is not there with the same requirements."""
    wanted = [oldest(line) if cell == "oldest" else line for line in requirements()]
    names = {re.split("[=<>]", line)[0] for line in pinned}
    wanted = [line for line in wanted if re.split("[=<>]", line)[0] not in names] + pinned
    reasons = []
    for interpreter in python_of(cell):
        folder = BUILD / cell
        python, stamp = folder / "bin" / "python", folder / "requirements.txt"
        made_of = "\n".join([interpreter, *wanted])
        if stamp.exists() and stamp.read_text(encoding="utf-8") == made_of:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "--prefer-binary", *wanted]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            stamp.write_text(made_of, encoding="utf-8")
            return python
        reasons.append(f"{interpreter}: {last_error(result.stderr)}")
    raise Skipped("packages cannot be installed: " + "; ".join(reasons))


def last_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("ERROR")]
    return lines[-1] if lines else output.strip()[-300:]


def versions(python: Path) -> str:
    code = (
        "import sys; from importlib.metadata import version as v; print('Python %d.%d.%d' % sys.version_info[:3], "
        "*(f'{name} {v(name)}' for name in ('torch', 'gpytorch', 'linear_operator', 'numpy', 'botorch')), sep=', ')"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def run(cell: str, pinned: list[str], arguments: list[str]) -> str:
    """Runs the suite in one cell; "passed", "FAILED" or "skipped", with what it ran on."""
    try:
        python = environment(cell, pinned)
    except Skipped as reason:
        return f"skipped: {reason}"
    what = versions(python)
    print(f"{cell}: {what}", flush=True)
    chosen = arguments or ["tests", *(f"--ignore={path}" for path in LEFT_OUT)]
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-p", "no:cacheprovider", *chosen]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environ, check=False)
    return f"{'passed' if result.returncode == 0 else 'FAILED'} on {what}"


def main() -> int:
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"one of {', '.join(CELLS)} (default: all)")
    parser.add_argument("--set", action="append", default=[], help="another version of a package, e.g. torch==2.7.0")
    options = parser.parse_args(sys.argv[1:place])
    if unknown := [cell for cell in options.cells if cell not in CELLS]:
        parser.error(f"there is no cell {', '.join(unknown)}; there are {', '.join(CELLS)}")
    results = {cell: run(cell, options.set, sys.argv[place + 1 :]) for cell in options.cells or CELLS}
    print()
    for cell, result in results.items():
        print(f"{cell}: {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
