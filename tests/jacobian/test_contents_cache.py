"""What is kept for the inputs seen last counts against the memory budget."""

import pytest
import torch

from ntk_gp.jacobian.contents_cache import ContentsCache
from ntk_gp.jacobian.linearization import Linearization
from ntk_gp.network import FrozenNetwork


def test_a_result_that_does_not_say_what_it_holds_is_refused_and_not_kept():
    cache, x = ContentsCache(), torch.ones(3)
    for _ in range(2):  # nor does it stay there as a promise that others would wait for
        with pytest.raises(TypeError, match=r"A list, kept as 'rows', .*nbytes.*memory_budget"):
            cache.get("rows", lambda: 0, (x,), lambda x: [x])
    assert torch.equal(cache.get("rows", lambda: 0, (x,), torch.square), x)


def test_so_is_one_that_an_operator_keeps():
    linearization = Linearization(FrozenNetwork(torch.nn.Linear(2, 1)))
    with pytest.raises(TypeError, match=r"A dict, kept as 'table'"):
        linearization.keep("table", (torch.ones(3, 2),), lambda x: {"x": x})


def test_both_the_result_and_its_key_are_counted():
    cache, x = ContentsCache(), torch.ones(3)
    cache.get("twice", lambda: 0, (x,), lambda x: torch.cat([x, x]))
    assert sum(entry.nbytes for entry in cache._entries) == 3 * x.nbytes
