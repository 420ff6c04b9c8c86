"""Sphinx configuration; build with ``python -m sphinx -W -n docs docs/_build/html``."""

import ast
from pathlib import Path

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
    "sphinx-mathjax-offline",  # the site itself has it, and asks nobody
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "results"]  # results are included by pages
templates_path = ["_templates"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence", "dollarmath", "substitution"]
myst_heading_anchors = 3


def list_scripts() -> str:
    """Return a table of the scripts in examples, with the first lines of their docstrings."""
    root = Path(__file__).parents[1]
    rows = ["| script | what it does |", "| --- | --- |"]
    for path in sorted(root.glob("examples/**/*.py"), key=lambda path: (path.parent, path)):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            rows.append(f"| `{path.relative_to(root).as_posix()}` | {summary} |")
    return "\n".join(rows)


myst_substitutions = {"scripts": list_scripts()}

# The reference follows __all__: a public name cannot be forgotten, nor a removed one linger.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "none"  # the docstrings give the types, in words
numpydoc_show_class_members = False  # the class template lists them

# Other projects' names, in See Also; the build reads no inventories from the network.
nitpick_ignore_regex = [("py:.*", r"(cupy|jax|numpy|optax|scipy|torch)\..*")]

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"mfac_core {release}"
html_theme_options = {"navbar_center": [], "show_prev_next": True, "show_toc_level": 2}
html_sidebars = {"**": ["pages"]}  # the header would hold five of them
html_show_sourcelink = False


def trim_mathjax(app, error):
    """Leave out of the site what TeX in pages never asks of MathJax: most of 24 MB."""
    root = Path(app.outdir) / "_static" / "mathjax"
    needed = ("tex-chtml.js", "input/tex/", "output/chtml/", "ui/")
    for path in root.rglob("*"):
        if path.is_file() and not path.relative_to(root).as_posix().startswith(needed):
            path.unlink()


def setup(app):
    """Trim after the extension has copied."""
    app.connect("build-finished", trim_mathjax, priority=900)
