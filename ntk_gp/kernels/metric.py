"""Kernels with a metric of their own: what their lengthscale is measured in."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import NetworkKernel

# Points whose distances are looked at for a median.
_POINTS = 1000


class MetricKernel(NetworkKernel):
    """A kernel of distances that a network defines."""

    @property
    def is_stationary(self) -> bool:
        """Not in the inputs, which is what GPyTorch asks for."""
        return False

    def median_distance(self, x: Tensor) -> float:
        """The median distance of two of these inputs, in the metric of this kernel, where its lengthscale belongs.

        Among the pairs that are apart at all, of up to 1000 points, the same ones each time.

        :param x: (*batch, n, d).
        :raises ValueError: If no two of them are apart.
        """
        x = self._active(x)
        points = x.reshape(-1, x.shape[-1])
        if len(points) > _POINTS:
            generator = torch.Generator(device="cpu").manual_seed(0)
            chosen = torch.randperm(len(points), generator=generator, device="cpu")[:_POINTS]
            points = points[chosen.sort().values.to(points.device)]
        with torch.no_grad():
            distances = self._distances(points)
        distances = distances[distances > 0]
        if distances.numel() == 0:
            raise ValueError(
                f"There is no median distance: {type(self).__name__} has all of the {len(points)} inputs in one place. "
                "Give it two inputs at least that the network tells apart."
            )
        return float(distances.median())

    @abstractmethod
    def _distances(self, x: Tensor) -> Tensor:
        """The distances of all pairs of x (n, d), in any shape."""
