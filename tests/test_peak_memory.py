"""With less memory than the factors take, the same numbers, and no more than that memory: by the kernel's own count."""

import os

import pytest
import torch

import ntk_gp
from ntk_gp.jacobian.structured import StructuredEngine
from ntk_gp.jacobian.terms import CombinedTerm
from tests.jacobian.explicit import variances_for
from tests.networks import CASES as NETWORKS
from tests.peak_memory import measure_afresh

pytestmark = [pytest.mark.cpu_only, pytest.mark.every_case]

BUDGET = 40 << 20  # bytes

MEASURED = {
    "MLP": ("Gram", "K v", "K V, 100", "iterated mean"),
    "narrow MLP, 3 outputs": ("J u", "Jᵀ V, 20", "diagonal", "posterior variance"),
    "CNN": ("Gram", "J U, 20", "posterior mean"),
    "transformer": ("Gram", "Jᵀ v", "posterior mean"),
}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel counts no peak here")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.thorough if case in ("narrow MLP, 3 outputs", "CNN") else ())
        for case in MEASURED
    ],
)
def test_peak(case):
    for operation, measured in measure_afresh(case, MEASURED[case], BUDGET).items():
        assert measured["chunked"], operation
        assert measured["peak"] <= 1, operation
        assert measured["error"] <= 1e-5, operation  # float32


@pytest.mark.parametrize("name", ["tied_autoencoder"])
def test_unlike_uses_of_a_parameter(name):
    """Their dense rows are formed for some points at a time, and are the same."""
    case = next(case for case in NETWORKS if case.name == name)
    network = case.frozen()
    jacobian = StructuredEngine(network).linearize(case.inputs(20))
    (term,) = [term for term in jacobian.terms if isinstance(term, CombinedTerm)]
    weights = variances_for(network, 1)
    expected, diagonal = list(term.columns(7, weights)), term.cross_diagonal(term, weights)
    with ntk_gp.settings.memory_budget(16 * 8 * 6 * jacobian.function.num_parameters):
        assert len(list(term._slices())) > 2
        for (columns, scale), (block, variances) in zip(term.columns(7, weights), expected, strict=True):
            assert torch.equal(columns, block)
            assert torch.equal(scale, variances)
            assert columns.untyped_storage().nbytes() == columns.nbytes  # no view of whole rows
        torch.testing.assert_close(term.cross_diagonal(term, weights), diagonal, rtol=1e-14, atol=0)
