"""The table of methods: network, labels and test inputs to densities of observations there.

Gaussian processes are there twice: with the hyperparameters of the mode, and averaged over them. Names are what tables
and the option `--methods` say; `RECIPE` is what the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from torch import Tensor, nn

from . import fine_tuning, gaussian_processes, laplace_approximation
from .gaussian_processes import GaussianProcess
from .predictions import Prediction

RECIPE = "AdaptedGP"

Predict = Callable[[nn.Sequential, Tensor, Tensor, Tensor], Prediction]


class Method(NamedTuple):
    """:ivar serves: Whether what it needs is there in this environment."""

    predict: Predict  # network, x (n, d), y (n,), x_test (m, d)
    serves: Callable[[], bool] = lambda: True


def _recipe(network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor) -> Prediction:
    return gaussian_processes.observations(import_module("ntk_gp.adapted").AdaptedGP(x, y, network).fit(), x_test)


def _with_scratch(network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor) -> Prediction:
    """The recipe, and a Gaussian process without the network, averaged by their evidence."""
    package = import_module("ntk_gp")
    models = [package.AdaptedGP(x, y, network), gaussian_processes.from_scratch(network, x, y)]
    return gaussian_processes.observations(package.compare(models, seed=0), x_test)


def _at_mode(
    make: Callable[..., GaussianProcess],
    with_priors: bool,
    network: nn.Sequential,
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
) -> Prediction:
    return gaussian_processes.at_mode(make(network, x, y), x_test, with_priors)


def averaged(
    make: Callable[..., GaussianProcess], network: nn.Sequential, x: Tensor, y: Tensor, x_test: Tensor
) -> Prediction:
    return gaussian_processes.averaged(make(network, x, y), x_test)


def _has(module: str) -> bool:
    return find_spec(module) is not None


_GAUSSIAN_PROCESSES: dict[str, Callable[..., GaussianProcess]] = {
    "last layer": gaussian_processes.last_layer,
    "NTK": gaussian_processes.ntk,
    "NTK + Matérn": gaussian_processes.ntk_and_matern,
    "Matérn": gaussian_processes.matern,
    "Matérn, inputs + features": gaussian_processes.matern_and_features,
    "RBF on features": gaussian_processes.rbf_on_features,
    "gain + RBF": gaussian_processes.rbf_with_gain,
    "NTK, untrained": gaussian_processes.untrained_ntk,
    "RBF-ARD, no network": gaussian_processes.from_scratch,
}

METHODS: dict[str, Method] = {
    RECIPE: Method(_recipe, partial(_has, "ntk_gp.adapted")),
    f"{RECIPE} and RBF-ARD, by evidence": Method(_with_scratch, partial(_has, "ntk_gp.adapted")),
    "unadapted": Method(fine_tuning.unadapted),
    "fine-tuning": Method(fine_tuning.all_layers),
    "fine-tuning, last layer": Method(fine_tuning.last_layer),
    "last layer, evidence": Method(partial(_at_mode, gaussian_processes.last_layer, False)),
    **{name: Method(partial(_at_mode, make, True)) for name, make in _GAUSSIAN_PROCESSES.items()},
    **{f"{name}, averaged": Method(partial(averaged, make)) for name, make in _GAUSSIAN_PROCESSES.items()},
    "laplace-torch, last layer": Method(laplace_approximation.last_layer, partial(_has, "laplace")),
    "laplace-torch, all layers": Method(laplace_approximation.all_layers, partial(_has, "laplace")),
}
PEERS = tuple(name for name in METHODS if name.startswith("laplace-torch"))  # of the peers' environment


def available() -> list[str]:
    """The methods that can run here."""
    return [name for name, method in METHODS.items() if method.serves()]
