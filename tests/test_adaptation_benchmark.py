"""The benchmark of adaptation: a small cell of each kind, splits, closed forms, and what a run that was cut leaves."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from torch import Tensor

from benchmarks.adaptation import fine_tuning, gaussian_processes, methods, predictions, real, run, synthetic, training
from benchmarks.adaptation.tasks import Cell, Task

report = pytest.importorskip("benchmarks.adaptation.report", reason="benchmarks draw with matplotlib")

pytestmark = [pytest.mark.engine_independent, pytest.mark.cpu_only, pytest.mark.costly]

CHEAP = ("unadapted", "Matérn")


@pytest.fixture(autouse=True)
def build(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(training, "BUILD", tmp_path / "build")
    return tmp_path / "build"


@pytest.fixture
def data(tmp_path) -> Path:
    """Small files of the form of the real ones."""
    draw = np.random.default_rng(0)
    folder = tmp_path / "data"
    lon, lat, years = draw.uniform(3, 14, 1500), draw.uniform(4, 14, 1500), np.arange(2000, 2016)
    rate = 0.5 + 0.3 * np.sin(lon)[:, None] * np.cos(lat)[:, None] - 0.01 * (years - 2000)
    for name, columns, rows in (("protein", 9, 700), ("kin40k", 8, 700), ("yacht", 6, 308)):
        (folder / "uci" / name).mkdir(parents=True)
        x = draw.normal(size=(rows, columns))
        np.savetxt(folder / "uci" / name / "data.csv.gz", np.c_[x, np.sin(x[:, 0]) - 2 * x[:, 2]], delimiter=",")
    np.savez(folder / "map_pfpr_nigeria_2000_2015.npz", lon=lon, lat=lat, years=years, pfpr=rate)
    weather = draw.normal(size=(103, 12, 290))
    weather[20:60, :, 280:] = np.nan
    place = {name: draw.normal(size=290) for name in ("lon", "lat", "elev")}
    np.savez(
        folder / "co_monthly_precip_1895_1997.npz", ppt=weather, tmax=weather, years=np.arange(1895, 1998), **place
    )
    return folder


def small_task(n: int = 12) -> Task:
    network = training.make_network(3, seed=0)
    x, x_test = torch.randn(n, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    y, y_test = (each.sin().sum(-1) + 0.1 * torch.randn(len(each), dtype=torch.float64) for each in (x, x_test))
    return Task(network, 0.0, x, y, x_test, y_test, y_test)


@pytest.fixture
def task(request) -> Task:
    torch.manual_seed(0)
    return small_task()


@pytest.mark.parametrize("name", ["friedman", "unrelated", "real"])
def test_a_quick_run_of_each_kind_fills_the_file_and_the_table(name, data, tmp_path):
    plan, file = run.Plan(name, data, quick=True), tmp_path / f"{name}.jsonl"
    run.run(plan, [0], CHEAP, processes=1, file=file)
    lines = run.read(file)
    assert {line["method"] for line in lines} == set(CHEAP) and not any("error" in line for line in lines)
    assert torch.get_default_dtype() == torch.float32
    report.write(tmp_path, tmp_path / "table", quick=True)
    assert "Matérn" in (tmp_path / "table" / "adaptation.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.thorough if name.endswith(", averaged") else ())
        for name in methods.available()
        if name not in methods.PEERS
    ],
)
def test_every_method_predicts_densities(name, task):
    before = copy.deepcopy(task.network.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an average from few draws is rough, and says so
        line = run.evaluate(task, Cell("small", 0, 10), name)
    assert "error" not in line
    assert line["nlpd"] < 5 and 0 <= line["coverage"] <= 1 and line["mse"] < 5
    assert all(torch.equal(before[key], value) for key, value in task.network.state_dict().items())


def test_what_is_there_is_not_computed_again(data, tmp_path, monkeypatch):
    plan, file = run.Plan("friedman", None, quick=True), tmp_path / "friedman.jsonl"
    run.run(plan, [0], ["unadapted"], 1, file)
    (first,) = run.read(file)
    file.write_text(file.read_text() + '{"task": "friedman 0", "se')  # a run that was cut
    calls = []
    evaluate = run.evaluate
    monkeypatch.setattr(run, "evaluate", lambda *arguments: calls.append(arguments[2]) or evaluate(*arguments))
    run.run(plan, [0], CHEAP, 1, file)
    assert calls == ["Matérn"]
    assert run.read(file)[0] == first
    assert [line["method"] for line in run.read(file)] == list(CHEAP)
    run.run(plan, [0], ["unadapted"], 1, file, again=True)
    assert calls == ["Matérn", "unadapted"]
    assert len(run.read(file)) == 2


def test_a_method_that_failed_is_tried_again(tmp_path, monkeypatch, capsys):
    plan, file = run.Plan("friedman", None, quick=True), tmp_path / "friedman.jsonl"

    def fails(*_: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, "unadapted", methods.Method(fails))
        run.run(plan, [0], ["unadapted"], 1, file)
    assert run.read(file)[0]["error"] == "RuntimeError: no"
    run.run(plan, [0], ["unadapted"], 1, file)
    assert "error" not in run.read(file)[0]


def test_networks_are_trained_once():
    sources = []

    def source() -> tuple[Tensor, Tensor]:
        sources.append(0)
        x = torch.linspace(-3, 5, 200, dtype=torch.float64).unsqueeze(-1)
        return x, 7 + 2 * x.squeeze(-1)

    first, second = (training.trained("line", 1, source, steps=300) for _ in range(2))
    assert sources == [0]
    assert first.held_out == second.held_out < 0.05
    x = torch.randn(5, 1, dtype=torch.float64)
    assert torch.equal(first.network(x), second.network(x))
    torch.testing.assert_close(first.outputs(7 + 2 * x.squeeze(-1)), first.inputs(x).squeeze(-1))


# Splits.


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"(?s)no uci/yacht/data.csv.gz in .*NTK_GP_DATA names the folder"):
        real.Real(tmp_path)


def test_every_split_serves_every_cell(data):
    experiment = real.Real(data)
    for cell in experiment.cells([0], quick=False):
        task = experiment.task(cell.task, cell.seed, quick=True)
        assert len(task.x) >= cell.n and real.LEAST_TEST <= len(task.y_test) <= real.MOST_TEST
        together = torch.cat([task.x, task.x_test])
        assert len(together.unique(dim=0)) == len(together)  # no label is a test point


def test_the_hidden_input_divides_source_and_target(data):
    source, target = real.hidden("kin40k", (10,)).read(data)
    rows = np.loadtxt(data / "uci" / "kin40k" / "data.csv.gz", delimiter=",")
    assert source.x.shape[1] == target.x.shape[1] == 7
    hidden = {tuple(np.delete(row[:-1], 2)): row[2] for row in rows}  # the third input weighs most there
    assert max(hidden[tuple(x)] for x in source.x) <= min(hidden[tuple(x)] for x in target.x)


def test_a_shift_divides_along_the_first_principal_component(data):
    source, target = real.shift("yacht", (10,)).read(data)
    x = np.concatenate([source.x, target.x])
    values, vectors = np.linalg.eigh(np.corrcoef(x.T))
    component = ((x - x.mean(0)) / x.std(0)) @ vectors[:, values.argmax()]
    first, second = component[: len(source.x)], component[len(source.x) :]
    assert first.max() < second.min() or second.max() < first.min()
    assert abs(len(source.y) - len(target.y)) <= 1


def test_years_and_missing_stations(data):
    source, target = real.colorado("tmax", (0,), (1950, 1980), 1988, (10,)).read(data)
    with np.load(data / "co_monthly_precip_1895_1997.npz") as file:
        values, years = file["tmax"][:, 0], file["years"]
    assert np.array_equal(target.y, values[years == 1988][0])
    expected = values[(years >= 1950) & (years <= 1980)]
    assert len(source.y) == np.isfinite(expected).sum() == 31 * 290 - 5 * 10  # ten stations were missing up to 1954
    assert np.isclose(source.y.sum(), np.nansum(expected))


def test_ranks_of_equal_values_are_their_average():
    assert real._ranks(np.array([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2.0, 3.5, 1.0]


@pytest.mark.parametrize("experiment", [synthetic.Friedman(), synthetic.Unrelated()])
def test_targets_are_drawn_anew_and_the_same_again(experiment):
    names = list(dict.fromkeys(cell.task for cell in experiment.cells([0], quick=False)))
    tasks = [experiment.task(name, 0, quick=True) for name in names]
    again = experiment.task(names[0], 0, quick=True)
    assert torch.equal(tasks[0].y, again.y) and torch.equal(tasks[0].x_test, again.x_test)
    assert len({float(task.y[0]) for task in tasks}) == len(tasks)
    assert all(len(task.x) == max(experiment.labels) for task in tasks)


# Methods.


def test_the_last_layer_is_bayesian_linear_regression(task):
    """Against the posterior over the last layer's weights, in weight space."""
    x, y, network = task.x, task.y, task.network
    model = gaussian_processes.last_layer(network, x, y)
    prediction = gaussian_processes.at_mode(model, task.x_test)
    with torch.no_grad():
        features, new = (
            torch.cat([network[:-1](z), torch.ones(len(z), 1, dtype=z.dtype)], -1) for z in (x, task.x_test)
        )
        scale, noise = model.covar_module.outputscale, model.likelihood.noise
        precision = features.mT @ features / noise + torch.eye(features.shape[-1], dtype=x.dtype) / scale
        weights = torch.linalg.solve(precision, features.mT @ (y - network(x).squeeze(-1)) / noise)
        mean = network(task.x_test).squeeze(-1) + new @ weights
        variance = (new * torch.linalg.solve(precision, new.mT).mT).sum(-1) + noise
    torch.testing.assert_close(prediction.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prediction.variance, variance, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [gaussian_processes.matern_and_features, gaussian_processes.rbf_with_gain])
def test_fitting_ends_at_a_mode_of_the_density_of_the_logarithms(make, task):
    """The density is written out here, with noise and kernel matrix dense."""
    model = gaussian_processes.fit(make(task.network, task.x, task.y))
    fitted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        start = make(task.network, task.x, task.y)
        medians = [p.detach().clone() for p in start.parameters() if p.requires_grad]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    widths = [1.0 if "lengthscale" in name else 1.5 for name in names]

    noisy = model.covar_module(task.x).to_dense() + model.likelihood.noise * torch.eye(len(task.x), dtype=torch.float64)
    residual = task.y - model.mean_module(task.x)
    density = torch.distributions.MultivariateNormal(torch.zeros_like(residual), noisy).log_prob(residual)
    for parameter, median, width in zip(fitted, medians, widths, strict=True):
        density = density - ((parameter - median) / width).square().sum() / 2
    gradients = torch.autograd.grad(density, fitted)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-3
    assert any(float((parameter - median).abs().max()) > 0.1 for parameter, median in zip(fitted, medians, strict=True))


def test_terms_start_at_their_shares_of_what_the_mean_leaves(task):
    model = gaussian_processes.rbf_with_gain(task.network, task.x, task.y)
    with torch.no_grad():
        unexplained = (task.y - task.network(task.x).squeeze(-1)).square().mean()
        shares = [
            float(kernel(task.x).to_dense().diagonal().mean() / unexplained) for kernel in model.covar_module.kernels
        ]
        noise = float(model.likelihood.noise / unexplained)
    assert shares == pytest.approx([0.3, 0.3, 1.0], rel=1e-9)
    assert noise == pytest.approx(0.1, rel=1e-9)


def test_densities_are_those_of_single_points():
    class Model:
        def predict(self, x: Tensor) -> MultivariateNormal:
            covariance = torch.tensor([[2.0, 1.5], [1.5, 3.0]], dtype=torch.float64)
            return MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)

    y = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = [-0.5 * np.log(2 * np.pi * v) - 0.5 * z**2 / v for v, z in ((2.0, 1.0), (3.0, 2.0))]
    assert gaussian_processes.observations(Model(), y).log_density(y).tolist() == pytest.approx(expected)


def test_fine_tuning_the_last_layer_leaves_the_others(task):
    tuned = fine_tuning.fine_tuned(task.network, task.x, task.y, last_layer_only=True)
    assert torch.equal(tuned[0].weight, task.network[0].weight)
    assert not torch.equal(tuned[-1].weight, task.network[-1].weight)


# Scores and tables.


def test_scores_are_in_units_of_the_target():
    y = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    prediction = predictions.Gaussian(y + 1, torch.full_like(y, 4.0))
    score, scaled = (
        predictions.scores(predictions.Gaussian(c * prediction.mean, c**2 * prediction.variance), c * y, c * y)
        for c in (1.0, 10.0)
    )
    assert score == pytest.approx(scaled)
    sd = 5**0.5
    expected = 0.5 * np.log(2 * np.pi * (2 / sd) ** 2) + 0.5 * (1 / 2) ** 2
    assert score == pytest.approx({"nlpd": expected, "mse": 0.2, "coverage": 1.0})


def test_a_prediction_that_is_not_finite_is_refused():
    y = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected a finite variance"):
        predictions.scores(predictions.Gaussian(y, y / 0), y, y)


def line(task: str, seed: int, method: str, nlpd: float, mse: float = 1.0, n: int = 10) -> dict:
    scores = {"nlpd": nlpd, "mse": mse, "coverage": 0.9, "seconds": 1.0}
    return {"task": task, "seed": seed, "n": n, "method": method, **scores}


def test_regrets_and_differences():
    lines = [
        *(line("a", 0, name, nlpd, mse) for name, nlpd, mse in ((methods.RECIPE, 1.0, 1.0), ("Matérn", 2.0, 4.0))),
        *(line("a", 1, name, nlpd, mse) for name, nlpd, mse in ((methods.RECIPE, 1.5, 1.0), ("Matérn", 1.5, 1.0))),
        *(line("b", 0, name, nlpd, mse) for name, nlpd, mse in ((methods.RECIPE, 3.0, 4.0), ("Matérn", 1.0, 1.0))),
        {"task": "b", "seed": 1, "n": 10, "method": "Matérn", "error": "RuntimeError: no"},
    ]
    rows = {(row["method"], row["n"]): row for row in report.summary("real", lines)}
    recipe, other = rows[methods.RECIPE, 10], rows["Matérn", 10]
    assert (recipe["regret"], recipe["worst"]) == (pytest.approx(2 / 3), 2.0)
    assert (other["regret"], other["worst"], other["failed"]) == (pytest.approx(1 / 3), 1.0, 1)
    # By task: -1/2 and 2.
    assert (other["difference"], other["difference_error"]) == (pytest.approx(0.75), pytest.approx(1.25))
    assert (other["wins"], other["ties"], other["losses"]) == (1, 1, 1)
    assert other["rmse_ratio"] == pytest.approx(1.0)
    assert rows["Matérn", 0]["regret"] == other["regret"]
    text = report.markdown({"real": lines}, list(rows.values()))
    assert "| Matérn (1 failed) | 0.333 | 1.00 | +0.750 ± 1.250 | 1/1/1 | 1.000 |" in text
    assert "| a | 10 | AdaptedGP | 1.250 | 0.000 | 1 |" in text


def test_a_line_is_what_json_can_hold(task):
    assert json.loads(json.dumps(run.evaluate(task, Cell("small", 0, 10), "unadapted")))["nlpd"]
