"""laplace-torch: the fine-tuned network, with a Laplace approximation around it; in the peers' environment `torch`."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .fine_tuning import cross_validated, fine_tuned
from .predictions import Gaussian


def predict(
    network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor, subset_of_weights: str, hessian_structure: str
) -> Gaussian:
    """The prior is centred on the trained weights, and its precision maximises the marginal likelihood.

    The noise is what cross-validation says: the network has been fitted to the labels, and a marginal likelihood at
    weights that leave nothing of them would have none at all.
    """
    from laplace import Laplace  # only where the peers' environment is the running one
    from laplace.curvature import CurvlinopsGGN

    last = subset_of_weights == "last_layer"
    centre = nn.utils.parameters_to_vector((network[-1] if last else network).parameters()).detach()
    noise = cross_validated(network, x, y, last)
    model = Laplace(
        fine_tuned(network, x, y, last),
        "regression",
        subset_of_weights,
        hessian_structure,
        sigma_noise=float(noise.sqrt()),
        prior_mean=centre,
        backend=CurvlinopsGGN,
    )
    model.fit(DataLoader(TensorDataset(x, y[:, None]), batch_size=len(y)))
    model.optimize_prior_precision(method="marglik")
    with torch.no_grad():
        mean, variance = model(x_test)
        return Gaussian(mean.flatten(), variance.flatten() + noise)


last_layer = partial(predict, subset_of_weights="last_layer", hessian_structure="full")
all_layers = partial(predict, subset_of_weights="all", hessian_structure="kron")
