r"""What the posterior without each label says of the latent function at that label's own point.

Laplace's approximation has the term :math:`\log N` of label i as a quadratic function of its own latent values
:math:`f_i`, of curvature :math:`H_i` and with the gradient :math:`a_i` at the mode. Divided out of the posterior's
marginal :math:`N(\hat f_i, V_i)` it leaves :math:`N(\hat f_i - V_{-i} a_i, V_{-i})`, with
:math:`V_{-i} = (V_i^{-1} - H_i)^{-1}`: exact for the approximation, where no other label's term is expanded anew
(Rasmussen and Williams, 2006, section 3.6.2, has such cavities).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .approximation import LaplaceApproximation


def without_own_labels(approximation: LaplaceApproximation) -> tuple[Tensor, Tensor]:
    """Mean, (n, C), and covariance, (n, C, C), at each training point, without its own label; float64.

    Costs the posterior's covariance at each point by itself, and C³ numbers for each beside.
    """
    f, density = approximation.latent_mean, approximation.density
    covariance, root = approximation.curvature.covariance_of_points(), density.curvature_root(f)
    # V₋ = V + V R (I − Rᵀ V R)⁻¹ Rᵀ V, where no V is inverted: I − Rᵀ V R is positive definite, V being less than H⁻¹.
    half = covariance @ root
    left = torch.eye(root.shape[-1], dtype=f.dtype, device=f.device) - root.mT @ half
    covariance = covariance + half @ torch.linalg.solve(left, half.mT)
    shift = covariance @ density.gradient(f).unsqueeze(-1)
    return f - shift.squeeze(-1), covariance
