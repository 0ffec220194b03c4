"""Two tasks compared by one network, two networks on one set of inputs, a network and targets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..network import InputDtype, InputShape, Output, ParameterSelection
from .alignment import Targets, alignments
from .fisher import diagonal_cosines
from .resampling import Estimate, Resampling, estimate
from .results import LayerOfNetworks, LayerOfTargets, LayerOfTasks, Similarity
from .subspaces import Leading, comparable, leading, overlaps, principal_angles, right_basis
from .tangents import Layered, Tangents, without_graph

_UNDEFINED = Estimate(float("nan"), float("nan"))


@without_graph
def of_tasks(
    network: nn.Module,
    x_a: Tensor,
    x_b: Tensor,
    y_a: Tensor | None = None,
    y_b: Tensor | None = None,
    *,
    parameters: ParameterSelection = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = None,
    output: Output = "all",
    by: str | Callable[[str], str] | None = "layer",
    rank: int = 10,
    resamples: int = 100,
    seed: int = 0,
) -> Similarity[LayerOfTasks]:
    r"""How alike two tasks are to a network: by its Jacobians J_A, J_B at their inputs, layer by layer.

    * `fisher`: the cosine between the diagonals of :math:`J_A^\top J_A` and :math:`J_B^\top J_B`, which parameters
      matter for which task (Fisher information of a Gaussian likelihood; Achille et al., "Task2Vec", ICCV 2019). With
      targets, squares of the gradients of the squared loss take the place of those of the outputs (the empirical
      Fisher information).
    * `overlap` and `angles`: the principal angles θ between the subspaces of the first `rank` right singular vectors of
      J_A and J_B, the directions of the weights that the tasks can tell best; the overlap is mean cos² θ, one where
      they are the same, and k / P by chance where k of P are compared.

    Both are one for equal inputs, in whatever order. Standard errors are those of the bootstrap over the points of
    either task, for which nothing is evaluated again; directions beyond the first 4 `rank` (32 at least) are left out
    of theirs.

    Everything is computed in float64, on the inputs' device, within :class:`ntk_gp.settings.memory_budget`. Costs the
    rows of J, some at a time (once more for every so many resampled sets as vectors of P numbers fit in an eighth of
    the budget), and for each layer either the eigenvalues of K = J Jᵀ, or with more than 500 rows a few products of it.

    The source of the idea that similar tasks have similar Jacobians is Maddox et al., "Fast Adaptation with Linearized
    Neural Networks", AISTATS 2021.

    :param network: The trained network; it is not changed.
    :param x_a: The inputs of one task, (n_a, d) or (n_a, *input_shape).
    :param x_b: Those of the other, (n_b, d) or (n_b, *input_shape).
    :param y_a: The targets of one task, (n_a,) or (n_a, C).
    :param y_b: Those of the other, if there are any of the one.
    :param parameters: Those that take part, see :class:`~ntk_gp.NTKKernel`.
    :param input_shape: The shape of one input as the network wants it, as for :class:`~ntk_gp.NTKKernel`.
    :param input_dtype: An integer or boolean dtype that the network wants its inputs in, likewise.
    :param output: The index of one output of a network with several, or `"all"`.
    :param by: What is a layer: `"layer"` (a module with parameters), `"parameter"`, a function from a parameter's name
        to its layer's, or None for the whole network alone.
    :param rank: How many directions are compared: fewer where a Jacobian has a lower rank, more where the last of them
        has its singular value in common with the next, as in the last layer of a network with several outputs.
    :param resamples: How many sets of points are drawn for the standard errors, 0 for none.
    :param seed: Of these draws.
    :return: A table with a row for the whole network and one for each layer.
    :raises ValueError: If inputs or targets are empty, have other shapes, or are not finite; where the network cannot
        be linearised, see :class:`~ntk_gp.NTKKernel`, or its Jacobian is not finite.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> x = torch.randn(50, 2)
        >>> print(of_tasks(network, x, x + 0.5, rank=3))
        layer  parameters  Fisher cosine  subspace overlap     angles
        whole          81  0.97... ± 0.0...     0.9... ± 0.0...   ...° to ...°
        0              60  0.94... ± 0.0...     0.9... ± 0.0...  ...° to ...°
        2              21  0.97... ± 0.0...     0.9... ± 0.0...   ...° to ...°
    """
    _check_rank(rank)
    if (y_a is None) != (y_b is None):
        raise ValueError("Expected targets of both tasks or of neither, got those of one. Pass y_a= and y_b=.")
    layered = Layered(network, parameters, (input_shape, input_dtype), output, by)
    a, b = layered.at(x_a, "x_a"), layered.at(x_b, "x_b")
    _check_devices(a, b)
    residuals_a, residuals_b = (
        None if y is None else t.residuals(y, name) for t, y, name in ((a, y_a, "y_a"), (b, y_b, "y_b"))
    )
    resampling = Resampling(resamples, seed)
    weights_a, weights_b = resampling.weights(a.x), resampling.weights(b.x)
    fisher = diagonal_cosines((a, weights_a, residuals_a), (b, weights_b, residuals_b))
    rows = []
    for layer, (name, size) in zip(a.numbers, a.layers.items(), strict=True):
        found = leading(a, layer, rank), leading(b, layer, rank)
        overlap, angles = _right(a, b, layer, found, (weights_a, weights_b), rank)
        rows.append(LayerOfTasks(name, size, estimate(fisher[:, layer + 1]), overlap, angles))
    return Similarity(rows)


def _right(
    a: Tangents, b: Tangents, layer: int, found: tuple[Leading, Leading], weights: tuple[Tensor, Tensor], rank: int
) -> tuple[Estimate, Tensor]:
    """The overlap of the leading right singular subspaces, and their angles."""
    one, other = found
    count = comparable(one, other, rank)
    if count == 0:
        return _UNDEFINED, a.x.new_empty(0)
    angles = principal_angles(right_basis(a, layer, one, count), right_basis(b, layer, other, count))

    def resampled() -> Tensor:
        product = a.jacobian.kernel_matmul(b.jacobian, other.vectors.unsqueeze(0), a.variances(layer))[0]
        cross = (one.vectors / one.values).mT @ product / other.values
        rows = _of_rows(one, weights[0], a), _of_rows(other, weights[1], b)
        return overlaps(*rows, lambda _: cross, count, left=False)

    return _overlap(angles, resampled if len(weights[0]) > 1 else None), angles


@without_graph
def of_networks(
    network_a: nn.Module,
    network_b: nn.Module,
    x: Tensor,
    *,
    parameters: ParameterSelection = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = None,
    output: Output = "all",
    by: str | Callable[[str], str] | None = "layer",
    rank: int = 10,
    resamples: int = 100,
    seed: int = 0,
) -> Similarity[LayerOfNetworks]:
    r"""How alike two networks are on a set of inputs: by their tangent kernels K_A, K_B there, layer by layer.

    * `alignment`: the cosine between the two kernel matrices, centred output by output (linear CKA of the Jacobians;
      Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019). It depends neither on the
      kernels' scales nor on what the networks call their parameters. With few points, unlike kernels seem more alike
      than they are.
    * `overlap` and `angles`: the principal angles θ between the subspaces of the first `rank` left singular vectors of
      J_A and J_B, the functions on these inputs that the networks learn first; the overlap is mean cos² θ.

    Everything is computed in float64, on the inputs' device, within :class:`ntk_gp.settings.memory_budget`. Costs the
    kernel matrix of each layer of either network once, a block of rows at a time, and its leading eigenvectors.

    :param network_a: One trained network.
    :param network_b: The other, with as many outputs. Layers are compared by their names; of networks of other forms,
        `by=None` compares the whole alone.
    :param x: The inputs, (n, d) or (n, *input_shape).
    :param rank: How many directions are compared.
    :param resamples: How many sets of points are drawn for the standard errors, 0 for none.

    The other arguments are those of :func:`of_tasks`.

    :return: A table with a row for the whole networks and one for each layer.
    :raises ValueError: If the networks have different layers or numbers of outputs, and as :func:`of_tasks` does.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> def make_network(width):
        ...     layers = torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        ...     return torch.nn.Sequential(*layers)
        >>> print(of_networks(make_network(9), make_network(20), torch.randn(50, 2), rank=3))
        layer  parameters      alignment  subspace overlap     angles
        whole     37 / 81  0.96... ± 0.0...     0.9... ± 0.0...   ...° to ...°
        0         27 / 60  0.97... ± 0.0...     0.9... ± 0.0...  ...° to ...°
        2         10 / 21  0.93... ± 0.0...     0.9... ± 0.0...   ...° to ...°
    """
    _check_rank(rank)
    a, b = (
        Layered(network, parameters, (input_shape, input_dtype), output, by).at(x, "x")
        for network in (network_a, network_b)
    )
    if a.num_outputs != b.num_outputs:
        raise ValueError(
            f"Expected networks with as many outputs, got {a.num_outputs} and {b.num_outputs}. Compare one output of "
            "each, with output=index."
        )
    if list(a.layers) != list(b.layers):
        unlike = [name for name in {**a.layers, **b.layers} if (name in a.layers) != (name in b.layers)]
        raise ValueError(
            f"The networks have different layers: {', '.join(map(repr, unlike or a.layers))} "
            f"{'are in one only' if unlike else 'come in another order'}. Compare them as a whole with by=None, name "
            "the parameters that they have in common with parameters=, or say with by=function what corresponds."
        )
    weights = Resampling(resamples, seed).weights(a.x)
    rows = []
    for layer, name in zip(a.numbers, a.layers, strict=True):
        found = leading(a, layer, rank), leading(b, layer, rank)
        overlap, angles = _left(a, found, weights, rank)
        alignment = estimate(alignments(a, b, layer, weights))
        rows.append(LayerOfNetworks(name, (a.layers[name], b.layers[name]), alignment, overlap, angles))
    return Similarity(rows)


def _left(tangents: Tangents, found: tuple[Leading, Leading], weights: Tensor, rank: int) -> tuple[Estimate, Tensor]:
    """The overlap of the leading left singular subspaces, and their angles."""
    one, other = found
    count = comparable(one, other, rank)
    if count == 0:
        return _UNDEFINED, tangents.x.new_empty(0)
    angles = principal_angles(one.vectors[:, :count], other.vectors[:, :count])

    def resampled() -> Tensor:
        rows = _of_rows(one, weights, tangents), _of_rows(other, weights, tangents)
        return overlaps(*rows, lambda w: one.features.mT @ (w.unsqueeze(-1) * other.features), count, left=True)

    return _overlap(angles, resampled if len(weights) > 1 else None), angles


@without_graph
def of_targets(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    residuals: bool = False,
    parameters: ParameterSelection = None,
    input_shape: InputShape = None,
    input_dtype: InputDtype = None,
    output: Output = "all",
    by: str | Callable[[str], str] | None = "layer",
    resamples: int = 100,
    seed: int = 0,
) -> Similarity[LayerOfTargets]:
    r"""How alike a network's tangent kernel and targets are: the centred alignment of K with y yᵀ, layer by layer.

    It is one where the kernel's only direction is that of the targets, and small where the targets lie in directions
    that the kernel gives little (kernel-target alignment; Cortes, Mohri and Rostamizadeh, JMLR 2012).

    :param x: The inputs, (n, d) or (n, *input_shape).
    :param y: The targets, (n,) or (n, C).
    :param residuals: Align with what the network leaves, y - f(x), in place of y.

    The other arguments, precision and memory are those of :func:`of_tasks`. Costs the kernel matrix of each layer, a
    block of rows at a time.

    :return: A table with a row for the whole network and one for each layer.
    :raises ValueError: As :func:`of_tasks` does.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
        >>> x = torch.randn(50, 2)
        >>> print(of_targets(network, x, x.sin().sum(-1)))
        layer  parameters      alignment
        whole          81  0.73... ± 0.0...
        0              60  0.60... ± 0.1...
        2              21  0.73... ± 0.0...
    """
    tangents = Layered(network, parameters, (input_shape, input_dtype), output, by).at(x, "x")
    targets = Targets(tangents.residuals(y, "y") if residuals else tangents.targets(y, "y"))
    weights = Resampling(resamples, seed).weights(tangents.x)
    return Similarity(
        [
            LayerOfTargets(name, size, estimate(alignments(tangents, targets, layer, weights)))
            for layer, (name, size) in zip(tangents.numbers, tangents.layers.items(), strict=True)
        ]
    )


def _overlap(angles: Tensor, resampled: Callable[[], Tensor] | None) -> Estimate:
    """The mean squared cosine, with an error where overlaps of resampled points are to be had."""
    error = float("nan") if resampled is None else estimate(resampled()).error
    return Estimate(angles.cos().square().mean().item(), error)


def _of_rows(found: Leading, weights: Tensor, tangents: Tangents) -> tuple[Leading, Tensor]:
    """Points' weights as those of their rows, (R, N)."""
    return found, weights.repeat_interleave(tangents.num_outputs, dim=-1)


def _check_rank(rank: int) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"Expected rank, the number of directions to compare, as a positive integer, got {rank!r}.")


def _check_devices(*tangents: Tangents) -> None:
    devices = {str(each.x.device) for each in tangents}
    if len(devices) > 1:
        raise ValueError(f"Expected the inputs of both tasks on one device, got {' and '.join(sorted(devices))}.")
