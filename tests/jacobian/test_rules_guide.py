"""The example in docs/adding-a-rule.md runs and prints what the page says."""

import re
from pathlib import Path

import torch

from ntk_gp.jacobian.rules.registry import _RULES
from tests.jacobian.explicit import Subject

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-rule.md"


def test_the_guide(capsys):
    text = PAGE.read_text(encoding="utf-8")
    names: dict = {}
    state = torch.random.get_rng_state()
    try:
        exec("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
        assert capsys.readouterr().out == "".join(re.findall(r"```text\n(.*?)```", text, re.DOTALL))
        x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(1, 5, 3)
        assert "autodiff" not in Subject(names["network"].double()).check(x, x[:, 1:4]).values()
    finally:
        torch.random.set_rng_state(state)
        _RULES.pop(names.get("norm_scaled_linear"), None)
