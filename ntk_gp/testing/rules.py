"""Whether the structured engine is right about a network, in every product that it offers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..jacobian.base import Jacobian
from ..jacobian.structured import StructuredEngine
from ..network import FrozenNetwork, InputDtype, InputShape, Output
from .comparison import assert_close, assert_entries_close, assert_shape
from .explicit import Selection, explicit_jacobian, selected_names

_Pair = tuple[Jacobian, Jacobian]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
# What rounding may leave of a parameter's gradients that are zero in theory, in eps of the largest row of J.
_ROUNDING = 100.0
# So many columns that the cost model takes the other way to multiply.
_MANY = 600


def check_rule(
    network: nn.Module,
    x: Tensor,
    other: Tensor | None = None,
    *,
    parameters: Selection = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = None,
    output: Output = None,
    group_by: Callable[[str], str] | None = None,
    allow_autodiff: bool = False,
    tolerances: Mapping[torch.dtype, float] = TOLERANCES,
) -> dict[str, str]:
    """Checks every product with a network's Jacobian by the structured engine, and so the rules that it is made of.

    The reference is :func:`~ntk_gp.testing.explicit_jacobian`: plain autograd on the network itself, in float64. Rows
    of the Jacobian, J u, Jᵀ v, Gram matrices at `x` and between `x` and `other`, their diagonals and products with them
    are compared as a whole, by their norms. Each parameter's part of each row of J is compared with its own size, and
    each entry of a Gram matrix with those of the two rows that it is of, so that a rule that is wrong at one point of
    many is found wrong wherever that point comes. At kinks, such as a ReLU unit that is all but zero, two ways to
    differentiate may both be right: choose inputs away from them.

    :param network: A network with the layer whose rule is to be checked. It is not changed.
    :param x: Inputs, (n, d) or (B, n, d). The more points, the more places where a rule may be wrong; it costs 2 n C
        backward passes for each dtype.
    :param other: Further inputs; half of those in `x`, in reverse order, by default.
    :param parameters: As in :class:`~ntk_gp.NTKKernel`.
    :param input_shape: As in :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: As in :class:`~ntk_gp.NTKKernel`.
    :param output: As in :class:`~ntk_gp.NTKKernel`.
    :param group_by: Maps a parameter's name to its group's, each with a prior variance of its own.
    :param allow_autodiff: Whether parameters may be left to automatic differentiation, as those are that no rule
        serves, and those whose rule declines or is found wrong by the engine itself.
    :param tolerances: The relative error allowed in each dtype; those that are not named are left out.
    :returns: For each parameter, by which rules it is served at `x`, or `"autodiff"`.
    :raises AssertionError: If something is wrong: it names the operation, the parameter and the error.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> check_rule(network, torch.randn(20, 3), output="all")
        {'0.weight': 'linear', '0.bias': 'linear', '2.weight': 'linear', '2.bias': 'linear'}
    """
    x = x.unsqueeze(0) if x.dim() == 2 else x
    other = x[:, : (x.shape[1] + 1) // 2].flip(1) if other is None else other
    other = other.unsqueeze(0) if other.dim() == 2 else other
    options: dict[str, Any] = {"parameters": parameters, "output": output}
    options |= {"input_shape": input_shape, "input_dtype": input_dtype}
    served: dict[str, str] = {}
    for dtype, tolerance in tolerances.items():
        with _reasons() as reasons:
            check = _Check(network, x.to(dtype), other.to(dtype), options, group_by, tolerance)
        served = check.served
        left = check.left_to_autodiff()
        if left and not allow_autodiff:
            raise AssertionError(f"Left to autodiff, in {dtype}: {', '.join(left)}.\n" + "\n".join(reasons))
        check.every_operation()
    return served


@dataclass
class _Check:
    """One network in one dtype.

    :param options: Arguments of `FrozenNetwork` that decide what is differentiated.
    """

    network: nn.Module
    x: Tensor
    other: Tensor
    options: dict
    group_by: Callable[[str], str] | None
    tolerance: float
    jacobians: _Pair = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = self.x.dtype
        exact = copy.deepcopy(self.network).to(self.dtype).double()
        self.J, self.K = (explicit_jacobian(exact, x.double(), **self.options) for x in (self.x, self.other))
        self.names, self.sizes, self.groups = self._parameters()
        self.jacobians = self._linearized(self.group_by)
        self.served = {str(entry["parameter"]): str(entry["served_by"]) for entry in self.jacobians[0].report()}

    @property
    def _rounding(self) -> float:
        """What part of the whole may be rounding, in units of the tolerance."""
        return _ROUNDING * torch.finfo(self.dtype).eps / self.tolerance

    def _linearized(self, group_by: Callable[[str], str] | None) -> _Pair:
        engine = StructuredEngine(FrozenNetwork(self.network, group_by=group_by, **self.options))
        return engine.linearize(self.x), engine.linearize(self.other)

    def _parameters(self) -> tuple[list[str], list[int], Tensor]:
        """The names of the parameters, their sizes, and for each of the P numbers the index of its group."""
        names = [aliases[0] for aliases in selected_names(self.network, self.options["parameters"])]
        named = dict(self.network.named_parameters(remove_duplicate=False))
        counts = [named[name].numel() for name in names]
        names = [name.replace("_orig_mod.", "") for name in names]  # where `torch.compile` has wrapped a part
        labels = ["" if self.group_by is None else self.group_by(name) for name in names]
        order = list(dict.fromkeys(labels))
        groups = torch.tensor([order.index(label) for label in labels])
        return names, counts, groups.repeat_interleave(torch.tensor(counts))

    def left_to_autodiff(self) -> list[str]:
        """The parameters that no rule serves, at either inputs."""
        entries = [entry for jacobian in self.jacobians for entry in jacobian.report()]
        return list(dict.fromkeys(str(e["parameter"]) for e in entries if e["served_by"] == "autodiff"))

    def every_operation(self) -> None:
        """All that the interface of Jacobians has; rows first, for they say the most."""
        generator = torch.Generator(device="cpu").manual_seed(2)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        like = self.J.to(self.dtype)
        u, v = (torch.randn(1, 3, size, **options).to(like) for size in (self.J.shape[-1], self.J.shape[-2]))
        weights = torch.rand(1, int(self.groups.max()) + 1, **options).add(0.5).to(like)
        j, k = self.jacobians
        self._check_rows("rows()", j.rows(), self.J)
        self._check_rows("rows() at the other inputs", k.rows(), self.K)
        self._check_rows("rows() of the points in reverse", *self._reversed())
        self._close("jvp", j.jvp(u), u.double() @ self.J.mT)
        self._check_columns("vjp", j.vjp(v), v.double() @ self.J)
        self._check_products(weights)
        many = v.repeat(1, _MANY // 3, 1)
        for right, name in ((v, "kernel_matmul"), (many, "kernel_matmul of many columns")):
            rhs = right.mT.double()
            gram, cross = self._gram(self.J, self.J, weights), self._gram(self.K, self.J, weights)
            self._close(name, j.kernel_matmul(j, right.mT, weights), gram @ rhs)
            self._close(f"{name} between inputs", k.kernel_matmul(j, right.mT, weights), cross @ rhs)

    def _reversed(self) -> tuple[Tensor, Tensor]:
        jacobian = self.jacobians[0]
        index = torch.arange(jacobian.num_points - 1, -1, -1)
        outputs = self.J.shape[-2] // max(1, len(index))
        return jacobian[index].rows(), self.J.unflatten(-2, (len(index), outputs))[:, index].flatten(1, 2)

    def _check_products(self, weights: Tensor) -> None:
        """Those with Σ; one that is wrong is tried again for each parameter by itself."""
        for name in _WEIGHTED:
            try:
                self._check_weighted(name, self.jacobians, weights)
            except AssertionError:
                self._blame(name)
                raise

    def _check_weighted(
        self, name: str, jacobians: tuple[Jacobian, Jacobian], weights: Tensor, whose: str = ""
    ) -> None:
        operation, reference = _WEIGHTED[name]
        gram = partial(self._gram, weights=weights)
        if whose:
            gram = partial(self._gram, columns=self._columns(whose))
        actual, expected = operation(*jacobians, weights), reference(self.J, self.K, gram)
        sizes = reference(self.J, self.K, lambda a, b: _size(gram, a).unsqueeze(-1) * _size(gram, b).unsqueeze(-2))
        what = self._what(name, whose)
        assert_close(what, actual, expected, self.tolerance)
        assert_entries_close(what, actual, expected, sizes, self.tolerance)

    def _blame(self, name: str) -> None:
        """Raises for the first parameter whose own part of a product is wrong."""
        jacobians = self._linearized(lambda parameter: parameter)
        for index, parameter in enumerate(self.names):
            one = torch.zeros(1, len(self.names), dtype=self.dtype)
            one[:, index] = 1
            self._check_weighted(name, jacobians, one, parameter)

    def _gram(self, left: Tensor, right: Tensor, weights: Tensor | None = None, columns: slice = slice(None)) -> Tensor:
        """J₁ Σ J₂ᵀ of explicit Jacobians, with Σ = 1 where there are no weights."""
        left, right = left[..., columns], right[..., columns]
        return (left if weights is None else left * weights.double()[..., self.groups].unsqueeze(-2)) @ right.mT

    def _columns(self, name: str) -> slice:
        index = self.names.index(name)
        return slice(sum(self.sizes[:index]), sum(self.sizes[: index + 1]))

    def _check_rows(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Each parameter's part of each row by its own size, and the whole."""
        assert_shape(self._what(name), actual, expected)
        largest = expected.norm(dim=-1).amax() if expected.numel() else 0.0
        for parameter in self.names:
            part, reference = (tensor[..., self._columns(parameter)] for tensor in (actual, expected))
            error = (part.double() - reference).norm(dim=-1)
            allowed = reference.norm(dim=-1) + self._rounding * largest
            what = self._what(name, parameter) + ", errors of its part of each row by their norms"
            assert_entries_close(what, error, torch.zeros_like(error), allowed, self.tolerance)
        self._close(name, actual, expected)

    def _check_columns(self, name: str, actual: Tensor, expected: Tensor) -> None:
        """Jᵀ v: each parameter's part by what was summed in it, and the whole."""
        assert_shape(self._what(name), actual, expected)
        for parameter in self.names:
            columns = self._columns(parameter)
            summed = self.J[..., columns].norm() + self._rounding * self.J.norm()
            part = actual[..., columns], expected[..., columns]
            allowed = self.J.shape[-2] ** 0.5 * summed
            assert_entries_close(self._what(name, parameter), *part, allowed, self.tolerance)
        self._close(name, actual, expected)

    def _close(self, name: str, actual: Tensor, expected: Tensor) -> None:
        if actual.dtype != self.dtype:
            raise AssertionError(f"{self._what(name)}: the dtype is {actual.dtype}.")
        assert_close(self._what(name), actual, expected, self.tolerance)

    def _what(self, name: str, parameter: str = "") -> str:
        whose = f" of {parameter}, served by {self.served[parameter]}," if parameter else ""
        return f"{name}{whose} in {str(self.dtype).removeprefix('torch.')}"


def _size(gram: Callable[[Tensor, Tensor], Tensor], jacobian: Tensor) -> Tensor:
    """The square roots of a Gram matrix's diagonal."""
    return gram(jacobian, jacobian).diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _common(jacobian: Jacobian, other: Jacobian) -> slice:
    return slice(0, min(jacobian.num_points, other.num_points))


# Operations on the Jacobians at x and at the other inputs, and what they are of the explicit ones.
_WEIGHTED: dict[str, tuple[Callable, Callable]] = {
    "gram": (lambda j, k, s: j.gram(j, s), lambda J, K, gram: gram(J, J)),
    "gram between inputs": (lambda j, k, s: k.gram(j, s), lambda J, K, gram: gram(K, J)),
    "gram between inputs, transposed": (lambda j, k, s: j.gram(k, s), lambda J, K, gram: gram(J, K)),
    "diagonal": (lambda j, k, s: j.diagonal(s), lambda J, K, gram: _diagonal(gram(J, J))),
    "cross_diagonal": (
        lambda j, k, s: j[_common(j, k)].cross_diagonal(k[_common(j, k)], s),
        lambda J, K, gram: _diagonal(gram(J, K)),
    ),
}


@contextmanager
def _reasons() -> Iterator[list[str]]:
    """What the engine says, at debug level, about the parameters that it leaves to autodiff."""
    messages: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ntk_gp")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # the user's handlers have asked for another level
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
