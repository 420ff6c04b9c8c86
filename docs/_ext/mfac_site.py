"""What this site needs beyond Sphinx: its tables, its pictures, its size."""

import ast
import re
import tempfile
import zlib
from pathlib import Path

import matplotlib
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx_gallery.scrapers import matplotlib_scraper

ROOT = Path(__file__).parents[2]
STYLE = ROOT / "examples" / "figures.mplstyle"

READING_ORDER = (
    "prune",
    "train",
    "influence",
    "damping",
    "laplace",
    "pinn",
    "out_of_core",
    "ranks",
)
"""Of the tutorials."""

NUMBER = re.compile(r"\S*\de[-+]?\d+\S*(?: (?:s|ms))?|\d[\d.,]* (?:s|ms|MB|GB|×)(?!\w)")


def list_scripts() -> str:
    """Return a table of the scripts in examples, with the first lines of their docstrings."""
    rows = ["| script | what it does |", "| --- | --- |"]
    for path in sorted(ROOT.glob("examples/**/*.py"), key=lambda path: (path.parent, path)):
        text = path.read_text(encoding="utf-8")
        if 'if __name__ == "__main__":' in text:
            summary = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
            rows.append(f"| `{path.relative_to(ROOT).as_posix()}` | {summary} |")
    return "\n".join(rows)


def inventories() -> dict[str, tuple[str, str]]:
    """Return where other projects' names are, as the files in inventories say, for intersphinx.

    They hold an address, and a line for each name that these pages speak of; the build asks nobody.
    """
    folder, found = Path(tempfile.mkdtemp()), {}
    for path in sorted((ROOT / "docs" / "inventories").glob("*.txt")):
        address, *lines = path.read_text(encoding="utf-8").splitlines()
        entries = (line.split() for line in lines)
        text = "".join(f"{name} {role} 1 {place} -\n" for name, role, place in entries)
        head = f"# Sphinx inventory version 2\n# Project: {path.stem}\n# Version: \n"
        head += "# The remainder of this file is compressed using zlib.\n"
        target = folder / f"{path.stem}.inv"
        target.write_bytes(head.encode() + zlib.compress(text.encode()))
        found[path.stem] = (address, str(target))
    return found


def reading_order(script):
    """Return the place of a tutorial."""
    return READING_ORDER.index(Path(script).stem.removeprefix("plot_"))


def use_style(gallery_conf, script):
    """Draw the tutorials' pictures as all others are, for pages light and dark."""
    matplotlib.rc_file(STYLE)


def svg_scraper(block, block_vars, gallery_conf, **kwargs):
    """Keep the pictures of a tutorial as SVG."""
    return matplotlib_scraper(block, block_vars, gallery_conf, format="svg", **kwargs)


class UnbrokenNumbers(SphinxPostTransform):
    """Keep numbers in tables, such as 6e-08 and 0.2 s, on one line."""

    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs):
        """Wrap each in a span that does not break."""
        for entry in self.document.findall(nodes.entry):
            for text in list(entry.findall(nodes.Text)):
                if isinstance(text.parent, nodes.literal | nodes.math | nodes.raw):
                    continue
                pieces, end = [], 0
                for found in NUMBER.finditer(text):
                    pieces.append(nodes.Text(text[end : found.start()]))
                    pieces.append(nodes.inline("", found[0], classes=["number"]))
                    end = found.end()
                if pieces:
                    text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def trim_mathjax(app, error):
    """Leave out of the site what TeX in pages never asks of MathJax: most of 24 MB."""
    root = Path(app.outdir) / "_static" / "mathjax"
    needed = ("tex-chtml.js", "input/tex/", "output/chtml/", "ui/")
    for path in root.rglob("*"):
        if path.is_file() and not path.relative_to(root).as_posix().startswith(needed):
            path.unlink()


def setup(app):
    """Register them; trim after the extension has copied."""
    app.add_post_transform(UnbrokenNumbers)
    app.connect("build-finished", trim_mathjax, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
