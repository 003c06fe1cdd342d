"""Every notebook runs from top to bottom and leaves nothing to commit, and none is committed with widget state."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",  # of this environment: the interpreter's own kernel comes before the user's
        store_widget_state=False,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert not [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        if out.get("name") == "stderr"
    ]
    ignored = (FOLDER.parent / ".gitignore").read_text().splitlines()
    left = [f"{made.name}/" if made.is_dir() else made.name for made in tmp_path.iterdir()]
    assert not [
        name
        for name in left
        if not any(fnmatchcase(name, x) or fnmatchcase(f"notebooks/{name}", x) for x in ignored)
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_small_and_carries_no_widget_state(path):
    assert "widgets" not in nbformat.read(path, as_version=4).metadata
    assert path.stat().st_size < 2_000_000
