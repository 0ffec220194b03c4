"""laplace-torch's `FunctionalLaplace`: the same posterior variance; its mean stays the network's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from laplace import FunctionalLaplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .torch_base import TorchColumn

# Each with the quicker batch size of 250 and 1,000: every pair of batches takes a new Jacobian.
BACKENDS = {"backpack": (BackPackGGN, 1000), "curvlinops": (CurvlinopsGGN, 250)}


class LaplaceColumn(TorchColumn):
    """:param backend: "backpack" or "curvlinops"."""

    def __init__(self, backend: str):
        super().__init__()
        self.backend, self.batch_size = BACKENDS[backend]

    def posterior(self, arrays: dict[str, np.ndarray], noise: float) -> Callable:
        """Fit, then mean and variance at the test inputs. The mean is NaN: it would be the unadapted network's."""
        x_test = self.tensor(arrays["x_test"])
        data = TensorDataset(self.x, self.tensor(arrays["y"])[:, None])

        def call() -> tuple[Tensor, Tensor]:
            model = FunctionalLaplace(
                copy.deepcopy(self.network),
                "regression",
                n_subset=len(self.x),
                sigma_noise=noise**0.5,
                prior_precision=1.0,
                backend=self.backend,
            )
            model.fit(DataLoader(data, batch_size=self.batch_size))
            mean, variance = model(x_test)
            return torch.full_like(mean, torch.nan).flatten(), variance.flatten()

        return call
