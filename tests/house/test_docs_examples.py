"""Examples in the docs and in public docstrings are code that runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import qlab
from qlab import registry

ROOT = Path(__file__).parents[2]
PAGES = ["extend.md"]
# Docstrings whose examples stand alone: they need no object that is not made in them.
DOCUMENTED = ["qlab.core.quantize.table.ErrorTable"]


@pytest.fixture
def shelves_as_before():
    """Take what an example registers off the shelves again."""
    before = {shelf: dict(registry.shelf(shelf)) for shelf in registry.SHELVES}
    yield
    for shelf, objects in before.items():
        current = registry.shelf(shelf)
        for name in set(current) - set(objects):
            del registry._shelves[shelf][name]


def code_of(page: str) -> str:
    """All Python blocks of a page, on the lines that they have there."""
    text = (ROOT / "docs/guide" / page).read_text()
    lines: list[str] = []
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        first = text[: block.start()].count("\n") + 1
        lines += [""] * (first - len(lines)) + block[1].splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs(page, shelves_as_before, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = code_of(page)
    assert "qlab" in code
    exec(compile(code, page, "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", DOCUMENTED)
def test_example_of_a_docstring_runs(path):
    module, name = path.rsplit(".", 1)
    names = {**vars(importlib.import_module(module)), "qlab": qlab}
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(names[name], name, globs=names)
    assert example.examples
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert result.failed == 0
