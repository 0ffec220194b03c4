"""Every example runs and prints what it says: docstrings', and the code in the guides; docstrings read as written."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ntk_gp

pytestmark = [pytest.mark.cpu_only, pytest.mark.every_case]

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODULES = ["ntk_gp", *(module.name for module in pkgutil.walk_packages(ntk_gp.__path__, "ntk_gp."))]
EXAMPLES = [
    pytest.param(test, id=test.name)
    for name in MODULES
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_there_are_examples():
    assert {"ntk_gp.kernels.ntk.NTKKernel", "ntk_gp.means.NetworkMean"} <= {example.id for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES)
def test_docstring_example(example, capsys):
    """As it stands: its module's names are all that it has."""
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, clear_globs=False)
    assert result.failed == 0, capsys.readouterr().out


GUIDES = [page for page in PAGES if blocks(page, "python") and page.name != "README.md"]  # that is test_readme.py's


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_guide(page, run_script, capsys):
    """The blocks of Python of one page, one after the other in an empty folder, print its blocks of text."""
    run_script("\n".join(blocks(page, "python")))
    printed = blocks(page, "text")
    assert not printed or capsys.readouterr().out == "".join(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_a_page(page):
    assert doctest.testfile(str(page), module_relative=False, encoding="utf-8").failed == 0


def plain_docstrings() -> ModuleType:
    """What docs/conf.py does to docstrings."""
    spec = importlib.util.spec_from_file_location("plain_docstrings", ROOT / "docs" / "plain_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(lines: list[str]) -> tuple[str, str]:
    """The text that docutils makes of RST, and its complaints."""
    core = pytest.importorskip("docutils.core")
    document = core.publish_doctree("\n".join(lines), settings_overrides={"report_level": 5, "halt_level": 6})
    complaints = [message.astext() for message in document.parse_messages + document.transform_messages]
    return document.astext(), "\n".join(complaints)


MATHEMATICS = [
    "|K + D|", "log |sK + σ²D|", "|D^{1/2} M D^{1/2}|", "(*batch, n, C)", "x1 (n, *rest)", "*shape", "K*ₓ", "K**",
    "a*b*c", "2*|x|", "‖r‖", "w_", "w__", "x_s", "|a| and |b|", "[*positions, d]", "f(*args, **kwargs)", "|x|_2",
    "(|k|)", "p_ / q_", "A|B", "2*(a + b)", "2*{a}",
]  # fmt: skip


class TestPlainMathematics:
    """Docstrings with mathematics in plain text come out as they were written."""

    @example(["*shape", "2*|x|"], 0)
    @given(st.lists(st.sampled_from(MATHEMATICS), min_size=1, max_size=8), st.integers(0, 7))
    def test_reads_as_written(self, formulas, line_end):
        words = [*formulas[:line_end], "and\n" + " ".join(["so", *formulas[line_end:]])]
        lines = ("Is " + " then ".join(words) + " here.").split("\n")
        text, complaints = rendered(plain_docstrings().escaped(lines))
        assert complaints == ""
        assert text.split() == " ".join(lines).split()

    def test_markup_stays(self):
        lines = [
            "The *use* of a **parameter**, `x | y_` and ``a*b``, :math:`|K|` of |K|.", "", "* one |a|", "* two *b*, c_",
            "", ".. math::", "", "    |K + D|_2", "", ">>> print('|a|', 2 * 3)", "|a| 6", "", "| a line", "| another",
            "", "So::", "", "    x | y", "", ":param x: Of |x|.",
        ]  # fmt: skip
        escaped = plain_docstrings().escaped(lines)
        changed = {before: after for before, after in zip(lines, escaped, strict=True) if before != after}
        assert changed == {
            lines[0]: lines[0].replace("of |K|", r"of \|K\|"),
            "* one |a|": r"* one \|a\|",
            "* two *b*, c_": r"* two *b*, c\_",
            ":param x: Of |x|.": r":param x: Of \|x\|.",
        }
