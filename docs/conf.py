"""Sphinx configuration; build with ``python -m sphinx -W -n docs docs/_build/html``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import mfac_site

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
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",  # the site itself has it, and asks nobody
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "mfac_site",
]
exclude_patterns = ["_build", "results", "sg_execution_times.rst"]  # pages include results
templates_path = ["_templates"]

sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": "plot_",
    "within_subsection_order": "mfac_site.reading_order",
    "image_scrapers": ("mfac_site.svg_scraper",),
    "reset_modules": ("mfac_site.use_style",),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,  # they would be of a busy machine
}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3


myst_substitutions = {"scripts": mfac_site.list_scripts()}

# The reference follows __all__: a public name cannot be forgotten, nor a removed one linger.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "none"  # the docstrings give the types, in words
numpydoc_show_class_members = False  # the class template lists them

# Other projects' names: links to those in inventories, the others as they are.
intersphinx_mapping = mfac_site.inventories()
nitpick_ignore_regex = [("py:.*", r"(cupy|jax|numpy|optax|scipy|torch)\..*")]

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"mfac_core {release}"
html_theme_options = {
    "navbar_center": [],
    "primary_sidebar_end": [],
    "show_prev_next": True,
    "show_toc_level": 2,
}
html_sidebars = {"**": ["pages"]}  # the header would hold five of them
html_show_sourcelink = False
