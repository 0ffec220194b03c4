"""The packages that are compared with: one virtual environment each, built from `peers/*.txt`.

`python -m benchmarks.peers setup` makes what is missing. A peer without its environment leaves its cells blank.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "peers"
ROOT = Path(__file__).resolve().parent.parent
SETUP_HINT = "Set it up with `python -m benchmarks.peers setup`."
OURSELVES = "ntk_gp"


def names() -> list[str]:
    """The environments there can be, by the name of their requirements file."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def environment(name: str) -> Path:
    return ROOT / f".venv-peers-{name}"


def interpreter(name: str) -> Path | None:
    """The Python of an environment, or None where it was not set up; our own for `OURSELVES`."""
    if name == OURSELVES:
        return Path(sys.executable)
    python = environment(name) / "bin" / "python"
    return python if python.exists() and _is_complete(name) else None


def setup(name: str) -> None:
    """Builds one environment, unless it is there with these very requirements."""
    if interpreter(name) is not None:
        print(f"{name}: ready in {environment(name).name}")
        return
    print(f"{name}: building {environment(name).name}")
    subprocess.run([_base_python(), "-m", "venv", "--clear", environment(name)], check=True)
    # The files list every package that is needed, and leave out heavy ones that are required but never imported.
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "-r", REQUIREMENTS / f"{name}.txt"]
    subprocess.run([environment(name) / "bin" / "python", *command], check=True)
    _stamp(name).write_text(_requirements(name))


def _base_python() -> str:
    """A Python that the oldest pinned wheel (jaxlib 0.4.25: up to 3.12) exists for."""
    if sys.version_info < (3, 13):
        return sys.executable
    found = next(filter(None, map(shutil.which, ("python3.12", "python3.11", "python3.10"))), None)
    if found is None:
        raise RuntimeError("The peers need Python 3.10 to 3.12, and none was found on the path.")
    return found


def _stamp(name: str) -> Path:
    return environment(name) / "requirements.txt"


def _requirements(name: str) -> str:
    return (REQUIREMENTS / f"{name}.txt").read_text()


def _is_complete(name: str) -> bool:
    return _stamp(name).exists() and _stamp(name).read_text() == _requirements(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["setup"])
    parser.add_argument("names", nargs="*", help=f"which (all by default): {', '.join(names())}")
    for name in parser.parse_args().names or names():
        setup(name)


if __name__ == "__main__":
    main()
