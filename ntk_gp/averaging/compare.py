"""Models compared by their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from gpytorch.models import ExactGP

from ..tables import Table
from .average import Averaged, AveragedPredictions, averaged


class ComparedModel(NamedTuple):
    """One row of a comparison.

    :ivar name: Of the model.
    :ivar log_evidence: log p(y | model).
    :ivar error: Its standard error.
    :ivar weight: The probability of the model, given that each was as likely before.
    :ivar effective_sample_size: How many draws of the hyperparameters it rests on.
    """

    name: str
    log_evidence: float | None
    error: float | None
    weight: float
    effective_sample_size: float


class Comparison(AveragedPredictions, Table[ComparedModel]):
    """Models by their evidence, and their predictions averaged with it; made by :func:`ntk_gp.compare`.

    A sequence of :class:`ComparedModel`, in the order given; `print` shows a table. `comparison(x)` and
    `comparison.predict(x)` are as of :class:`Averaged`, over all models.

    :ivar averages: The :class:`Averaged` of each model, by name.
    """

    def __init__(self, averages: Mapping[str, Averaged]):
        self.averages = dict(averages)
        every = list(self.averages.values())
        evidence = torch.tensor([each.log_evidence for each in every], dtype=torch.float64)
        weights = evidence.softmax(0)
        self.rows = [
            ComparedModel(name, each.log_evidence, each.log_evidence_error, weight, each.effective_sample_size)
            for (name, each), weight in zip(self.averages.items(), weights.tolist(), strict=True)
        ]
        self._models = [model for each in every for model in each._models]
        self.weights = torch.cat([row.weight * each.weights for row, each in zip(self.rows, every, strict=True)])

    def _cells(self) -> Sequence[tuple[str, ...]]:
        return [("model", "log evidence", "weight", "effective draws")] + [
            (
                row.name,
                f"{row.log_evidence:.2f} ± {row.error:.2f}",
                f"{row.weight:.3f}",
                f"{row.effective_sample_size:.1f}",
            )
            for row in self.rows
        ]


def compare(
    models: Mapping[str, ExactGP | Averaged] | Sequence[ExactGP | Averaged],
    draws: int = 32,
    seed: int | None = None,
) -> Comparison:
    """Compares models of the same data by their evidence, the hyperparameters integrated out.

    Evidence depends on the priors: the data must be as likely under each model's as their user thinks. So scale all of
    them alike, for instance by :func:`ntk_gp.scale_to_data`.

    :param models: By name, or in a list. What :func:`averaged` has made is taken as it is.
    :param draws: For each model.
    :param seed: Of the draws.
    :return: A table, and the predictions averaged over all models by their probability, if each was as likely before.
    :raises ValueError: If there are none, they have different targets, or one has a parameter without a proper prior.
    """
    named = dict(models) if isinstance(models, Mapping) else {f"{i}": model for i, model in enumerate(models)}
    if not named:
        raise ValueError("Expected models to compare, got none.")
    averages = {
        name: model if isinstance(model, Averaged) else averaged(model, draws=draws, seed=seed)
        for name, model in named.items()
    }
    first = next(iter(averages.values()))
    for name, each in averages.items():
        if each.log_evidence is None:
            raise ValueError(
                f"The model {name!r} has no evidence: {each.no_evidence_because}. Give each parameter one proper "
                "prior, as ntk_gp.priors.scale_to_data does, or set requires_grad_(False) on it."
            )
        if each._targets.shape != first._targets.shape or not torch.equal(each._targets, first._targets):
            raise ValueError(
                f"The model {name!r} has other training targets: evidence compares models of the same data."
            )
    return Comparison(averages)
