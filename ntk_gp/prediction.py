"""The prediction strategy: what is computed once from the training data and serves every prediction."""

from __future__ import annotations

import torch
from gpytorch import settings as gpytorch_settings
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from torch import Tensor


class NTKPredictionStrategy(DefaultPredictionStrategy):
    """Exact prediction with an NTK; checks what it is given first.

    :param train_inputs: The training inputs, one tensor in a list.
    :param train_prior_dist: The prior at them.
    :param train_labels: The training targets.
    :param likelihood: The likelihood.
    """

    def __init__(self, train_inputs, train_prior_dist, train_labels, likelihood, **kwargs):
        _check_targets(train_inputs[0], train_labels)
        super().__init__(train_inputs, train_prior_dist, train_labels, likelihood, **kwargs)


def _check_targets(inputs: Tensor, targets: Tensor) -> None:
    if inputs.shape[-2] == 0:
        raise ValueError(
            f"The training set is empty (inputs of shape {tuple(inputs.shape)}). Give at least one point, or predict in "
            "gpytorch.settings.prior_mode()."
        )
    if targets.dtype != inputs.dtype or targets.device != inputs.device:
        raise ValueError(
            f"The training targets are {targets.dtype} on {targets.device}, the inputs {inputs.dtype} on {inputs.device}. "
            "Convert one of them with .to()."
        )
    if gpytorch_settings.observation_nan_policy.value() == "ignore" and not torch.isfinite(targets).all():
        bad = (~torch.isfinite(targets)).nonzero()[:3].tolist()
        raise ValueError(
            f"Training targets of shape {tuple(targets.shape)} have NaN or infinite values, first at {bad}. Remove them, or set "
            "gpytorch.settings.observation_nan_policy('mask')."
        )
