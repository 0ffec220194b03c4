"""laplace-torch: the fine-tuned network, with a Laplace approximation around it; in the peers' environment `torch`."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .fine_tuning import fine_tuned
from .predictions import Gaussian

STEPS = 200  # on the prior precision and the noise, as in laplace-torch's own example of regression


def predict(
    network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor, subset_of_weights: str, hessian_structure: str
) -> Gaussian:
    """The prior is centred on the trained weights; its precision and the noise maximise the marginal likelihood.

    Both are sought within seven e-folds of where they start, as without a prior nothing else bounds them.
    """
    from laplace import Laplace  # only where the peers' environment is the running one
    from laplace.curvature import BackPackGGN

    last = subset_of_weights == "last_layer"
    weights = (network[-1] if last else network).parameters()
    centre = torch.nn.utils.parameters_to_vector(weights).detach()
    tuned = fine_tuned(network, x, y, last)
    unexplained = float((network(x).squeeze(-1) - y).square().mean().detach())
    model = Laplace(
        tuned,
        "regression",
        subset_of_weights,
        hessian_structure,
        prior_mean=centre,
        backend=BackPackGGN,
    )
    model.fit(DataLoader(TensorDataset(x, y[:, None]), batch_size=len(y)))
    start = torch.tensor([0.0, 0.5 * math.log(0.1 * unexplained)])
    logarithms = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logarithms], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        precision, noise = logarithms.exp()
        wall = 1e2 * ((logarithms - start).abs() - 7.0).clamp_min(0.0).square().sum()
        (wall - model.log_marginal_likelihood(precision[None], noise)).backward()
        optimizer.step()
    with torch.no_grad():
        precision, noise = logarithms.exp()
        model.prior_precision, model.sigma_noise = precision[None], noise
        mean, variance = model(x_test)
        return Gaussian(mean.flatten().detach(), variance.flatten().detach() + noise**2)


last_layer = partial(predict, subset_of_weights="last_layer", hessian_structure="full")
all_layers = partial(predict, subset_of_weights="all", hessian_structure="kron")
