"""The scripts in ``examples``, which the documentation lists as it finds them."""

import ast

import pytest
from scripts import EXAMPLES

SCRIPTS = {
    path.name: text
    for path in EXAMPLES.rglob("*.py")
    if 'if __name__ == "__main__":' in (text := path.read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_says_in_a_line_what_it_does(name):
    docstring = ast.get_docstring(ast.parse(SCRIPTS[name]))
    assert docstring
    assert docstring.partition("\n")[0].endswith(".")


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_script_is_run_by_a_test(name):
    """By its name, as in ``load("recipes/ewc.py")``, or without the suffix as a parameter."""
    here = EXAMPLES.parent / "tests"
    tests = "".join(path.read_text(encoding="utf-8") for path in here.rglob("test_*.py"))
    stem = name.removesuffix(".py")
    assert any(f'{before}{stem}{after}"' in tests for before in '"/' for after in ("", ".py"))
