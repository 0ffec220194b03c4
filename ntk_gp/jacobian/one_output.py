r"""Networks whose outputs have nothing in common but their features: the last linear layer, all outputs of it.

Of z = W a + b, output c is a function of row c of W and entry c of b alone, with the derivatives a and 1. In the
parameters of such a layer,

.. math:: J(X) = \Psi \otimes I_C, \qquad \Psi = [A, 1], \qquad J \Sigma J'^\top = (\Psi S \Psi'^\top) \otimes I_C,

so that the features Ψ of one output, n×(d_in + 1), say all. Where every term of a Jacobian is of this form, what is
known of one output serves all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .. import memory
from ..distributed.jacobian import ShardedJacobian
from ..network import FrozenNetwork, NetworkFunction
from .base import Jacobian
from .derived import DerivedLinearization
from .linearization import Linearization
from .structured import ChunkedJacobian, StructuredJacobian
from .terms import MatrixTerm
from .widened import WidenedJacobian


class OneOutputJacobian(Jacobian):
    """Ψ, (B, n, p): the rows of J of one output, in the p parameters that it depends on.

    :param function: What :func:`one_output_function` makes of the network's.
    :param x: The inputs, (B, n, d).
    :param features: Ψ.
    """

    def __init__(self, function: NetworkFunction, x: Tensor, features: Tensor):
        super().__init__(function, x)
        self.features = features

    @property
    def nbytes(self) -> int:
        return self.features.nbytes

    def jvp(self, tangents: Tensor) -> Tensor:
        return tangents @ self.features.mT

    def vjp(self, cotangents: Tensor) -> Tensor:
        return cotangents @ self.features

    def rows(self) -> Tensor:
        return self.features

    def some_columns(self, index: Tensor) -> Tensor:
        return self.features[..., index]

    def gram(self, other: Jacobian, variances: Tensor) -> Tensor:
        return (self.features * self.function.expand_variances(variances).unsqueeze(-2)) @ other.rows().mT

    def diagonal(self, variances: Tensor) -> Tensor:
        return (self.features.square() @ self.function.expand_variances(variances).unsqueeze(-1)).squeeze(-1)

    def product_cost(self, other: Jacobian) -> float:
        return 2.0 * len(self.x) * (self.num_points + other.num_points) * self.features.shape[-1]

    def __getitem__(self, points: Tensor | slice) -> OneOutputJacobian:
        return OneOutputJacobian(self.function, self.x[:, points], self.features[:, points])


def one_output(jacobian: Jacobian) -> Jacobian | None:
    """Ψ, where J is Ψ ⊗ I_C at all of its points; None where it is not, or does not say so."""
    if len(jacobian.function.parameters) > 2:  # more than a matrix and its bias
        return None
    if isinstance(jacobian, ShardedJacobian):
        return jacobian.transformed(_one_output_here)
    return _one_output_here(jacobian)


def _one_output_here(jacobian: Jacobian) -> OneOutputJacobian | None:
    """The same, of one that is not sharded."""
    if isinstance(jacobian, ChunkedJacobian):
        return _of_chunks(jacobian)
    term = _only_term(jacobian)
    if term is None or not _is_identity(term.gradients):
        return None
    return OneOutputJacobian(one_output_function(jacobian.function, term), jacobian.x, term.inputs[:, :, 0, 0])


def is_of_last_layer(jacobian: Jacobian) -> bool:
    """Whether J is what one linear layer is given, and f is what it returns: one pass forwards gives both.

    Where there is one output, f = J w₀ is a sign of it; and of a few other layers, of which J takes a pass back too.
    """
    if isinstance(jacobian, WidenedJacobian):
        return is_of_last_layer(jacobian.base)
    if jacobian.values is None or jacobian.num_rows == 0 or len(jacobian.function.parameters) > 2:
        return False
    if jacobian.function.num_outputs > 1:
        term = _only_term(jacobian)
        return term is not None and _is_identity(term.gradients)
    with torch.no_grad():
        product = jacobian.jvp(jacobian.function.flatten(jacobian.function.parameters).reshape(1, 1, -1))
    return torch.allclose(product.flatten(), jacobian.values.flatten(), rtol=1e-5, atol=1e-12)


def _of_chunks(jacobian: ChunkedJacobian) -> OneOutputJacobian | None:
    """The features of one output may be held where the factors of all cannot."""
    per_row = jacobian.function.num_parameters // jacobian.function.num_outputs
    size = jacobian.x.element_size() * len(jacobian.x) * jacobian.num_points * per_row
    if size > memory.FACTORS.bytes(jacobian.x.device):
        return None
    parts = []
    for chunk in jacobian.chunks():
        part = _one_output_here(chunk)
        if part is None:
            return None
        parts.append(part)
    return OneOutputJacobian(parts[0].function, jacobian.x, torch.cat([part.features for part in parts], dim=1))


def one_output_at(jacobian: Jacobian, like: Jacobian) -> OneOutputJacobian | None:
    """The same of any Jacobian of the same parameters, differentiable where it is: if need be from rows of J, C·P
    numbers for each point.

    :param like: One at other inputs, of which :func:`one_output` says that it is of that form.
    """
    if not jacobian.x.requires_grad:
        return _one_output_here(jacobian)
    term = _only_term(like)
    assert term is not None
    outputs = jacobian.function.num_outputs
    index = own_parameters(term).to(jacobian.x.device)  # (C, p)
    rows = jacobian.rows().unflatten(1, (-1, outputs))
    features = rows[:, :, 0, index[0]]
    expected = torch.zeros_like(rows)
    expected[:, :, torch.arange(outputs, device=index.device)[:, None], index] = features.detach().unsqueeze(2)
    if not torch.equal(rows.detach(), expected):
        return None
    return OneOutputJacobian(one_output_function(jacobian.function, term), jacobian.x, features)


def own_parameters(term: MatrixTerm) -> Tensor:
    """The numbers of the parameters that each output depends on, (C, p)."""
    index = term.weight.indices().reshape(term.weight.shape[1:])
    return index if term.bias is None else torch.cat([index, term.bias.indices().reshape(-1, 1)], dim=-1)


def scattered(weights: Tensor, jacobian: Jacobian) -> Tensor:
    """The weights of each output's own parameters, (..., C, p), as vectors of all parameters, (..., P).

    :param jacobian: One of which :func:`one_output` says that it is of that form.
    """
    term = _only_term(jacobian)
    assert term is not None
    out = weights.new_zeros(*weights.shape[:-2], jacobian.function.num_parameters)
    out[..., own_parameters(term).to(weights.device)] = weights
    return out


def one_output_function(function: NetworkFunction, term: MatrixTerm) -> NetworkFunction:
    """The function with the parameters of one output alone. For counting only: it cannot be called."""
    groups = dict(zip(function.parameters, function.group_indices, strict=True))
    new = copy.copy(function)
    new.parameters = {view.name: function.parameters[view.name].detach() for view in term.views}
    new.group_indices = tuple(groups[view.name] for view in term.views)
    new.num_outputs = 1
    new.state = ("one output", function.state)  # type: ignore[assignment]
    vars(new)["sizes"] = (term.weight.shape[-1], *([] if term.bias is None else [1]))
    vars(new).pop("num_parameters", None)
    return new


def _only_term(jacobian: Jacobian) -> MatrixTerm | None:
    """The one term of a Jacobian, where that is a matrix with a row for each output."""
    jacobian = jacobian.own
    if isinstance(jacobian, ChunkedJacobian):
        jacobian = next(jacobian.chunks())
    if not isinstance(jacobian, StructuredJacobian) or jacobian.rest is not None or len(jacobian.terms) != 1:
        return None
    (term,) = jacobian.terms
    outputs = jacobian.function.num_outputs
    if not isinstance(term, MatrixTerm) or outputs == 1 or term.weight.shape[:2] != (1, outputs):
        return None
    if term.num_positions != 1 or sum(view.numel() for view in term.views) != jacobian.function.num_parameters:
        return None
    return term


def _is_identity(gradients: Tensor) -> bool:
    """Whether g, (B, n, C, 1, 1, C), is the identity at every point."""
    identity = torch.eye(gradients.shape[2], dtype=gradients.dtype, device=gradients.device)
    return bool((gradients[:, :, :, 0, 0] == identity).all())


class OneOutputLinearization(DerivedLinearization):
    """A linearization of the network's one output, where all are alike.

    :param base: That of all outputs.
    """

    network: Any

    def __init__(self, base: Linearization):
        self.base = base
        self.network = _OneOutputNetwork(base.network)

    @property
    def label(self) -> str:
        return "of one output"

    def jacobian(self, x: Tensor, keep: bool = True) -> Jacobian:
        found = one_output(self.base.jacobian(x.detach(), keep))
        if found is None:
            raise RuntimeError("The network does other things at these inputs than at those before.")
        return found

    def gram(self, jacobian1: Jacobian, jacobian2: Jacobian, variances: Tensor, keep: bool = True) -> Tensor:
        return jacobian1.gram(jacobian2, variances)

    def kernel_matmul(self, jacobian1: Jacobian, jacobian2: Jacobian, rhs: Tensor, variances: Tensor) -> Tensor:
        return jacobian1.kernel_matmul(jacobian2, rhs, variances)

    def __deepcopy__(self, memo: dict) -> OneOutputLinearization:
        new = OneOutputLinearization(copy.deepcopy(self.base, memo))
        memo[id(self)] = new
        return new


class _OneOutputNetwork:
    """What a linearization's network is asked for."""

    def __init__(self, network: FrozenNetwork):
        self._network = network

    @property
    def num_groups(self) -> int:
        return self._network.num_groups

    def fingerprint(self) -> Hashable:
        return ("one output", self._network.fingerprint())

    def num_outputs(self, x: Tensor) -> int:
        return 1
