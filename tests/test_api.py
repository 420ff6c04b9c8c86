"""The public names and signatures, against ``api.txt``: a change of the API is never an accident.

Run ``python tests/test_api.py`` to write that file anew after a change that was meant.
"""

import difflib
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import mfac_core

SNAPSHOT = Path(__file__).with_name("api.txt")
API_PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def modules(package=mfac_core):
    """The package and its modules without a leading underscore, at any depth."""
    yield package
    for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
        if not module.name.startswith("_"):
            yield from modules(importlib.import_module(f"{package.__name__}.{module.name}"))


def public_modules():
    """Those with ``__all__``; the others hold what these import from them."""
    return [module for module in modules() if hasattr(module, "__all__")]


def signature(function):
    """The signature as it stands in the source: annotations as text, without quotes."""
    text = re.sub(r"ForwardRef\(('[^']*')\)", r"\1", str(inspect.signature(function)))
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def members(cls):
    """A line for each public method, property and constant that this package gives to a class."""
    for name, kind, owner, value in inspect.classify_class_attrs(cls):
        ours = owner.__module__.split(".")[0] == mfac_core.__name__
        if not ours or (name.startswith("_") and name not in ("__len__", "__matmul__")):
            continue
        match kind:
            case "property":
                yield f"{name}: property" + (", settable" if value.fset else "")
            case "data":
                yield f"{name}: data"
            case "method":
                yield name + signature(value)
            case _:
                yield f"{name}{signature(getattr(cls, name))}: {kind}"


def describe():
    """All of it as text; what has several paths stands under the first."""
    lines, seen = [], set()
    for module in public_modules():
        for name in sorted(module.__all__):
            value = getattr(module, name)
            if id(value) in seen:
                continue
            seen.add(id(value))
            path = f"{module.__name__}.{name}"
            if inspect.isclass(value):
                lines += ["", f"class {path}{signature(value)}"]
                lines += [f"    {line}" for line in members(value)]
            else:
                lines += ["", path + (signature(value) if callable(value) else ": data")]
    return "\n".join(lines[1:]) + "\n"


def test_the_public_names_and_signatures_are_those_of_the_snapshot():
    old, new = SNAPSHOT.read_text(), describe()
    if old != new:
        diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "api.txt", "now", "", "", 1)
        pytest.fail(
            "\n".join(diff) + "\n\nThe public API has changed. If that was meant, note it in "
            "CHANGELOG.md and run: python tests/test_api.py",
            pytrace=False,
        )


def test_the_reference_lists_every_public_module():
    listed = re.findall(r"^   (mfac_core\S*)$", API_PAGE.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(module.__name__ for module in public_modules())


def test_every_module_without_an_underscore_gives_something_public():
    """A forgotten ``__all__`` would keep a new module out of the reference, and out of here."""
    homes = {
        getattr(module, name).__module__ for module in public_modules() for name in module.__all__
    }
    named = {module.__name__ for module in modules()}
    assert named <= homes | {module.__name__ for module in public_modules()}


if __name__ == "__main__":
    SNAPSHOT.write_text(describe())
