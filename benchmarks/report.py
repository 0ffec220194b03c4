"""What is written: JSON with every measurement, Markdown tables, log-log figures."""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path(__file__).parent.parent / "output" / "benchmarks"


# What tells rows apart.
IDENTITY = ("threads", "part", "data", "network", "P", "n", "dtype", "operation", "way")


def write(folder: Path, name: str, results: dict, markdown: str) -> None:
    """Writes `NAME.json`, with the machine it was measured on, and `NAME.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine(), **results}, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown.rstrip() + "\n")


def earlier(arguments: argparse.Namespace, name: str) -> dict:
    """What an earlier run wrote there, if it is to be kept where this one measures nothing new."""
    file = arguments.output / f"{name}.json"
    return json.loads(file.read_text()) if arguments.keep and file.exists() else {"rows": []}


def merged(rows: list[dict], new: list[dict]) -> list[dict]:
    """Rows with these in place of those that measured the same; the cells of a row always come from one run."""
    replacements = {_identity(row): row for row in new}
    known = {_identity(row) for row in rows}
    kept = [replacements.get(_identity(row), row) for row in rows]
    return kept + [row for row in new if _identity(row) not in known]


def _identity(row: dict) -> tuple:
    return tuple(row.get(name) for name in IDENTITY)


def machine() -> dict[str, str]:
    """The processor, its cores, and the versions that decide the speed."""
    import gpytorch
    import torch

    return {
        "processor": _processor(),
        "cores": str(len(_cores())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpytorch": gpytorch.__version__,
    }


def machine_line() -> str:
    details = machine()
    return (
        f"{details['processor']}, {details['cores']} cores; Python {details['python']}, torch {details['torch']}, "
        f"gpytorch {details['gpytorch']}."
    )


def gemm_rate(threads: int, size: int = 4096) -> float:
    """Flops per second of a float32 matrix product on this many cores: the best of several, in a process of its own, by
    the quicker of PyTorch's two libraries."""
    script = (
        "import torch, time\n"
        "from ntk_gp.replacements.onednn import matmul\n"
        f"torch.set_num_threads({threads}); a, b = torch.randn(2, {size}, {size})\n"
        "for multiply in 8 * [torch.matmul, matmul]:\n"
        "    start = time.perf_counter(); multiply(a, b); print(time.perf_counter() - start)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return 2.0 * size**3 / min(map(float, printed.split()))


def write_rate(threads: int, size: int = 1 << 28) -> float:
    """Bytes per second at which memory that was never written to is filled on this many cores: the best of several, in
    a process of its own."""
    script = (
        "import torch, time\n"
        "from ntk_gp.jacobian.memory import empty\n"
        f"torch.set_num_threads({threads})\n"
        "for _ in range(5):\n"
        "    start = time.perf_counter()\n"
        f"    empty(({size // 4},), torch.zeros(1)).fill_(1); print(time.perf_counter() - start)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return size / min(map(float, printed.split()))


def median(row: dict, column: str) -> float | None:
    """The median seconds of one column in a row."""
    return next((cell["median"] for cell in row["cells"] if cell["column"] == column), None)


def line(row: dict, ours: str) -> str:
    """A row on one line, as progress."""
    cells = "  ".join(f"{cell['column']} {cell_text(cell, median(row, ours)) or '–'}" for cell in row["cells"])
    return f"{row['network']} n={row['n']:,} {row['operation']}: {cells}"


def titles(rows: Sequence[dict]) -> list[str]:
    """The columns that any of the rows has."""
    return list(dict.fromkeys(cell["column"] for row in rows for cell in row["cells"]))


def table(rows: Sequence[dict], ours: str) -> str:
    """Rows of cells as Markdown: the median and, in brackets, how many times ours that is.

    The last column is the largest difference from the float64 reference that any cell of the row has.
    """
    if not rows:
        return ""
    lines, notes = [], {}
    for row in rows:
        texts = {cell["column"]: cell_text(cell, median(row, ours)) for cell in row["cells"]}
        cells = [texts.get(title, "") for title in titles(rows)]
        worst = max(((max(cell["errors"]), cell["column"]) for cell in row["cells"] if cell["errors"]), default=None)
        difference = f"{worst[0]:.0e} ({worst[1]})" if worst else ""
        lines.append([row["network"], f"{row['n']:,}", f"{row['P']:,}", row["operation"], *cells, difference])
        notes.update({f"{cell['column']}: {cell['note']}": None for cell in row["cells"] if _is_worth_a_note(cell)})
    header = ["network", "n", "P", "", *titles(rows), "max rel. difference"]
    footnotes = "\n".join(f"- {note}" for note in notes)
    return markdown_table(header, lines) + (f"\n\n{footnotes}" if notes else "")


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, or nothing where it has no lines."""
    if not lines:
        return ""
    separator = "|".join(["---"] * len(header))
    return "\n".join([f"| {' | '.join(header)} |", f"|{separator}|", *(f"| {' | '.join(cells)} |" for cells in lines)])


def duration(seconds: float | None) -> str:
    """Three digits, in the unit that suits."""
    if seconds is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1.0 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def size(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:.2f} GiB"


def cell_text(cell: dict, ours: float | None) -> str:
    """The median, in brackets how many times `ours` that is, and whether it was timed only once."""
    if cell["median"] is None:
        return "failed" if _is_worth_a_note(cell) else ""
    single = " once" if len(cell["seconds"]) == 1 else ""
    ratio = f" ({_times(cell['median'] / ours)})" if ours and cell["median"] != ours else ""
    return f"{duration(cell['median'])}{ratio}{single}"


def errors(cell: dict, count: int) -> list[str]:
    """A cell's errors, one text for each of `count` results."""
    texts = [f"{error:.1e}" if error is not None else "" for error in cell["errors"]]
    return texts or [""] * count


def remarks(cell: dict) -> str:
    """Why a cell is blank, and what was warned of."""
    texts = [textwrap.shorten(text, 120, placeholder="…") for text in (cell["note"], *cell["warnings"]) if text]
    return "; ".join(texts).replace("|", "/")


def exponent(sizes: Sequence[float], seconds: Sequence[float | None]) -> float | None:
    """The least-squares slope of log(seconds) against log(size), from two points on."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, seconds, strict=True) if y]
    if len({x for x, _ in points}) < 2:
        return None
    return float(np.polyfit(*np.array(points).T, 1)[0])


def figure(series: dict[str, tuple[str, Sequence[dict]]], titles: Sequence[str], ylabel: str, file: Path) -> None:
    """One log-log panel per entry: seconds of every column against a quantity of the rows.

    :param series: The label of each x axis, with the rows' key for it and the rows.
    """
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(1, len(series), figsize=(5.5 * len(series), 4.2), sharey=True, squeeze=False)
    for panel, (label, (key, rows)) in zip(panels[0], series.items(), strict=True):
        for column in titles:
            points = sorted((row[key], median(row, column)) for row in rows if median(row, column))
            if points:
                panel.loglog(*zip(*points, strict=True), marker="o", label=column)
        panel.set_xlabel(label)
        panel.grid(which="both", alpha=0.25)
    panels[0][0].set_ylabel(ylabel)
    panels[0][0].legend(frameon=False)
    canvas.tight_layout()
    canvas.savefig(file, dpi=150)
    pyplot.close(canvas)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def _is_worth_a_note(cell: dict) -> bool:
    """Operations that a package does not have are blank without comment."""
    return bool(cell["note"]) and not cell["note"].startswith(("no ", "the same "))


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [text.split(":")[1].strip() for text in path.read_text().splitlines() if text.startswith("model name")]
    return names[0] if names else platform.processor()


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)
