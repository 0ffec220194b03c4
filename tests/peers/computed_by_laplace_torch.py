"""What laplace-torch computes; runs in its environment, see :mod:`tests.peers.processes`."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_default_dtype(torch.float64)
warnings.simplefilter("ignore")  # of its advice

Arrays = dict[str, np.ndarray]


def network(question: Arrays) -> nn.Sequential:
    """Linear layers with tanh between them, as many as there are weights."""
    weights = {name: torch.tensor(each) for name, each in question.items() if name.endswith((".weight", ".bias"))}
    layers: list[nn.Module] = []
    for name in sorted(weights):
        if name.endswith("weight"):
            layers += [nn.Linear(*reversed(weights[name].shape)), nn.Tanh()]
    result = nn.Sequential(*layers[:-1])
    result.load_state_dict(weights)
    return result


def posterior(question: Arrays) -> Arrays:
    """Of functions, at test inputs, around the network's weights.

    The options are Laplace's own; `noise` is the variance, and there is none in classification.
    """
    x, y, test_x = (torch.tensor(question[name]) for name in ("x", "y", "test_x"))
    is_regression, structure = "noise" in question, str(question["hessian_structure"])
    options = {"n_subset": len(x), "independent_outputs": bool(question["independent_outputs"])}
    model = Laplace(
        network(question),
        "regression" if is_regression else "classification",
        str(question["subset_of_weights"]),
        structure,
        sigma_noise=float(question["noise"]) ** 0.5 if is_regression else 1.0,
        prior_precision=float(question["prior_precision"]),
        backend=CurvlinopsGGN,
        **(options if structure == "gp" else {}),
    )
    model.fit(DataLoader(TensorDataset(x, y), batch_size=len(x)))
    if is_regression:
        mean, covariance = model(test_x, joint=True)
        answer = {"mean": mean, "covariance": covariance}
    else:
        last = str(question["subset_of_weights"]) == "last_layer"
        jacobian, _ = (model.backend.last_layer_jacobians if last else model.backend.jacobians)(test_x)
        covariance = model.functional_covariance(jacobian)
        answer = {"covariance": covariance, "probabilities": model(test_x, link_approx="probit")}
    if structure == "full":
        answer["evidence"] = model.log_marginal_likelihood()
    return {name: tensor.detach().numpy() for name, tensor in answer.items()}


if __name__ == "__main__":
    name, question_file, answer_file = sys.argv[1:]
    with np.load(question_file) as file:
        arrays = dict(file)
    np.savez(answer_file, **globals()[name](arrays))
