"""What all columns that run on PyTorch share: the network and the inputs of a case."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import networks


class TorchColumn:
    """Loads a case.

    :param device: Where it is computed.
    """

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)

    def prepare(self, case: dict, arrays: dict[str, np.ndarray]) -> None:
        """Builds `self.network` with the case's weights, and `self.x`."""
        self.x = self.tensor(arrays["x"])
        self.network = networks.build(case["network"])
        prefix = "network."
        state = {name.removeprefix(prefix): torch.tensor(a) for name, a in arrays.items() if name.startswith(prefix)}
        self.network.load_state_dict(state)
        self.network.to(self.device, self.x.dtype)

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.device)

    def synchronize(self, result: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def to_numpy(self, result: Any) -> list[np.ndarray]:
        results = result if isinstance(result, tuple) else (result,)
        return [tensor.detach().cpu().numpy() for tensor in results]
