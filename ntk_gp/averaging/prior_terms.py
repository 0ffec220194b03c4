"""Priors as densities in coordinates without constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gpytorch.priors import Prior
from torch import Tensor, nn

from .coordinates import grouped


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
        self.reached: set[int] = set()
        """The numbers of the parameters that it is computed from."""
        self._find_elements()

    def _find_elements(self) -> None:
        with torch.enable_grad():
            rows = [self._gradients(each, create_graph=False) for each in self.t()]
        self.reached = {i for row in rows for i, gradient in enumerate(row) if gradient is not None}
        slopes = torch.stack([self._flat(row) for row in rows])
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
        return self._flat(self._gradients(value, create_graph))

    def _flat(self, gradients: Sequence[Tensor | None]) -> Tensor:
        pieces = [
            torch.zeros_like(p) if g is None else g.expand_as(p)
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        return torch.cat([piece.flatten() for piece in pieces]).double()

    def _gradients(self, value: Tensor, create_graph: bool) -> tuple[Tensor | None, ...]:
        """By each parameter; None for those that it is not computed from."""
        if not value.requires_grad:
            return (None,) * len(self._parameters)
        return torch.autograd.grad(
            value, self._parameters, create_graph=create_graph, retain_graph=True, allow_unused=True
        )


def in_one_pass(priors: Sequence[PriorTerm]) -> list[list[PriorTerm]]:
    """Groups of those that have a slope: a backward pass through the sum of what a group is on has all slopes of it,
    since each is elementwise, and no two are computed from one parameter."""
    have_slopes = (prior for prior in priors if prior.elements is not None and not prior.is_constant)
    return grouped(have_slopes, lambda prior, group: all(_are_apart(prior, other) for other in group))


def _are_apart(one: PriorTerm, other: PriorTerm) -> bool:
    return one.is_elementwise and other.is_elementwise and one.reached.isdisjoint(other.reached)


def log_slope(priors: Sequence[PriorTerm], create_graph: bool) -> Tensor:
    """Σ log |det dt/draw| of a group of priors."""
    first = priors[0]
    elements = torch.cat([prior.elements for prior in priors])  # type: ignore[misc]
    if first.is_elementwise:
        total = torch.cat([prior.t() for prior in priors]).sum()
        slopes = first.gradient(total, create_graph)
        return slopes[elements.to(slopes.device)].abs().log().sum()
    slopes = first.slopes(create_graph)
    return torch.linalg.slogdet(slopes[:, elements.to(slopes.device)])[1]
