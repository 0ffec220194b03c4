"""Real data: which sets, how they are split into source and target, and why.

None of these is one of the tasks on which the recipe was chosen, and sets and splits were fixed before any method was
run on them. They are eleven, of four kinds of change:

* **Malaria in Nigeria, later years** (`malaria`): parasite rate by longitude and latitude. Between 2000 and 2006 next
  to nothing changed, which is a task of its own: an adaptation should do no harm there. 2008 to 2013 and 2002 to 2010
  have control programmes in between, whose effect differs from place to place. The source is 4,000 pixels of one year.
* **Weather in Colorado, another year** (`precipitation`, `tmax`): by longitude, latitude and elevation. The source is
  every station in every year of thirty, so that the network learns the climate; the target is the stations in one
  later year, some of them new. Rain of April and May, 1940–70 to 1985, rain of September, 1930–60 to 1975, and the
  maximal temperature of January, 1950–80 to 1988: a wet season, a dry one, and another quantity in winter. Observations
  are as measured, without a transformation, in cm and °C: what is skewed stays so, for all methods alike.
* **Another population** (`shift`): the source is the half of the rows with the lower first principal component of the
  standardised inputs, the target the other half. The inputs lie beyond the source's, in all features at once, and the
  split was made without the targets. protein: small molecules to large ones. yacht: along the form of the hull.
  kin40k: its inputs are independent, and the direction is any.
* **A changed relation** (`hidden`): the input with the largest rank correlation with the target is taken away; the
  source is the half of the rows where it is lower, the target the other. The inputs that are left are distributed
  nearly as before, but mean something else, as when a condition has changed that was not recorded. For protein and
  kin40k; yacht consists of hardly more than the input that would be taken away.

Malaria and kin40k are without noise; protein, rain and temperature have much of it. There are 10, 50 and 200 labels,
as far as the set leaves 75 test points, and at most 1,000 test points, never among the labels. Pool, test points and,
where there are more than 6,000 rows, the source are drawn anew for each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..data import MALARIA, PRECIPITATION, folder_with
from .tasks import QUICK_STEPS, Cell, Task, generator, standardised
from .training import STEPS, Trained, trained

FILES = (MALARIA, PRECIPITATION, *(f"uci/{name}/data.csv.gz" for name in ("kin40k", "protein", "yacht")))
SOURCE = f"""They are
  {MALARIA}   lon, lat, years, pfpr (pixels × years), from the Malaria Atlas
                                   Project's rasters 2015_Nature_Africa_PR.YEAR.tif, clipped to Nigeria
  {PRECIPITATION}  ppt, tmax (years × months × stations), years, lon, lat, elev, from
                                   COmonthlyMet in the R package fields
  uci/NAME/data.csv.gz             from the GitHub repository treforevans/uci_datasets
Benchmarks take --data FOLDER as well."""

MOST_SOURCE, MOST_TEST, LEAST_TEST = 6000, 1000, 75
APRIL, MAY, SEPTEMBER, JANUARY = 3, 4, 8, 0


class Rows(NamedTuple):
    """Inputs (n, d) and observations (n,), as measured."""

    x: np.ndarray
    y: np.ndarray

    def __getitem__(self, rows) -> Rows:  # type: ignore[override]
        return Rows(self.x[rows], self.y[rows])


class Split(NamedTuple):
    """How a task is read, and the numbers of labels that its target is large enough for."""

    read: Callable[[Path], tuple[Rows, Rows]]  # source and target, from the folder of the data
    labels: Sequence[int]


def malaria(source_year: int, target_year: int) -> Split:
    def read(folder: Path) -> tuple[Rows, Rows]:
        data = _npz(folder, MALARIA)
        x = np.stack([data["lon"], data["lat"]], axis=-1)
        source, target = (
            Rows(x, data["pfpr"][:, data["years"] == year].squeeze(-1)) for year in (source_year, target_year)
        )
        return source[np.random.default_rng(0).permutation(len(x))[:4000]], target

    return Split(read, (10, 50, 200))


def colorado(
    variable: str,
    months: Sequence[int],
    source_years: tuple[int, int],
    target_year: int,
    labels: Sequence[int],
    target_months: Sequence[int] | None = None,
) -> Split:
    """The sum over some months, at the stations that have all of them; the last of the source's years is included.

    :param target_months: Of the target, where they are others than the source's.
    """

    def read(folder: Path) -> tuple[Rows, Rows]:
        data = _npz(folder, PRECIPITATION)
        x = np.stack([data["lon"], data["lat"], data["elev"]], axis=-1)
        first, last = source_years
        source, target = (
            # years × stations, NaN where a month is missing
            _present(x, data[variable][(data["years"] >= begin) & (data["years"] <= end)][:, list(some)].sum(axis=1))
            for begin, end, some in ((first, last, months), (target_year, target_year, target_months or months))
        )
        return source, target

    return Split(read, labels)


def shift(name: str, labels: Sequence[int]) -> Split:
    """From the lower half of the first principal component of the standardised inputs to the upper one."""

    def read(folder: Path) -> tuple[Rows, Rows]:
        rows = _uci(folder, name)
        standard = (rows.x - rows.x.mean(0)) / rows.x.std(0)
        direction = np.linalg.svd(standard, full_matrices=False)[2][0]
        component = standard @ direction * np.sign(direction[np.abs(direction).argmax()])
        upper = component > np.median(component)
        return rows[~upper], rows[upper]

    return Split(read, labels)


def hidden(name: str, labels: Sequence[int]) -> Split:
    """From the lower half of the input that says most about the target to the upper one, without that input."""

    def read(folder: Path) -> tuple[Rows, Rows]:
        rows = _uci(folder, name)
        ranks = [_ranks(column) for column in (*rows.x.T, rows.y)]
        correlations = [abs(np.corrcoef(column, ranks[-1])[0, 1]) for column in ranks[:-1]]
        most = int(np.argmax(correlations))
        upper = rows.x[:, most] > np.median(rows.x[:, most])
        rows = Rows(np.delete(rows.x, most, axis=1), rows.y)
        return rows[~upper], rows[upper]

    return Split(read, labels)


SPLITS = {
    "malaria 2000 to 2006": malaria(2000, 2006),
    "malaria 2002 to 2010": malaria(2002, 2010),
    "malaria 2008 to 2013": malaria(2008, 2013),
    "precipitation April-May": colorado("ppt", (APRIL, MAY), (1940, 1970), 1985, (10, 50, 200)),
    "precipitation September": colorado("ppt", (SEPTEMBER,), (1930, 1960), 1975, (10, 50)),
    "tmax January": colorado("tmax", (JANUARY,), (1950, 1980), 1988, (10, 50)),
    "protein shift": shift("protein", (10, 50, 200)),
    "kin40k shift": shift("kin40k", (10, 50, 200)),
    "yacht shift": shift("yacht", (10, 50)),
    "protein hidden": hidden("protein", (10, 50, 200)),
    "kin40k hidden": hidden("kin40k", (10, 50, 200)),
}


class Real:
    """The splits above.

    :param place: Where the data are, as :func:`benchmarks.data.folder_with` takes it.
    :raises FileNotFoundError: If one of the files that the splits read is not there.
    """

    seeds: Sequence[int] = range(3)

    def __init__(self, place: str | Path | None = None):
        self.folder = folder_with(FILES, SOURCE, place)

    def cells(self, seeds: Sequence[int], quick: bool) -> list[Cell]:
        names = list(SPLITS)[:1] if quick else SPLITS
        return [
            Cell(name, seed, n) for name in names for seed in seeds for n in SPLITS[name].labels[: 1 if quick else None]
        ]

    def source(self, name: str) -> str:
        return name

    def train(self, name: str, seed: int, quick: bool) -> Trained:
        def source() -> tuple[torch.Tensor, torch.Tensor]:
            rows = _read(name, self.folder)[0]
            some = np.random.default_rng((seed, 0)).permutation(len(rows.y))[:MOST_SOURCE]
            return _tensors(rows[some])

        return trained(self.source(name), seed, source, QUICK_STEPS if quick else STEPS)

    def task(self, name: str, seed: int, quick: bool) -> Task:
        target = _read(name, self.folder)[1]
        pool = max(SPLITS[name].labels)
        if len(target.y) < pool + LEAST_TEST:
            raise ValueError(
                f"{name} has {len(target.y)} target rows, fewer than {pool} labels and {LEAST_TEST} to test."
            )
        order = torch.randperm(len(target.y), generator=generator(seed, 1)).numpy()
        labels, test = target[order[:pool]], target[order[pool : pool + MOST_TEST]]
        return standardised(self.train(name, seed, quick), _tensors(labels), _tensors(test))


@cache
def _read(name: str, folder: Path) -> tuple[Rows, Rows]:
    return SPLITS[name].read(folder)


def _tensors(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(rows.x, dtype=torch.float64), torch.tensor(rows.y, dtype=torch.float64)


def _npz(folder: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(folder_with(name, SOURCE, folder) / name) as data:
        return {key: data[key] for key in data.files if key != "station"}


@cache
def _uci(folder: Path, name: str) -> Rows:
    """All rows; the last column is the target."""
    file = f"uci/{name}/data.csv.gz"
    data = np.loadtxt(folder_with(file, SOURCE, folder) / file, delimiter=",")
    return Rows(data[:, :-1], data[:, -1])


def _present(x: np.ndarray, values: np.ndarray) -> Rows:
    """Rows of the stations (s, d) in years (years, s) that are not missing."""
    year, station = np.nonzero(np.isfinite(values))
    return Rows(x[station], values[year, station])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks, also where values are equal."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
