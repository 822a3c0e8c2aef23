"""The site: `pip install -e '.[docs]' && python -m sphinx -W docs docs/_build`."""

project = "lowbit_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = [
    "myst.xref_missing"
]  # pages link to files of the repository beside them; tests/test_readme.py follows links
autodoc_member_order = "bysource"


def setup(app):
    """Docstrings are plain text with equations: a bar means a magnitude, not a substitution of reStructuredText."""
    app.connect("autodoc-process-docstring", lambda app, what, name, obj, options, lines: _escape(lines))


def _escape(lines: list[str]) -> None:
    lines[:] = [line.replace("|", r"\|").replace("*", r"\*") for line in lines]
