"""`--device` puts every suite on another device, and skips them where there is none."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["pytester"]

SUITE = """
import pytest, torch

def test_anywhere():
    assert torch.zeros(2).device == torch.device("cpu")

@pytest.mark.cpu_only
def test_of_the_cpu():
    pass
"""


def test_tensors_are_made_on_the_device_that_was_asked_for(pytestconfig):
    asked_for = torch.device(pytestconfig.getoption("--device")).type
    assert torch.zeros(2).device.type == torch.tensor(1.0).device.type == asked_for
    drawn = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert drawn.device.type == asked_for


@pytest.fixture
def suite(pytester, pytestconfig, monkeypatch) -> pytest.Pytester:
    """A suite of its own, with this one's options."""
    pytester.makeconftest((pytestconfig.rootpath / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n    cpu_only: the test is about the CPU")
    pytester.makepyfile(SUITE)
    return pytester


@pytest.mark.cpu_only
@pytest.mark.engine_independent
class TestOfAnotherSuite:
    def test_on_the_cpu_everything_runs(self, suite):
        suite.runpytest_inprocess().assert_outcomes(passed=2)

    def test_without_the_device_all_are_skipped_for_one_reason(self, suite, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = suite.runpytest_inprocess("--device", "cuda", "-rs")
        result.assert_outcomes(skipped=1, deselected=1)
        result.stdout.fnmatch_lines(["SKIPPED * --device cuda: there is none"])

    def test_no_device_of_that_name(self, suite):
        result = suite.runpytest_inprocess("--device", "gpu")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["*--device gpu: *"])
