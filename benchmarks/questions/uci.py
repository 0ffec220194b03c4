"""How good and how costly is the adaptation on real data, beside fine-tuning and a sparse Gaussian process?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import networks, problems, report
from ..data import VARIABLE, folder_with
from ..harness import Column, Operation, Timing, measure

ADAPTATION = "benchmarks.columns.adaptation"
WAYS = {
    Column("network alone", "ntk_gp", ADAPTATION, "NetworkColumn"): {},
    Column("fine-tuning", "ntk_gp", ADAPTATION, "FineTuningColumn"): {"steps": 2000},
    Column("ntk_gp", "ntk_gp", ADAPTATION, "NTKColumn"): {"steps": 50},
    Column("Matérn SVGP", "ntk_gp", ADAPTATION, "SVGPColumn"): {"steps": 1000, "num_inducing": 500},
}
HIDDEN = ("40-40", "200-200")  # about 2,000 and 40,000 parameters
DATASETS = ("kin40k", "protein")
TRAINING_STEPS = 3000
FILES = ("data.csv.gz", "test_mask.csv.gz")
QUICK_ROWS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", help=f"folder or address with uci/NAME/data.csv.gz (default: ${VARIABLE} or ../shared/data)"
    )
    parser.add_argument("--datasets", nargs="+", default=DATASETS)


def run(arguments: argparse.Namespace) -> None:
    """Trains a network on half of the training rows of fold 0 and adapts it with the others, in every way."""
    folder = _data_folder(arguments.data, arguments.datasets)
    timing = Timing(max(arguments.threads), 0, arguments.slowest, arguments.limit)
    rows = report.earlier(arguments, "uci")["rows"]
    for name, hidden in tqdm(list(product(arguments.datasets, HIDDEN))):
        source, arrays, y_test = _split(*_load(folder / name), QUICK_ROWS if arguments.quick else None)
        widths = f"{arrays['x'].shape[1]}-{hidden}-1"
        network = networks.build(widths)
        steps = 50 if arguments.quick else TRAINING_STEPS
        problems.fit_network(network, *source, steps)
        arrays |= {f"network.{key}": tensor.numpy() for key, tensor in network.state_dict().items()}
        common = {"data": name, "network": widths, "P": networks.num_parameters(network), "n": len(arrays["y"])}
        for column, options in WAYS.items():
            (row,) = measure([column], {"network": widths}, arrays, [_operation(options, y_test)], timing)
            rows = report.merged(rows, [{**common, "way": column.title, **row}])
            report.write(arguments.output, "uci", {"rows": rows}, _markdown(rows))


def _operation(options: dict, y_test: np.ndarray) -> Operation:
    return Operation("adapt", "adapt", options, score=lambda results: _scores(results, y_test))


def _scores(results: Sequence[np.ndarray], y_test: np.ndarray) -> dict[str, float]:
    """Root mean squared error, and mean negative log predictive density, in standard deviations of the target."""
    mean, variance = results
    density = 0.5 * (np.log(2 * np.pi * variance) + (y_test - mean) ** 2 / variance)
    return {"RMSE": float(np.sqrt(np.mean((y_test - mean) ** 2))), "NLPD": float(np.mean(density))}


def _data_folder(place: str | None, datasets: Sequence[str]) -> Path:
    source = "Pass --data FOLDER, with the files of the GitHub repository treforevans/uci_datasets in its folder uci."
    try:
        return folder_with([f"uci/{name}/{file}" for name in datasets for file in FILES], source, place) / "uci"
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None


def _load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All rows (the last column is the target), and which are test rows of fold 0."""
    data, masks = (np.loadtxt(folder / name, delimiter=",", dtype=np.float32) for name in FILES)
    return data, masks[:, 0] > 0


def _split(
    data: np.ndarray, is_test: np.ndarray, limit: int | None
) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, np.ndarray], np.ndarray]:
    """The half to train on, the half to adapt with and the test inputs, and the test targets, all standardised."""
    train, test = data[~is_test][:limit], data[is_test][:limit]
    order = np.random.default_rng(0).permutation(len(train))
    source, target = train[order[: len(train) // 2]], train[order[len(train) // 2 :]]
    mean, scale = source.mean(0), source.std(0)
    source, target, test = ((part - mean) / scale for part in (source, target, test))
    arrays = {"x": target[:, :-1], "y": target[:, -1], "x_test": test[:, :-1]}
    return (torch.tensor(source[:, :-1]), torch.tensor(source[:, -1])), arrays, test[:, -1]


def _markdown(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cell = row["cells"][0]
        scores = [f"{cell['scores'][name]:.3f}" if cell["scores"] else "" for name in ("RMSE", "NLPD")]
        costs = [report.duration(cell["median"]), report.size(cell["peak_bytes"]), report.remarks(cell)]
        lines.append([row["data"], f"{row['n']:,}", f"{row['P']:,}", cell["column"], *scores, *costs])
    header = ["data", "n", "P", "", "RMSE", "NLPD", "time", "peak memory", ""]
    return f"# Adaptation on real data\n\n{report.machine_line()}\n\n{report.markdown_table(header, lines)}"
