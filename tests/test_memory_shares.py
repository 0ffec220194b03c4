"""Who may take how much of the memory budget is told in one table, and adds up."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

import ntk_gp
from ntk_gp import memory, settings

pytestmark = pytest.mark.cpu_only

CPU = torch.device("cpu")
SHARES = {name: share for name, share in vars(memory).items() if isinstance(share, memory.Share)}


def part(name: str) -> Fraction:
    return Fraction(SHARES[name].numerator, SHARES[name].denominator)


def test_nobody_else_divides_the_budget():
    package = Path(ntk_gp.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "memory_budget.bytes" in path.read_text(encoding="utf-8")]
    assert found == ["memory.py"]


@pytest.mark.parametrize("name", sorted(SHARES))
def test_bytes(name):
    for budget in (1, 999, 10**9 + 7):
        with settings.memory_budget(budget):
            assert SHARES[name].bytes(CPU) == int(budget * part(name))


def test_every_share_is_taken():
    package = Path(ntk_gp.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    assert [name for name in SHARES if f"memory.{name}.bytes(" not in text] == []


def test_what_is_held_at_once():
    """The sums in the table, and that what is held of a Jacobian is kept."""
    assert part("FACTORS") < part("CACHES")
    assert part("FACTORS") + 8 * part("CAPTURE") == Fraction(7, 10)
    assert part("CACHES") + part("FACTORS") + 8 * part("CAPTURE") <= 1
    assert 8 * part("CAPTURE") + 3 * part("CHUNK") + part("GRAM_BLOCK") == Fraction(13, 16)
    assert max(part(name) for name in ("BLOCK", "COLUMNS", "WHOLE_ROWS", "INTERMEDIATE")) == Fraction(1, 8)
    assert 8 * part("PASS") == Fraction(1, 2)
    assert part("LANDMARKS") + 4 * part("TRIANGLE") == 8 * part("PRECONDITIONER") == part("SYSTEM") == 1
