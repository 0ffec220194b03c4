"""Terms for computed tensors to terms for the parameters that they were computed from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..terms import (
    ConvolutionTerm,
    DenseDerivative,
    ElementwiseTerm,
    FeatureTerm,
    LocalDerivative,
    MatrixTerm,
    PulledTerm,
    SharedTerm,
    Term,
)
from .computed import Computed
from .registry import Pull, ScaleTerm, UnsupportedMap, find_map

# Parts that a use is taken apart into: a tensor that many ways lead to would have one for each.
_MOST_PARTS = 16
# What is one matrix of rank one but for rounding, in units of it.
_ROUNDING = 16.0


def pull_back(terms: Iterable[Term], computed: Mapping[str, Computed], squared: bool = False) -> list[Term]:
    """Terms, some of them for computed tensors, as terms for parameters alone.

    :param squared: The terms are of squares, and so are those that are returned.
    """
    pulling, done = _Pulling(computed, squared), []
    for term in terms:
        pending, found = [term], 0
        while pending:
            part = pending.pop(0)
            if not any(view.name in computed for view in part.views):
                done.append(part)
                found += 1
            elif found + len(pending) < _MOST_PARTS:
                pending = pulling.parts(part) + pending
            else:
                pending = pulling.whole(part) + pending
    return done


@dataclass
class _Pulling:
    computed: Mapping[str, Computed]
    squared: bool

    def parts(self, term: Term) -> list[Term]:
        """What a term is, one call further back."""
        if isinstance(term, MatrixTerm):
            return self._matrix(term)
        if isinstance(term, FeatureTerm) and len(term.views) == 1:
            return self._features(term)
        return self.whole(term)

    def whole(self, term: Term) -> list[Term]:
        """The same for all calls that lead to the computed tensor, by autograd."""
        if isinstance(term, MatrixTerm) and term.bias is not None:
            return [term.with_bias(None), term.bias_term()]
        (name,) = {view.name for view in term.views}
        node = self.computed[name]
        return self._by_graph(term, node, list(node.leaves))

    def _matrix(self, term: MatrixTerm) -> list[Term]:
        bias, weight = term.bias, term.weight
        terms: list[Term] = []
        if weight.name not in self.computed:  # the bias alone is computed
            assert bias is not None
            return [term.with_bias(None), term.bias_term()]
        alone = term.with_bias(None)
        terms = self._matrix_alone(alone, self.computed[weight.name])
        if bias is None:
            return terms
        for i, each in enumerate(terms):
            if bias.name not in self.computed and isinstance(each, MatrixTerm) and _has_gradients_of(each, alone):
                return [*terms[:i], each.with_bias(bias), *terms[i + 1 :]]
        return [*terms, term.bias_term()]

    def _matrix_alone(self, term: MatrixTerm, node: Computed) -> list[Term]:
        rule = find_map(node.function)
        if rule is not None:
            try:
                return rule(Pull(term, node, self.squared), *node.args, **node.kwargs)
            except (UnsupportedMap, TypeError):  # a call that is not what the map knows
                pass
        terms: list[Term] = []
        others = []
        for name in node.leaves:
            local = node.local(name)
            if local is None or not local.is_elementwise:
                others.append(name)
            else:
                terms.append(self._elementwise(term, local))
        return [*terms, *self._by_graph(term, node, others)]

    def _elementwise(self, term: MatrixTerm, local: LocalDerivative) -> Term:
        """Of an elementwise function: a scaled matrix where its derivatives are of rank one."""
        local = local.squared() if self.squared else local  # type: ignore[assignment]
        numbers = term.weight.read(local.matrix.flatten())  # (H, d_out, d_in)
        scales = _rank_one(numbers)
        place = term.weight.within(local.view)
        if scales is not None and place is not None:
            scaled = term.scaled_rows(scales[0]) if (scales[0] != 1).any() else term
            moved = scaled.scaled_columns(scales[1]) if (scales[1] != 1).any() else scaled
            if moved is not None:
                return moved.moved(place)
        return ElementwiseTerm(term, [local])

    def _features(self, term: FeatureTerm) -> list[Term]:
        (view,) = term.views
        node = self.computed[view.name]
        features = term.features
        if (view.offset, view.numel()) != (0, node.size) or not view.is_contiguous:  # of a part of it
            features = features.new_zeros(*features.shape[:3], node.size)
            view.add_to(features, term.features)
        ratios = self._ratios(term, node) if isinstance(term, ScaleTerm) else {}
        term = FeatureTerm([node.view], features)
        shared: list[LocalDerivative | DenseDerivative] = []
        own: list[LocalDerivative | DenseDerivative] = []
        rest = []
        for name, (_, leaf) in node.leaves.items():
            found = (None if node.size == 1 < leaf.numel() else node.local(name)) or node.dense(name)
            if found is None:
                rest.append(name)
                continue
            found = found.squared() if self.squared else found  # type: ignore[assignment]
            (own if leaf.numel() <= node.size else shared).append(found)
        terms = self._by_graph(term, node, rest)
        if shared:
            shared += [each for each in own if isinstance(each, LocalDerivative)]
            own = [each for each in own if not isinstance(each, LocalDerivative)]
            terms.append(SharedTerm(term, shared, ratios))
        return [*terms, *(_explicit(features, each) for each in own)]

    @staticmethod
    def _ratios(term: ScaleTerm, node: Computed) -> dict[str, Tensor]:
        """Where the derivatives of the scale are multiples of the rows of the matrix that is scaled, a parameter: those
        multiples, times the term's own. That is so where rows are divided by their norms."""
        place = term.matrix.view
        local = None if place is None or place.name not in node.leaves else node.local(place.name)
        if local is None or place is None or place.numel() != local.view.numel() or not place.is_contiguous:
            return {}
        rows = term.matrix.value.reshape(local.matrix.shape)
        multiples = (local.matrix * rows).sum(-1) / rows.square().sum(-1)
        error = (local.matrix - multiples.unsqueeze(-1) * rows).norm()
        rounding = _ROUNDING * torch.finfo(rows.dtype).eps
        return {place.name: multiples * term.multiples.flatten()} if error <= rounding * local.matrix.norm() else {}

    def _by_graph(self, term: Term, node: Computed, names: Sequence[str]) -> list[Term]:
        if not names:
            return []
        graph = node.graph(*names)
        return [PulledTerm(term, [graph.squared() if self.squared else graph])]


def _has_gradients_of(term: MatrixTerm, other: MatrixTerm) -> bool:
    """Whether a bias that was used with one matrix may go with another: what it is multiplied with is the same."""
    if type(term) is not type(other) or term.weight.shape[:2] != other.weight.shape[:2]:
        return False
    if isinstance(term, ConvolutionTerm):
        return term.maps is other.maps  # type: ignore[attr-defined]
    return term.gradients is other.gradients


def _rank_one(numbers: Tensor) -> tuple[Tensor, Tensor] | None:
    """α (H, d_out) and β (H, d_in) of numbers α_i β_j in each block (H, d_out, d_in); None if they are no such."""
    largest = numbers.abs().flatten(1).argmax(1)
    heads = torch.arange(len(numbers), device=numbers.device)
    rows, columns = largest // numbers.shape[-1], largest % numbers.shape[-1]
    beta = numbers[heads, rows]
    pivots = beta[heads, columns].unsqueeze(-1)
    alpha = numbers[heads, :, columns] / torch.where(pivots == 0, 1, pivots)
    error = (numbers - alpha.unsqueeze(-1) * beta.unsqueeze(-2)).abs().max()
    if not error <= _ROUNDING * torch.finfo(numbers.dtype).eps * numbers.abs().max():
        return None
    if (numbers == numbers.flatten()[0]).all():  # a number: the gradients stay what they are
        return torch.ones_like(alpha), beta
    return alpha, beta


def _explicit(features: Tensor, derivative: LocalDerivative | DenseDerivative) -> Term:
    """F H, where a parameter has no more numbers than the computed tensor."""
    if isinstance(derivative, LocalDerivative):
        return FeatureTerm([derivative.view], features * derivative.matrix.flatten())
    return FeatureTerm([derivative.view], features @ derivative.matrix)
