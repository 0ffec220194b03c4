"""Pictures of predictions, their calibration, similarity and kernel matrices; needs matplotlib, `ntk_gp[plots]`.

====================  ===========================================================================
:func:`posterior`     a model over one input: band, mean, network and data
:func:`maps`          truth, prediction and standard deviation over longitude and latitude
:func:`calibration`   how often central intervals hold the observations
:func:`reliability`   how often a classifier is right that says so
:func:`layers`        similarities layer by layer
:func:`spectrum`      the eigenvalues of a kernel matrix
====================  ===========================================================================

Each draws into the axes that it is given, or into new ones, and returns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from gpytorch.models import ExactGP
from linear_operator import to_dense
from linear_operator.operators import LinearOperator
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from .averaging.average import AveragedPredictions
from .means import NetworkMean
from .similarity import Estimate, Similarity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "0.5"


def posterior(
    model: ExactGP | AveragedPredictions, x: Tensor, ax: Axes | None = None, *, probability: float = 0.95
) -> Axes:
    """A model's predictions of observations over one input, with its data, and the network where that is its mean.

    :param model: An :class:`~ntk_gp.AdaptedGP`, what :func:`~ntk_gp.averaged` or :func:`~ntk_gp.compare` returns, or an
        ExactGP in eval mode, whose likelihood adds the noise.
    :param x: Where to draw it, (m,) or (m, 1), in any order.
    :param ax: The axes. (Default: new ones.)
    :param probability: Of the central interval that is the band.
    :raises ImportError: Without matplotlib.
    :raises ValueError: For inputs of several columns, several outputs, and for a model in train mode, which would
        predict its prior.
    """
    x = _one_column(x).sort(0).values
    with torch.no_grad():
        prediction = _predict(model, x)
        if prediction.mean.dim() != 1:
            raise ValueError(
                f"Expected predictions of one output, got means of shape {tuple(prediction.mean.shape)}. Make the "
                "model of one output."
            )
        low, high = (prediction.icdf(prediction.mean.new_tensor((1 + side * probability) / 2)) for side in (-1, 1))
        ax = _axes(ax)
        grid = _numbers(x.squeeze(-1))
        band = ax.fill_between(grid, _numbers(low), _numbers(high), alpha=0.25, lw=0, label=f"{100 * probability:g} %")
        (line,) = ax.plot(grid, _numbers(prediction.mean), lw=2, label="mean")
        band.set_color(line.get_color())
        mean = getattr(model, "mean_module", None)
        if isinstance(mean, NetworkMean):
            ax.plot(grid, _numbers(mean(x)), color=_GREY, ls="--", lw=1, label="network")
    if isinstance(model, ExactGP) and model.train_inputs is not None:
        ax.plot(_numbers(model.train_inputs[0][:, 0]), _numbers(model.train_targets), "k.", label="data")
    ax.legend(frameon=False)
    return ax


def maps(x: Tensor, truth: Tensor, prediction: Distribution, ax: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Truth, prediction and its standard deviation at points on a map, the first two in the same colours.

    :param x: Longitude and latitude, (n, 2), or any two coordinates; further columns are left out.
    :param truth: What is true or was observed there, (n,).
    :param prediction: Over the same points: :meth:`ntk_gp.AdaptedGP.predict`, or any distribution with mean and
        standard deviation.
    :param ax: Three axes. (Default: new ones, side by side.)
    :return: The three axes.
    :raises ImportError: Without matplotlib.
    :raises ValueError: If shapes do not go together.
    """
    if x.dim() != 2 or x.shape[1] < 2:
        raise ValueError(f"Expected x of shape (n, 2), longitude and latitude, got {tuple(x.shape)}.")
    mean, deviation = prediction.mean.detach(), prediction.stddev.detach()
    for name, values in (("truth", truth), ("the prediction's mean", mean)):
        if tuple(values.shape) != (len(x),):
            raise ValueError(f"Expected {name} of shape ({len(x)},), one for each point, got {tuple(values.shape)}.")
    if ax is None:
        ax = _pyplot().subplots(1, 3, figsize=(12, 3.6), sharex=True, sharey=True, layout="constrained")[1]
    if len(ax) != 3:
        raise ValueError(f"Expected three axes, for truth, prediction and standard deviation, got {len(ax)}.")
    both = torch.cat([truth.detach().to(mean), mean])
    ends: dict[str, Any] = {"vmin": both.min().item(), "vmax": both.max().item()}
    panels: tuple[tuple[str, Tensor, dict[str, Any]], ...] = (
        ("truth", truth, ends),
        ("prediction", mean, ends),
        ("standard deviation", deviation, {"cmap": "magma"}),
    )
    size = min(40.0, 20_000 / len(x))
    for axes, (title, values, options) in zip(ax, panels, strict=True):
        points = axes.scatter(_numbers(x[:, 0]), _numbers(x[:, 1]), c=_numbers(values), s=size, lw=0, **options)
        axes.figure.colorbar(points, ax=axes)
        axes.set_title(title)
    return ax


def calibration(prediction: Distribution, y: Tensor, ax: Axes | None = None, *, label: str | None = None) -> Axes:
    """How often central intervals hold the observations, against how often they should.

    The observation y is in the central interval of probability p where |2 F(y) - 1| ≤ p, with F the predictive
    distribution function. The curve is above the diagonal where intervals are too wide, below where they are too
    narrow.
    The grey band is where 95 % of such curves would be at each p, if all were as predicted and the points independent.

    :param prediction: Over n points, each by itself: :meth:`ntk_gp.AdaptedGP.predict`, a multivariate normal
        distribution, or any distribution with a `cdf`.
    :param y: What was observed there, (n,).
    :param ax: The axes. (Default: new ones.)
    :param label: Of the curve, for a legend.
    :raises ImportError: Without matplotlib.
    :raises ValueError: If shapes do not go together, or something is NaN.
    """
    prediction = _marginals(prediction)
    if y.shape != prediction.mean.shape:
        raise ValueError(
            f"Expected as many observations as predictions, {tuple(prediction.mean.shape)}, got {tuple(y.shape)}."
        )
    with torch.no_grad():
        levels = (2 * prediction.cdf(y) - 1).abs().reshape(-1).double()
    if not torch.isfinite(levels).all():
        raise ValueError("Observations or predictions are NaN: leave these points out.")
    ax = _axes(ax)
    if not ax.lines:
        _draw_diagonal(ax, len(levels))
    n = len(levels)
    ends = levels.new_tensor([0.0, 1.0])
    # A step up at each observation's level.
    ax.step(
        _numbers(torch.cat([ends[:1], levels.sort().values, ends[1:]])),
        _numbers(torch.cat([torch.arange(n + 1, dtype=levels.dtype) / n, ends[1:].cpu()])),
        where="post",
        label=label,
    )
    ax.set(xlabel="probability of the interval", ylabel="part of the observations inside", xlim=(0, 1), ylim=(0, 1))
    if label is not None:
        ax.legend(frameon=False)
    return ax


def reliability(probabilities: Tensor, labels: Tensor, ax: Axes | None = None, *, bins: int = 10) -> Axes:
    """How often a classifier is right, against how often it says that it is, in bins of equal width.

    The legend has the expected calibration error, the mean over the points of the difference in their bin (Guo, Pleiss,
    Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017).

    :param probabilities: Of each class, (n, C), of which the likeliest counts; or of class 1 of two, (n,), where the
        diagram is of that class.
    :param labels: The true classes, (n,), integers.
    :param ax: The axes. (Default: new ones.)
    :param bins: How many.
    :raises ImportError: Without matplotlib.
    :raises ValueError: If shapes do not go together, these are no probabilities or no labels.
    """
    confidence, correct = _confidence(probabilities, labels)
    means, frequencies, counts = binned(confidence, correct, bins)
    error = ((means - frequencies).abs() * counts).sum() / counts.sum()
    ax = _axes(ax)
    ax.plot([0, 1], [0, 1], color=_GREY, ls=":", lw=1)
    ax.plot(_numbers(means), _numbers(frequencies), "o-", label=f"ECE {error:.3f}")
    what = "said probability" if probabilities.dim() == 1 else "confidence"
    ax.set(xlabel=what, ylabel="frequency" if probabilities.dim() == 1 else "accuracy", xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False)
    return ax


def binned(confidence: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean confidence, the part that is correct and the number of points in each of the bins that have some, of
    equal width on (0, 1], the upper end included."""
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(places, minlength=bins).double()
    sums = [torch.bincount(places, weights=each.double(), minlength=bins) for each in (confidence, correct)]
    seen = counts > 0
    return sums[0][seen] / counts[seen], sums[1][seen] / counts[seen], counts[seen]


def layers(similarity: Similarity, ax: Axes | None = None) -> Axes:
    """The similarities of the whole network and of each layer, with their standard errors.

    :param similarity: What a function of :mod:`ntk_gp.similarity` returns.
    :param ax: The axes. (Default: new ones.)
    :raises ImportError: Without matplotlib.
    """
    ax = _axes(ax)
    columns = {
        name: [getattr(row, name) for row in similarity]
        for name in ("fisher", "alignment", "overlap")
        if isinstance(getattr(similarity.whole, name, None), Estimate)
    }
    places = torch.arange(len(similarity), dtype=torch.float64)
    width = 0.8 / len(columns)
    for k, (name, column) in enumerate(columns.items()):
        errors = [0.0 if each.error != each.error else each.error for each in column]
        ax.bar(
            _numbers(places + (k - (len(columns) - 1) / 2) * width),
            [each.value for each in column],
            width,
            yerr=errors,
            capsize=2,
            label={"fisher": "Fisher cosine", "overlap": "subspace overlap"}.get(name, name),
        )
    ax.set_xticks(_numbers(places), [row.name for row in similarity])
    ax.set(xlabel="layer", ylabel="similarity", ylim=(0, 1.05))
    ax.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(columns))
    return ax


def spectrum(
    matrix: Tensor | LinearOperator, ax: Axes | None = None, *, noise: float | None = None, label: str | None = None
) -> Axes:
    """The eigenvalues of a kernel matrix, the largest first, computed in float64, as far as rounding leaves them.

    :param matrix: K, (n, n), dense or lazy: `kernel(x)`.
    :param ax: The axes. (Default: new ones.)
    :param noise: The noise variance, for a line: directions below it the data cannot tell.
    :param label: Of the curve, for a legend.
    :raises ImportError: Without matplotlib.
    :raises ValueError: If the matrix is not square and symmetric, or has NaN.
    """
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.shape[0]:
        raise ValueError(
            f"Expected a kernel matrix of shape (n, n), got {tuple(matrix.shape)}. Plot batches one by one."
        )
    with torch.no_grad():
        dense = to_dense(matrix).double()
        tolerance = torch.finfo(matrix.dtype).eps ** 0.5 * dense.abs().max()
        if not bool(((dense - dense.mT).abs() <= tolerance).all()):
            raise ValueError("Expected a symmetric matrix without NaN. Is it that of two different sets of inputs?")
        values = torch.linalg.eigvalsh(dense).flip(-1)
    ax = _axes(ax)
    seen = values > torch.finfo(values.dtype).eps * values[0]  # the rest is what rounding leaves of zero
    number = torch.arange(1, len(values) + 1)[seen.cpu()]
    ax.loglog(_numbers(number), _numbers(values[seen]), ".-", label=label)
    if noise is not None:
        ax.axhline(noise, color=_GREY, ls=":", label="noise")
    ax.set(xlabel="number", ylabel="eigenvalue")
    if label is not None or noise is not None:
        ax.legend(frameon=False)
    return ax


def _draw_diagonal(ax: Axes, n: int) -> None:
    """What a calibrated model's curve is around."""
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    spread = 1.96 * (p * (1 - p) / n).sqrt()
    ax.fill_between(p.tolist(), (p - spread).tolist(), (p + spread).tolist(), color=_GREY, alpha=0.15, lw=0)
    ax.plot([0, 1], [0, 1], color=_GREY, ls=":", lw=1)


def _predict(model: Any, x: Tensor) -> Any:
    """The distribution of observations at x, with `mean` and `icdf`."""
    if hasattr(model, "predict"):
        return _marginals(model.predict(x))
    if not isinstance(model, ExactGP):
        raise TypeError(f"Expected a model that predicts, an AdaptedGP or another ExactGP, got {type(model).__name__}.")
    if model.training:
        raise ValueError("The model is in train mode, where it predicts its prior. Call model.eval() first.")
    return _marginals(model.likelihood(model(x)))


def _marginals(distribution: Distribution) -> Any:
    """Each point's own distribution, which has a `cdf`."""
    if isinstance(distribution, MultivariateNormal):
        return Normal(distribution.mean, distribution.stddev)
    return distribution


def _one_column(x: Tensor) -> Tensor:
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[1] != 1:
        raise ValueError(
            f"Expected points of one input, (m,) or (m, 1), got {tuple(x.shape)}. A model of several inputs is drawn "
            "over two of them by ntk_gp.plots.maps."
        )
    return x


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What is said of each point, (n,), and whether it is so, (n,)."""
    if probabilities.dim() not in (1, 2) or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"Expected probabilities (n, C) or (n,) and labels (n,), got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}."
        )
    probabilities = probabilities.detach().double()
    if not bool(((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all()):
        raise ValueError("Expected probabilities between 0 and 1. Of logits, take the softmax first.")
    classes = 2 if probabilities.dim() == 1 else probabilities.shape[1]
    if labels.is_floating_point() or labels.is_complex() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"Expected integer labels from 0 to {classes - 1}, got {labels.dtype}, {labels!r:.60}.")
    if probabilities.dim() == 1:
        return probabilities, labels == 1
    if not torch.allclose(probabilities.sum(-1), probabilities.new_ones(()), atol=1e-3):
        raise ValueError("Expected probabilities that add up to one at each point. Of logits, take the softmax first.")
    confidence, predicted = probabilities.max(-1)
    return confidence, predicted == labels


def _numbers(values: Tensor) -> Any:
    return values.detach().cpu().numpy()


def _axes(ax: Axes | None) -> Axes:
    return _pyplot().subplots(layout="constrained")[1] if ax is None else ax


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "ntk_gp.plots needs the package matplotlib. Install it with: pip install 'ntk_gp[plots]'"
        ) from error
    return pyplot
