"""What this site needs beyond Sphinx: its tables, its pictures, its size."""

import ast
import re
from pathlib import Path

import matplotlib
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx_gallery.scrapers import matplotlib_scraper

ROOT = Path(__file__).parents[2]
STYLE = ROOT / "examples" / "figures.mplstyle"

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
