"""Look at the pages as they were built: python .ci/check_site.py FOLDER."""

import re
import sys
from pathlib import Path

SOUGHT = ("dataload", "resum", "warm", "hug", "checkpoint", "fsdp", "damp")
"""Stems, as the search has them, of words that people look for."""

ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*")


def faults(root: Path) -> list[str]:
    """Return what is wrong with the pages."""
    found = []
    for path in sorted(root.rglob("*.html")):
        page, text = path.relative_to(root), path.read_text(encoding="utf-8")
        found += [f"{page} asks another host: {tag}" for tag in ELSEWHERE.findall(text)]
        missing = set(re.findall(r'<img[^>]* src="([^":]+)"', text))
        found += [
            f"{page}: no picture {name}" for name in missing if not (path.parent / name).exists()
        ]
        sidebar = re.search(r'aria-label="Pages">(.*?)</nav>', text, re.DOTALL)
        if sidebar and sidebar[1].count("<a ") < 10:
            found.append(f"{page}: its sidebar has no list of pages")
    index = (root / "searchindex.js").read_text(encoding="utf-8")
    found += [
        f"the search finds no {word!r}"
        for word in SOUGHT
        if not re.search(rf'"?\b{word}"?:', index)
    ]
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    sys.exit("\n".join(wrong[:20]) if wrong else 0)
