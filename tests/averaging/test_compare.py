"""Models compared by their evidence."""

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from ntk_gp import averaged, compare
from ntk_gp.priors import scale_to_data
from tests.averaging.models import PlainGP, data, rbf_model

pytestmark = [pytest.mark.engine_independent, pytest.mark.costly]


def models() -> dict[str, PlainGP]:
    made = {"rbf": RBFKernel(), "matern<": MaternKernel(0.5)}
    made = {name: PlainGP(*data(), ScaleKernel(kernel)) for name, kernel in made.items()}
    for model in made.values():
        scale_to_data(model)
    return made


def test_weights_and_predictions():
    averages = {name: averaged(model, draws=8, seed=0) for name, model in models().items()}
    comparison = compare(averages)
    odds = comparison[0].weight / comparison[1].weight
    evidence = [each.log_evidence for each in averages.values()]
    assert odds == pytest.approx(torch.tensor(evidence[0] - evidence[1]).exp().item(), rel=1e-5)
    assert sum(row.weight for row in comparison) == pytest.approx(1.0)
    z = torch.rand(3, 1, dtype=torch.float64)
    expected = sum(row.weight * averages[row.name].predict(z).mean for row in comparison)
    torch.testing.assert_close(comparison.predict(z).mean, expected, rtol=1e-10, atol=1e-10)
    value = torch.zeros(3, dtype=torch.float64)
    density = sum(row.weight * averages[row.name](z).log_prob(value).exp() for row in comparison)
    torch.testing.assert_close(comparison(z).log_prob(value).exp(), density, rtol=1e-10, atol=1e-10)


def test_table():
    comparison = compare(models(), draws=8, seed=0)
    lines = str(comparison).splitlines()
    assert len(comparison) == 2 and len(lines) == 3
    assert lines[0].split() == ["model", "log", "evidence", "weight", "effective", "draws"]
    assert lines[1].split()[0] == "rbf" and f"{comparison[0].log_evidence:.2f}" in lines[1]
    assert len({len(line) for line in lines}) == 1
    assert "matern&lt;" in comparison._repr_html_()


def test_lists_are_numbered():
    assert [row.name for row in compare(list(models().values()), draws=4, seed=0)] == ["0", "1"]


def test_refusals():
    with pytest.raises(ValueError, match="got none"):
        compare([])
    without = PlainGP(*data(), ScaleKernel(RBFKernel()))
    with pytest.raises(ValueError, match=r"'a' has no evidence: .*no prior"):
        compare({"a": averaged(without, draws=32, seed=0)})
    with pytest.raises(ValueError, match="other training targets"):
        compare([averaged(rbf_model(n=n), draws=4, seed=0) for n in (10, 12)])
