"""The README's examples are short and run as they stand; its links lead somewhere."""

import importlib.metadata
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu_only, pytest.mark.every_case]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_have_at_most_25_lines(example):
    assert len(example.splitlines()) <= 25


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_in_an_empty_folder(example, run_script, capsys):
    run_script(example)
    printed = capsys.readouterr().out
    assert printed.count("tensor") == 2
    assert "nan" not in printed


def test_links_lead_to_files():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_packages_description_has_no_links_to_files():
    """What a package index shows: there, they would lead nowhere. The examples are the same. It is as it was when the
    package was installed: after a change of README.md, install it again."""
    shown = importlib.metadata.metadata("ntk_gp").get_payload()
    assert re.findall(r"```python\n(.*?)```", shown, flags=re.DOTALL) == EXAMPLES
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "[the recipe](docs/recipe.md)" in README
    assert "the recipe" in shown
    assert "grey" in README  # what the figure's caption explains
    assert "grey" not in shown
