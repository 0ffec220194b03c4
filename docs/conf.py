"""Sphinx's configuration; `make docs` builds the pages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from plain_docstrings import escaped

project = "ntk_gp"
author = "The ntk_gp authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # notebooks are shown as they were executed: `make notebooks`
html_theme = "furo"
default_role = "code"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False  # what is GPyTorch's own is described there
exclude_patterns = ["images"]
suppress_warnings = ["myst.xref_missing"]  # links to files outside this folder
nitpick_ignore_regex = [(".*", r"(torch|gpytorch|linear_operator|botorch)\..*")]  # pages of other packages


def escape_plain_mathematics(app, what, name, obj, options, lines):
    lines[:] = escaped(lines)


def setup(app):
    app.connect("autodoc-process-docstring", escape_plain_mathematics)
