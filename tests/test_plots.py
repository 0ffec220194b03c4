"""What plots draw: the numbers, not the pixels."""

import builtins
import math

import gpytorch
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from ntk_gp import AdaptedGP, NTKKernel, averaged, plots, similarity

matplotlib = pytest.importorskip("matplotlib", reason="the extra 'plots' is not installed")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

pytestmark = pytest.mark.engine_independent


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def gp():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.rand(6, 1).double()
    return AdaptedGP(x, (3 * x).sin().squeeze(-1), network, terms=["gain", "tangent"]).eval()


def axes():
    return plt.subplots()[1]


def lines(ax):
    return {line.get_label(): torch.tensor(line.get_xydata(), dtype=torch.float64) for line in ax.lines}


def close(one, other):
    torch.testing.assert_close(torch.as_tensor(one, dtype=torch.float64), other.detach().double())


class TestPosterior:
    def test_of_a_mixture(self, gp):
        x = torch.tensor([0.5, -0.2, 1.3]).double()
        ours = axes()
        assert plots.posterior(gp, x, ours, probability=0.8) is ours
        x = x.sort().values.unsqueeze(-1)
        prediction = gp.predict(x)
        drawn = lines(ours)
        close(drawn["mean"], torch.stack([x.squeeze(-1), prediction.mean], -1))
        close(drawn["network"][:, 1], gp.mean_module(x))
        close(drawn["data"], torch.cat([gp.train_inputs[0], gp.train_targets.unsqueeze(-1)], -1))
        (band,) = ours.collections
        corners = torch.from_numpy(band.get_paths()[0].vertices)
        for p in (0.1, 0.9):
            for place, value in zip(x, prediction.quantile(p), strict=True):
                corner = torch.stack([place.squeeze(), value])
                assert float((corners - corner).abs().sum(-1).min()) < 1e-12
        assert {text.get_text() for text in ours.get_legend().get_texts()} == {"80 %", "mean", "network", "data"}

    def test_of_an_exact_gp_and_of_averages(self):
        class GP(gpytorch.models.ExactGP):
            def __init__(self, x, y):
                super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
                self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), gpytorch.kernels.RBFKernel()

            def forward(self, x):
                return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

        model = GP(torch.rand(5, 1).double(), torch.rand(5).double()).double()
        x = torch.linspace(0, 1, 4).double()
        with pytest.raises(ValueError, match=r"train mode.*model\.eval\(\)"):
            plots.posterior(model, x)
        assert not plt.get_fignums()
        ax = plots.posterior(model.eval(), x)
        assert set(lines(ax)) == {"mean", "data"}
        observed = model.likelihood(model(x))
        corners = torch.from_numpy(ax.collections[0].get_paths()[0].vertices)
        high = observed.mean + 1.959963984540054 * observed.stddev
        assert float((corners[:, 1] - high.max().detach()).abs().min()) < 1e-10
        assert set(lines(plots.posterior(averaged(model, 2, seed=0), x))) == {"mean"}

    def test_refuses(self, gp):
        with pytest.raises(ValueError, match=r"one input.*plots\.maps"):
            plots.posterior(gp, torch.rand(3, 2))
        with pytest.raises(TypeError, match=r"model that predicts.*Linear"):
            plots.posterior(nn.Linear(1, 1), torch.rand(3))


class TestMaps:
    def test_draws_three_panels(self):
        x, truth = torch.rand(5, 3), torch.rand(5)
        prediction = Normal(torch.rand(5) + 1, torch.rand(5) + 0.1)
        panels = plots.maps(x, truth, prediction)
        values = truth, prediction.mean, prediction.stddev
        for panel, drawn in zip(panels, values, strict=True):
            (points,) = panel.collections
            close(points.get_offsets().data, x[:, :2])
            close(points.get_array().data, drawn)
        limits = [panel.collections[0].get_clim() for panel in panels]
        assert limits[0] == limits[1] == pytest.approx((float(truth.min()), float(prediction.mean.max())))
        assert limits[2] == pytest.approx((float(prediction.stddev.min()), float(prediction.stddev.max())))
        ours = plt.subplots(1, 3)[1]
        assert plots.maps(x, truth, prediction, ours) is ours

    def test_refuses(self):
        prediction = Normal(torch.zeros(5), torch.ones(5))
        with pytest.raises(ValueError, match=r"\(n, 2\), longitude and latitude, got \(5, 1\)"):
            plots.maps(torch.rand(5, 1), torch.rand(5), prediction)
        with pytest.raises(ValueError, match=r"truth of shape \(5,\)"):
            plots.maps(torch.rand(5, 2), torch.rand(5, 1), prediction)
        with pytest.raises(ValueError, match="mean of shape"):
            plots.maps(torch.rand(4, 2), torch.rand(4), prediction)
        with pytest.raises(ValueError, match="three axes"):
            plots.maps(torch.rand(5, 2), torch.rand(5), prediction, [axes()])


class TestCalibration:
    def test_counts_what_central_intervals_hold(self, gp):
        x = torch.rand(40, 1).double()
        y = torch.randn(40).double() / 3
        prediction = gp.predict(x)
        ours = axes()
        assert plots.calibration(prediction, y, ours, label="gp") is ours
        levels, parts = lines(ours)["gp"].T
        for p in (0.1, 0.5, 0.95):
            low, high = prediction.confidence_region(p)
            expected = ((low <= y) & (y <= high)).double().mean()
            assert float(parts[(levels <= p).nonzero()[-1]]) == pytest.approx(expected.item())
        assert parts[0] == 0 and parts[-1] == 1 and (levels[0], levels[-1]) == (0, 1)

    def test_of_normal_distributions(self):
        y = torch.tensor([0.0, 1.0, -3.0])
        joint = gpytorch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
        drawn = lines(plots.calibration(joint, y, label="joint"))["joint"]
        expected = (torch.tensor([0.0, 0.0, 1.0, 3.0]).double() / math.sqrt(2)).erf()
        close(drawn[:4, 0], expected)
        alone = lines(plots.calibration(Normal(torch.zeros(3), torch.ones(3)), y, label="alone"))["alone"]
        close(drawn, alone)

    def test_a_second_curve_in_the_same_axes(self):
        prediction = Normal(torch.zeros(4), torch.ones(4))
        ax = plots.calibration(prediction, torch.randn(4), label="one")
        plots.calibration(prediction, torch.randn(4), ax, label="other")
        assert len(ax.lines) == 3 and len(ax.collections) == 1
        (band,) = ax.collections
        corners = torch.from_numpy(band.get_paths()[0].vertices)
        middle = corners[(corners[:, 0] - 0.5).abs() < 1e-9]
        assert float(middle[:, 1].max()) == pytest.approx(0.5 + 1.96 * 0.25)

    def test_refuses(self):
        prediction = Normal(torch.zeros(4), torch.ones(4))
        with pytest.raises(ValueError, match=r"\(4,\), got \(4, 1\)"):
            plots.calibration(prediction, torch.randn(4, 1))
        with pytest.raises(ValueError, match="NaN"):
            plots.calibration(Normal(torch.full((4,), math.nan), 1.0, validate_args=False), torch.randn(4))


class TestReliability:
    def test_of_two_classes(self):
        said = torch.tensor([0.05, 0.09, 0.15, 0.62, 0.68, 1.0])
        true = torch.tensor([0, 1, 0, 1, 0, 1])
        ours = axes()
        assert plots.reliability(said, true, ours) is ours
        (label,) = (name for name in lines(ours) if name.startswith("ECE"))
        expected = torch.tensor([[0.07, 0.5], [0.15, 0.0], [0.65, 0.5], [1.0, 1.0]]).double()
        torch.testing.assert_close(lines(ours)[label], expected, rtol=0.0, atol=1e-7)
        error = (2 * 0.43 + 0.15 + 2 * 0.15) / 6
        assert label == f"ECE {error:.3f}"

    def test_of_many_classes_against_a_loop(self):
        torch.manual_seed(0)
        probabilities = torch.randn(200, 4).softmax(-1)
        true = torch.randint(4, (200,))
        ax = plots.reliability(probabilities, true, bins=7)
        (label,) = (name for name in lines(ax) if name.startswith("ECE"))
        error, points = 0.0, []
        for k in range(7):
            rows = [i for i in range(200) if k / 7 < float(probabilities[i].max()) <= (k + 1) / 7]
            if rows:
                confidence = sum(float(probabilities[i].max()) for i in rows) / len(rows)
                accuracy = sum(int(probabilities[i].argmax() == true[i]) for i in rows) / len(rows)
                error += abs(confidence - accuracy) * len(rows) / 200
                points.append([confidence, accuracy])
        torch.testing.assert_close(lines(ax)[label], torch.tensor(points).double(), rtol=1e-6, atol=1e-6)
        assert label == f"ECE {error:.3f}"

    @pytest.mark.parametrize(
        ("probabilities", "labels", "message"),
        [
            (torch.rand(3), torch.zeros(4).long(), "probabilities"),
            (torch.tensor([0.2, 1.5]), torch.tensor([0, 1]), "between 0 and 1.*softmax"),
            (torch.tensor([0.2, math.nan]), torch.tensor([0, 1]), "between 0 and 1"),
            (torch.rand(2, 3) / 9, torch.tensor([0, 1]), "add up to one"),
            (torch.tensor([0.2, 0.5]), torch.tensor([0.0, 1.0]), "integer labels from 0 to 1"),
            (torch.tensor([0.2, 0.5]), torch.tensor([0, 2]), "integer labels from 0 to 1"),
        ],
    )
    def test_refuses(self, probabilities, labels, message):
        with pytest.raises(ValueError, match=message):
            plots.reliability(probabilities, labels)


class TestLayers:
    def test_bars_with_errors(self):
        network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        found = similarity.of_tasks(network, torch.randn(8, 2), torch.randn(8, 2) + 1, rank=2, resamples=4)
        ours = axes()
        assert plots.layers(found, ours) is ours
        heights = [bar.get_height() for bar in ours.patches]
        assert heights == [row.fisher.value for row in found] + [row.overlap.value for row in found]
        spans = [segment for bars in ours.collections for segment in bars.get_segments()]
        expected = [getattr(row, name) for name in ("fisher", "overlap") for row in found]
        for span, each in zip(spans, expected, strict=True):
            assert span[:, 1] == pytest.approx([each.value - each.error, each.value + each.error])
        assert [text.get_text() for text in ours.get_xticklabels()] == ["whole", "0", "2"]

    def test_of_targets_without_errors(self):
        network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        found = similarity.of_targets(network, torch.randn(8, 2), torch.randn(8), resamples=0)
        ax = plots.layers(found)
        assert [bar.get_height() for bar in ax.patches] == [row.alignment.value for row in found]


class TestSpectrum:
    def test_eigenvalues_of_a_lazy_matrix(self):
        network = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1)).double()
        x = torch.randn(12, 2).double()
        matrix = NTKKernel(network)(x)
        ours = axes()
        assert plots.spectrum(matrix, ours, noise=0.1, label="K") is ours
        expected = torch.linalg.eigvalsh(matrix.to_dense()).flip(-1)
        close(lines(ours)["K"], torch.stack([torch.arange(1, 13).double(), expected], -1))
        assert lines(ours)["noise"][:, 1].tolist() == [0.1, 0.1]
        assert (ours.get_xscale(), ours.get_yscale()) == ("log", "log")

    def test_leaves_out_what_is_not_positive(self):
        ax = plots.spectrum(torch.diag(torch.tensor([2.0, 0.0, 1.0])), label="K")
        close(lines(ax)["K"], torch.tensor([[1.0, 2.0], [2.0, 1.0]]))

    def test_refuses(self):
        with pytest.raises(ValueError, match=r"\(n, n\), got \(3, 4\)"):
            plots.spectrum(torch.rand(3, 4))
        with pytest.raises(ValueError, match="symmetric"):
            plots.spectrum(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        with pytest.raises(ValueError, match="without NaN"):
            plots.spectrum(torch.full((2, 2), math.nan))


def test_without_matplotlib(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'ntk_gp\[plots\]'"):
        plots.spectrum(torch.eye(2))
