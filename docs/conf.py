"""Sphinx's configuration; `make docs` builds the pages."""

project = "ntk_gp"
author = "The ntk_gp authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
html_theme = "furo"
default_role = "code"
autodoc_typehints = "none"
exclude_patterns = ["images"]
suppress_warnings = ["myst.xref_missing"]  # links to files outside this folder
