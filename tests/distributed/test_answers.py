"""What each solver with a factor over ranks gives, against dense algebra in one process."""

from functools import partial

import pytest

from tests.adapted import LARGE, SMALL
from tests.distributed import problems
from tests.distributed.answers import ALONE, check, of_models

pytestmark = [pytest.mark.engine_independent, pytest.mark.every_case, pytest.mark.parametrize("name", ALONE)]


# The second has more parameters than rows, the third batches of inputs, the last of everything else.
@pytest.mark.parametrize(
    ("n", "batches", "outputs"),
    [(61, (1, 1, 1), 1), (12, (1, 1, 1), 2), (26, (3, 1, 1), 1), (26, (1, 3, 3), 1)],
)
def test_two_ranks(two, name, n, batches, outputs):
    check(two, name, n, batches, outputs, 0.1)


def test_four_ranks(four, name):
    check(four, name, 45, (1, 1, 1), 1, 0.1)


@pytest.mark.parametrize(
    "make",
    [
        partial(problems.model_of, "layers", LARGE),
        partial(problems.model_of, "gain", SMALL + 1),
        problems.batched,
        partial(problems.multitask, last_layer=True),
    ],
)
def test_models(two, name, make):
    """Training and predictions as users have them: known features beside J, batches, outputs with and without
    parameters in common."""
    assert two.run(of_models, name, make) == [[], []]
