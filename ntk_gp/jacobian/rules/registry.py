"""What a rule is, and the table of rules."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..terms import FeatureTerm, MatrixTerm, ParameterView, Term


class UnsupportedUse(Exception):
    """Raised by a rule for a call that it has no formula for: the parameters in it are then left to autodiff."""


@dataclass
class Use:
    """One call with a parameter in it, as a rule sees it.

    Tensors are point-first: whatever place the n inputs had in the call's tensors, they are the first dimension of
    `gradients` and of the tensor arguments. Where a dimension of the call ran over points and positions together
    (such as windows of an image), it is split in two.

    :param gradients: g, the derivatives of each of the C outputs with respect to the call's result: (n, C, *rest).
    :param point_dim: Which dimension of the call's result the points were.
    :param ndim: How many dimensions the call's result had.
    :param split: Whether that dimension was split, so that `rest` has one dimension more than the result's others.
    """

    gradients: Tensor
    point_dim: int
    ndim: int
    split: bool = False

    def decline_points_in_last(self, dims: int) -> None:
        """Declines calls where the points are among the last dimensions, which have a meaning of their own."""
        if self.point_dim >= self.ndim - dims:
            raise UnsupportedUse(f"the points are dimension {self.point_dim} of {self.ndim}")

    def decline_points_not_first(self) -> None:
        """Declines calls where the points are not the first dimension."""
        if self.point_dim != 0:
            raise UnsupportedUse(f"the points are dimension {self.point_dim} of {self.ndim}")

    # Their former names.
    keep_last, keep_first = decline_points_in_last, decline_points_not_first

    def matrix(
        self,
        weight: ParameterView | Any,
        bias: ParameterView | Any,
        inputs: Tensor,  # (n, *positions, d_in)
        gradients: Tensor | None = None,  # (n, C, *positions, d_out)
    ) -> list[Term]:
        """The terms of z = W a + b at every position; `weight` (d_out, d_in), `bias` (d_out,) if selected."""
        g = self.gradients if gradients is None else gradients
        g = g.reshape(*g.shape[:2], -1, 1, g.shape[-1])
        if not isinstance(weight, ParameterView):
            return [self._bias(bias, g)] if isinstance(bias, ParameterView) else []
        a = inputs.reshape(inputs.shape[0], -1, 1, inputs.shape[-1])
        bias = _one_block(bias) if isinstance(bias, ParameterView) else None
        return [MatrixTerm(_one_block(weight), bias, a.unsqueeze(0), g.unsqueeze(0))]

    @staticmethod
    def _bias(bias: ParameterView, g: Tensor) -> Term:
        return FeatureTerm([bias], g.sum(2).flatten(2).unsqueeze(0))

    def features(self, parameter: ParameterView | Any, gradients: Tensor) -> list[Term]:
        """The term of a parameter whose per-point gradients are given: (n, C, *parameter.shape)."""
        if not isinstance(parameter, ParameterView):
            return []
        columns = gradients.reshape(*gradients.shape[:2], -1)
        if columns.shape[-1] != parameter.numel():
            raise UnsupportedUse(
                f"gradients of shape {tuple(gradients.shape)} for a parameter of shape {parameter.shape}"
            )
        return [FeatureTerm([parameter], columns.unsqueeze(0))]

    def sum_to(self, parameter: ParameterView | Any, values: Tensor) -> Tensor:
        """Sums values (n, C, *rest) over the dimensions along which the parameter was broadcast."""
        if not isinstance(parameter, ParameterView):
            return values
        shape = [1] * (self.ndim - parameter.ndim) + list(parameter.shape)
        if shape.pop(self.point_dim) != 1:
            raise UnsupportedUse("the parameter has a different element for each point")
        if self.split:
            shape.insert(0, 1)
        dims = [2 + i for i, size in enumerate(shape) if size == 1 and values.shape[2 + i] > 1]
        return values.sum(dims, keepdim=True) if dims else values


@lru_cache(maxsize=1024)  # of more parameters than networks have: each recording has the same ones again
def _one_block(view: ParameterView) -> ParameterView:
    """A matrix or its bias, (d_out, …), as a matrix term has it, (H, d_out, …): of one block."""
    return view.unflatten(0, (1, -1))


Rule = Callable[..., Iterable[Term]]


@dataclass
class RegisteredRule:
    """A rule and how to read the calls it is for.

    :param elementwise: The call's tensors broadcast against one another.
    :param is_own: Whether it came with the package, whose tests it has passed.
    """

    rule: Rule
    parameters: tuple[str, ...]
    elementwise: bool = False
    is_own: bool = False
    name: str = field(init=False)
    signature: inspect.Signature = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.rule.__name__
        parameters = list(inspect.signature(self.rule).parameters.values())[1:]
        self.signature = inspect.Signature(parameters)
        positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._names = tuple(p.name for p in positional)
        self._num_required = sum(p.default is p.empty for p in positional)
        # Whether calls without keywords can be read by place alone, without looking at the signature each time.
        self._is_plain = all(
            p in positional or (p.kind is p.KEYWORD_ONLY and p.default is not p.empty) for p in parameters
        )

    def bind(self, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """The call's arguments by name, or None if this is not a call that the rule is for."""
        if self._is_plain and not kwargs and self._num_required <= len(args) <= len(self._names):
            return dict(zip(self._names, args, strict=False))
        try:
            return self.signature.bind(*args, **kwargs).arguments
        except TypeError:
            return None

    def call(self, function: Callable, arguments: dict[str, Any], *before: Any) -> Any:
        """A function of what comes before and of the arguments by name, handed over as the signature says."""
        if self._is_plain and list(arguments) == list(self._names[: len(arguments)]):
            return function(*before, *arguments.values())
        bound = self.signature.bind_partial()
        bound.arguments.update(arguments)
        return function(*before, *bound.args, **bound.kwargs)


@dataclass
class RegisteredDecomposition:
    """What a composite function is replaced by."""

    replacement: Callable
    is_own: bool = False


_RULES: dict[Any, RegisteredRule] = {}
_DECOMPOSITIONS: dict[Any, RegisteredDecomposition] = {}
_versions = itertools.count(1)
_version = 0


def version() -> int:
    """A number that changes with every registration: what was found out with other rules is found out again."""
    return _version


def mark_as_own() -> None:
    """Called once, when the package has registered all of its own."""
    for rule in _RULES.values():
        rule.is_own = True
    for decomposition in _DECOMPOSITIONS.values():
        decomposition.is_own = True


def changed() -> None:
    """Called with every registration."""
    global _version
    _version = next(_versions)


def register_rule(
    function: Callable, rule: Rule, *, parameters: tuple[str, ...] = ("weight", "bias"), elementwise: bool = False
) -> None:
    """Teaches the structured engine how a function uses its parameters. See `docs/adding-a-rule.md`.

    :param function: The function that layers call, e.g. `torch.nn.functional.linear`. Other Python functions must hand
        their calls to `torch.overrides` (`torch.overrides.wrap_torch_function` does that).
    :param rule: `rule(use, *args, **kwargs)` with the function's own arguments after a
        :class:`~ntk_gp.jacobian.rules.Use`; it returns terms. In place of a selected parameter it gets a
        :class:`~ntk_gp.jacobian.rules.ParameterView`. It may raise :class:`~ntk_gp.jacobian.rules.UnsupportedUse`.
    :param parameters: The names of the arguments that may be parameters.
    :param elementwise: The function's tensors broadcast: the rule gets them expanded to the result's shape.

    Kernels that exist use it from their next evaluation on. At every capture, Jᵀv by a registered rule is compared with
    autograd's for one random v over all the inputs captured; a parameter that disagrees is left to autodiff. See
    `docs/adding-a-rule.md` for what that can tell.
    """
    registered = RegisteredRule(rule, tuple(parameters), elementwise)
    unknown = set(parameters) - set(registered.signature.parameters)
    if unknown and parameters != ("weight", "bias"):
        raise ValueError(
            f"{registered.name} has no argument {', '.join(sorted(unknown))}: parameters= names those of "
            f"{', '.join(registered.signature.parameters)} that may be parameters."
        )
    _RULES[function] = registered
    changed()


def register_decomposition(function: Callable, decomposition: Callable) -> None:
    """Replaces a composite function, while it is recorded, by calls of functions that have rules.

    :param decomposition: Has the function's arguments and result, or returns NotImplemented.
    """
    _DECOMPOSITIONS[function] = RegisteredDecomposition(decomposition)
    changed()


def find(function: Any) -> tuple[RegisteredRule | None, RegisteredDecomposition | None]:
    """What is registered for a function."""
    try:
        return _RULES.get(function), _DECOMPOSITIONS.get(function)
    except TypeError:  # a callable that cannot be hashed
        return None, None
