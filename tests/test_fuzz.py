"""Random networks out of every block there is, each in every operation; minutes of them: `make fuzz`."""

import pytest
import torch
from torch import Tensor

from tests.fuzz.blocks import BLOCKS
from tests.fuzz.check import Reference, failures
from tests.fuzz.recipe import Recipe, Step, recipe

SEEDS = range(len(BLOCKS))  # each block is in one of them, at least


def test_every_block_has_a_seed():
    assert {step.block for seed in SEEDS for step in recipe(seed).steps} == set(BLOCKS)


@pytest.mark.names_engine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_every_operation(seed):
    candidate = recipe(seed)
    again = f"python -m tests.fuzz --seed {seed} --count 1"
    reference = Reference(candidate)
    wrong = [
        f"{operation}, {engine}: {message}"
        for engine in ("structured", "autodiff")[: 1 if seed % 3 else 2]
        for operation, message in failures(candidate, reference, engine)
    ]
    assert not wrong, "\n".join([again, str(candidate), *wrong])


OF_THE_KERNEL = {
    "gram", "gram_with_one_row", "gram_of_the_first_rows", "diagonal", "kernel_product", "posterior_covariance",
    "posterior_variances", "posterior_mean", "adapted", "slope",
}  # fmt: skip
OF_THE_JACOBIAN = {"rows", "jacobian_vector_product", "vector_jacobian_product", "drawn_functions"}
OF_THE_MEAN = {"network_mean", "posterior_mean", "adapted", "drawn_functions", "slope"}


class Wrong(Reference):
    """Something that expected values are made of is off by a part in a thousand."""

    def __init__(self, candidate: Recipe, values: float = 1.0, jacobian: float = 1.0, variances: float = 1.0):
        self.factors = (values, jacobian)
        super().__init__(candidate)
        self.variances = variances * self.variances
        self.kernel = variances * self.kernel
        self.mean, self.covariance = self.posterior(self.values, self.jacobian)

    def linearized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, jacobian = super().linearized(x)
        return self.factors[0] * values, self.factors[1] * jacobian


@pytest.mark.parametrize(
    "wrong, expected",
    [
        (None, set()),
        ("values", OF_THE_MEAN),
        ("jacobian", OF_THE_KERNEL | OF_THE_JACOBIAN),
        ("variances", OF_THE_KERNEL),
    ],
)
def test_no_operation_is_blind(wrong, expected):
    step = Step("gate", "residual", tanh=True, seed=3)
    candidate = Recipe(
        seed=0, steps=(step,), outputs=2, output="all", selection="all", inputs="late", training=12, batch=False,
        dtype=torch.float64, groups="layer", mode="eval",
    )  # fmt: skip
    reference = Wrong(candidate, **({} if wrong is None else {wrong: 1.001}))
    assert {name for name, _ in failures(candidate, reference)} == expected
