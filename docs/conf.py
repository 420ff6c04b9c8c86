"""Sphinx configuration; build with ``python -m sphinx -W -n docs docs/_build/html``."""

import mfac_core

project = "mfac_core"
author = "The mfac_core authors"
copyright = f"2026, {author}"
version = release = mfac_core.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build", "results"]  # results are included by pages
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The reference follows __all__: a public name cannot be forgotten, nor a removed one linger.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "none"  # the docstrings give the types, in words
numpydoc_show_class_members = False  # the class template lists them

# Other projects' names, in See Also; the build reads no inventories from the network.
nitpick_ignore_regex = [("py:.*", r"(cupy|jax|numpy|optax|scipy|torch)\..*")]

html_theme = "pydata_sphinx_theme"
html_title = f"mfac_core {release}"
html_theme_options = {"show_prev_next": False, "show_toc_level": 2}
html_sidebars = {"**": []}
html_show_sourcelink = False
