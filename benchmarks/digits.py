"""The methods of the notebook 08_classification over five seeds, which the notebook shows.

`python -m benchmarks.digits`, where the extra `notebooks` is installed, runs all but laplace-torch;
`.venv-peers-torch/bin/python -m benchmarks.digits --laplace-torch` runs that, once `python -m benchmarks.peers setup
torch` has made its environment.
Either replaces its own rows of `results/digits.json`, one after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))

import digits


def predict(
    network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor, subset_of_weights: str, hessian_structure: str
) -> Tensor:
    """The fine-tuned network, with the Laplace approximation around it and the prior precision of the highest evidence;
    the probit approximation."""
    from laplace import Laplace  # only where the peers' environment is the running one
    from laplace.curvature import CurvlinopsGGN

    tuned = digits.fine_tuned(network, x, labels, subset_of_weights == "last_layer")
    model = Laplace(tuned, "classification", subset_of_weights, hessian_structure, backend=CurvlinopsGGN)
    model.fit(DataLoader(TensorDataset(x, labels), batch_size=len(labels)))
    model.optimize_prior_precision(method="marglik")
    # In pieces: at 600 points at once it needs more than 24 GB.
    return torch.cat([model(some, link_approx="probit") for some in x_test.split(20)])


LAPLACE_TORCH = {
    "laplace-torch, last layer": partial(predict, subset_of_weights="last_layer", hessian_structure="kron"),
    "laplace-torch, all layers": partial(predict, subset_of_weights="all", hessian_structure="kron"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laplace-torch", action="store_true", help="this method alone, in its environment")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50, 200])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of its advice
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    methods = LAPLACE_TORCH if arguments.laplace_torch else digits.METHODS
    for seed in arguments.seeds:
        for run in digits.compare(digits.make_task(seed), seed, arguments.labels, methods):
            print(run.seed, run.n, run.method, *run.scores, f"{run.seconds:.1f} s", flush=True)
            store(run)


def store(run: digits.Run) -> None:
    """In place of the row of the same seed, n and method, if there is one."""
    key = {"seed": run.seed, "n": run.n, "method": run.method}
    rows = [row for row in digits.stored() if {name: row[name] for name in key} != key]
    rows.append(key | run.scores._asdict() | {"seconds": run.seconds})
    rows.sort(key=lambda row: (row["seed"], row["n"], row["method"]))
    digits.RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
