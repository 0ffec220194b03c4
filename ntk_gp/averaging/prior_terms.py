"""Priors as densities in coordinates without constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.priors import Prior
from torch import Tensor, nn


class PriorTerm:
    """What a registered prior is on: t, of as many elements as those of u that it depends on, else `elements` is None.

    :param parameters: The trained ones of the model it is registered in.
    """

    def __init__(self, prior: Prior, owner: nn.Module, closure: Callable, parameters: Sequence[nn.Parameter]):
        self.name = f"{type(prior).__name__} of {type(owner).__name__}"
        self._prior, self._owner, self._closure = prior, owner, closure
        self._parameters = parameters
        self.elements: Tensor | None = None
        self.is_elementwise = False
        """Whether each element of t depends on one of u, and each of these has one."""
        self._find_elements()

    def _find_elements(self) -> None:
        slopes = self.slopes()
        depends = (slopes != 0).any(0)
        self.elements = depends.nonzero().squeeze(-1).cpu()
        if len(self.elements) == 0:  # of what is not trained: a constant
            return
        if len(self.elements) != slopes.shape[0]:
            self.elements = None
            return
        self.is_elementwise = bool(((slopes != 0).sum(0) <= 1).all() and ((slopes != 0).sum(1) == 1).all())

    @property
    def is_constant(self) -> bool:
        """Whether it is on what is not trained: of a number that is given, it is no density."""
        return self.elements is not None and len(self.elements) == 0

    def log_density(self) -> Tensor:
        """That of t, as the model has it."""
        return self._prior.log_prob(self._closure(self._owner)).sum()

    def t(self) -> Tensor:
        """What the prior is on, flat, as the model has it."""
        return self._closure(self._owner).flatten()

    def slopes(self, create_graph: bool = False) -> Tensor:
        """dt/draw, (elements of t, d)."""
        with torch.enable_grad():
            return torch.stack([self.gradient(each, create_graph) for each in self.t()])

    def gradient(self, value: Tensor, create_graph: bool = False) -> Tensor:
        """dvalue/draw, (d,)."""
        gradients: tuple[Any, ...] = (None,) * len(self._parameters)
        if value.requires_grad:
            gradients = torch.autograd.grad(
                value, self._parameters, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
        pieces = [
            torch.zeros_like(p) if g is None else g.expand_as(p)
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        return torch.cat([piece.flatten() for piece in pieces]).double()


def by_turns(priors: Sequence[PriorTerm]) -> list[list[PriorTerm]]:
    """Those with a slope; together what is elementwise and on different elements: one backward pass has the slopes of
    all of them."""
    turns: list[list[PriorTerm]] = []
    for prior in priors:
        if prior.elements is None or prior.is_constant:
            continue
        joins = next((turn for turn in turns if all(_are_apart(prior, other) for other in turn)), None)
        if joins is None:
            turns.append([prior])
        else:
            joins.append(prior)
    return turns


def _are_apart(one: PriorTerm, other: PriorTerm) -> bool:
    elements = [*one.elements.tolist(), *other.elements.tolist()]  # type: ignore[union-attr]
    return one.is_elementwise and other.is_elementwise and len(set(elements)) == len(elements)


def log_slope(priors: Sequence[PriorTerm], create_graph: bool) -> Tensor:
    """Σ log |det dt/draw| of priors that are apart."""
    first = priors[0]
    elements = torch.cat([prior.elements for prior in priors])  # type: ignore[misc]
    if first.is_elementwise:
        total = torch.cat([prior.t() for prior in priors]).sum()
        slopes = first.gradient(total, create_graph)
        return slopes[elements.to(slopes.device)].abs().log().sum()
    slopes = first.slopes(create_graph)
    return torch.linalg.slogdet(slopes[:, elements.to(slopes.device)])[1]
