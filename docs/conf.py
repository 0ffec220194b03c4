"""Sphinx's configuration; `make docs` builds the pages."""

import re

project = "ntk_gp"
author = "The ntk_gp authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
default_role = "code"
autodoc_typehints = "none"
exclude_patterns = ["images"]
suppress_warnings = ["myst.xref_missing"]  # links to files outside this folder


def escape_starred_shapes(app, what, name, obj, options, lines):
    """Shapes such as (*batch, n, C) are no emphasis."""
    lines[:] = [re.sub(r"(?<=[( ])\*(?=\w+[,)])", r"\\*", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape_starred_shapes)
