"""The site: `pip install -e '.[docs]' && python -m sphinx -W docs docs/_build`."""

project = "lowbit_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
