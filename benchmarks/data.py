"""Where the real data are: in a folder, or at an address that they are fetched from, once, and checked.

Either is passed, or named by the environment variable `NTK_GP_DATA`; otherwise files are looked for in `shared/data`
beside the repository. What is fetched, by the package `pooch`, is kept in the user's cache (or the folder that
`NTK_GP_CACHE` names) and known by its SHA-256; a file in a folder is its owner's, and read as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

VARIABLE, CACHE = "NTK_GP_DATA", "NTK_GP_CACHE"
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data"

MALARIA, PRECIPITATION = "map_pfpr_nigeria_2000_2015.npz", "co_monthly_precip_1895_1997.npz"
SHA256 = {
    MALARIA: "61ea10d35902979816bcbdd77d013273dc9155a3d306267ee1bc9958e6eb0e01",
    PRECIPITATION: "c6c09cc2c2b8c04b351bd03b734de2b11f7146170961d203b009eb2701ac8f94",
    "uci/airfoil/data.csv.gz": "1cce82516ac9e564fba52f55d817eb147fc39085f5d7b958ad15b92f4207f23e",
    "uci/airfoil/test_mask.csv.gz": "dbba6121fb8f900350fe10d724b54faa2b67fcc7bfc3409cf7add717281609e4",
    "uci/concrete/data.csv.gz": "542c5d9a0d301bdb47550280398dcbbe2fb8404631fc945de1ea6df9ade741c6",
    "uci/concrete/test_mask.csv.gz": "fae0926c655e4f9fb5669d0dbf2226bd8ff7daaadbd376adb8f32eac6f752e7e",
    "uci/energy/data.csv.gz": "431b6df04243db782bbcd45e408373a654334496ebe5d9c9985ab2e826a39f51",
    "uci/energy/test_mask.csv.gz": "217df2cd4cabf818390e26a65384ea113c95b75bd687787a37ed2f87f28c9bb8",
    "uci/kin40k/data.csv.gz": "9bee7f2a9f39aa61a015f239378368601fb3978c5bb9a96433e88a55d40883ba",
    "uci/kin40k/test_mask.csv.gz": "d15fd645d0e81a9a17ce2d0b8dde470bb2efba4d5f417459965abe4b237e2aea",
    "uci/protein/data.csv.gz": "f709d0107c3ee90ab019b9e5d77fc2ae182158958cb70b1903236a51334fd01b",
    "uci/protein/test_mask.csv.gz": "22afe05e8d17c428558d78a77efeecc08d58004b6c95741d1c533c3207c69fe9",
    "uci/wine/data.csv.gz": "e2ca3346651ddb43fbc6a1355e70e74b7ce68f93059e04405e9cb749c219eae2",
    "uci/wine/test_mask.csv.gz": "df80c2a700eafb42230991dd7a94c08d47baea55dde125a0a0dcae08964d4559",
    "uci/yacht/data.csv.gz": "88ec8ea1a979ab0628a54392822c60b3699ea22541e912e83246f7d49f5adad1",
    "uci/yacht/test_mask.csv.gz": "2f6d6b091146887589db66073317b8485e853d27e664b99b8b402ad57ba4a936",
}


def is_address(place: str | Path) -> bool:
    return str(place).startswith(("http://", "https://"))


def folder_with(names: str | Sequence[str], source: str, place: str | Path | None = None) -> Path:
    """A folder that has these files, by their paths below it.

    :param source: A sentence on where to get the files, which the error has if they are not there.
    :param place: A folder, or the http(s) address of one: then the folder that is returned is that of the cache. A path
        keeps only one of an address's slashes, so that an address has to be a string. Default: `$NTK_GP_DATA`, or
        `shared/data` beside the repository.
    :raises FileNotFoundError: If a file is not there or cannot be fetched, or `pooch` is not installed.
    :raises ValueError: If what was fetched is another file than the one that is known here.
    """
    names = [names] if isinstance(names, str) else names
    place = place or os.environ.get(VARIABLE) or DEFAULT_FOLDER
    if is_address(place):
        return _fetched(names, source, f"{place}".rstrip("/"))
    missing = [name for name in names if not (Path(place) / name).exists()]
    if missing:
        raise _not_here(f"no {' and no '.join(missing)} in {Path(place).resolve()}", source)
    return Path(place)


def _fetched(names: Sequence[str], source: str, address: str) -> Path:
    pooch = _pooch(address)
    cache = pooch.create(pooch.os_cache("ntk_gp"), f"{address}/", registry=SHA256, env=CACHE)
    for name in names:
        if name not in SHA256:
            raise _not_here(f"{name} is not among what can be fetched from an address, which is {address}", source)
        try:
            cache.fetch(name)
        except OSError as error:  # requests' own errors are
            raise _not_here(f"{address}/{name} could not be fetched ({error})", source) from error
        except ValueError as error:
            raise ValueError(f"{address}/{name} is another file than the one that was expected. {error}") from error
    return cache.abspath


def _pooch(address: str) -> ModuleType:
    try:
        import pooch  # only those need it who name an address
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            f"The data are not here: fetching them from {address} needs the package pooch: pip install pooch."
        ) from error
    return pooch


def _not_here(what: str, source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"The data are not here: {what}. {source} {VARIABLE} names the folder, or an http(s) address of it."
    )
