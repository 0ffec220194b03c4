"""K + D, kernel matrix and noise: where the way to solve is chosen."""

from __future__ import annotations

import torch
from linear_operator.operators import AddedDiagLinearOperator
from torch import Tensor


class NTKAddedDiagLinearOperator(AddedDiagLinearOperator):
    r""":math:`\boldsymbol K + \boldsymbol D`: a neural tangent kernel matrix and a diagonal of noise.

    :param linear_ops: The :class:`NTKLinearOperator` and the :class:`~linear_operator.operators.DiagLinearOperator`.
    """

    def solve(self, right_tensor: Tensor, left_tensor: Tensor | None = None) -> Tensor:
        _check_right_hand_side(right_tensor)
        return super().solve(right_tensor, left_tensor)

    def inv_quad_logdet(
        self, inv_quad_rhs: Tensor | None = None, logdet: bool | None = False, reduce_inv_quad: bool | None = True
    ) -> tuple[Tensor | None, Tensor | None]:
        if inv_quad_rhs is not None:
            _check_right_hand_side(inv_quad_rhs)
        return super().inv_quad_logdet(inv_quad_rhs, logdet, reduce_inv_quad)


def _check_right_hand_side(rhs: Tensor) -> None:
    if rhs.numel() == 0:
        raise ValueError("There is no training data: expected at least one input with its target.")
    if not torch.isfinite(rhs).all():
        count = int((~torch.isfinite(rhs)).sum())
        raise ValueError(
            f"{count} of {rhs.numel()} training targets (less the prior mean) are NaN or infinite. Remove them, or set "
            "gpytorch.settings.observation_nan_policy('mask')."
        )
